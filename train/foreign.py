"""Let what another tool trained answer the probes:  python -m train.foreign REFERENCE FOLDER [BASE] [PROMPTS]

REFERENCE is a PEFT adapter, a folder of safetensors or a Hub id, as LLaMA-Factory, Unsloth, Axolotl, TRL and ms-swift
leave them; a folder of checkpoints stands for its last one. FOLDER gets `reference/` in the format of
`pipeline.reference`, with the logits of the adapter's base beside, and `tokenizer/`. Started by `serve.foreign` only.
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.command import boundary
from pipeline.error import reason
from pipeline.files import fresh_folder, read_object, write_whole
from pipeline.model import ends_of, greedy, load, logits, with_adapter
from pipeline.reference import (
    CONTINUATION_TOKENS,
    OwnAnswer,
    Probe,
    Reference,
    most_likely,
    write_base_logits,
    write_own_answers,
    write_reference,
)
from train.hub import fetched
from train.probes import ask, probe_cases

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")

log = logging.getLogger("truetune")


def foreign(name: str, folder: Path, base: str, prompts: str) -> None:
    """Write the reference of what was trained.

    Raises:
        UserError: it is no adapter and no model, it is pickled, its base is not there, it has no chat template.
    """
    import numpy as np
    from transformers import AutoTokenizer

    trained = located(name)
    adapter = read_object(trained / ADAPTER) if (trained / ADAPTER).is_file() else {}
    weights = located(base or str(adapter.get("base_model_name_or_path") or ""), trained) if adapter else trained
    if read_object(weights / "config.json").get("quantization_config"):
        raise UserError(f"{weights} has quantized weights: name the same model without quantization with BASE=...")
    if adapter and not (trained / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{trained} has no {ADAPTER_WEIGHTS}: pickled adapters are not read, save it as safetensors")
    speaks = trained if (trained / "tokenizer_config.json").is_file() else weights
    tokenizer = AutoTokenizer.from_pretrained(speaks)
    if not tokenizer.chat_template:
        raise UserError(f"{speaks} has no chat template: put the one that it was trained with beside the tokenizer")
    log.info("reference: %s%s", trained, f" on {weights}" if adapter else "")
    try:
        model = load(weights, "float32")
        if adapter:
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens that training added
                model.resize_token_embeddings(len(tokenizer))
            model = with_adapter(model, trained)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{trained} cannot be loaded ({reason(error)}): is {weights} its base? Else set BASE") from None
    ends = list({*ends_of(model), tokenizer.eos_token_id} - {None})
    probes, scores = ask(model, tokenizer, probe_cases(tokenizer, asked_in(prompts)), ends)
    made = fresh_folder(folder / "reference")
    write_reference(made, Reference(probes, np.concatenate(scores), []))
    if adapter:
        with model.disable_adapter():
            rows = [logits(model, probe.sequence, probe.positions[0])[: probe.scored].numpy() for probe in probes]
            own = answers_of_base(model, tokenizer, probes, ends)
        write_base_logits(made, np.concatenate(rows))
        write_own_answers(folder / "base-greedy.jsonl", own)
    tokenizer.save_pretrained(fresh_folder(folder / "tokenizer"))
    told = {"reference": str(trained), "base": str(weights) if adapter else None, "probes": len(probes)}
    write_whole(folder / "reference.json", json.dumps(told, indent=2) + "\n")


def answers_of_base(model: Any, tokenizer: Any, probes: list[Probe], ends: list[int]) -> list[OwnAnswer]:
    """What the base says without its adapter."""
    made = []
    said = greedy(model, tokenizer, [probe.ids for probe in probes], CONTINUATION_TOKENS, ends, "base")
    for probe, tokens in zip(probes, said, strict=True):
        rows = logits(model, probe.ids + tokens, len(probe.ids) - 1)[:-1].numpy()
        made.append(OwnAnswer("base", probe.name, tokens, tokens[-1] in ends, most_likely(rows)))
    return made


def located(name: str, beside: Path | None = None) -> Path:
    """The folder of that name, here or `beside` another one, its last checkpoint, or what the Hub has of that id.

    Raises:
        UserError: there is nothing.
    """
    for folder in (Path(name), *([beside / name] if beside else [])):
        if name and folder.is_dir():
            files = {file.name for file in folder.iterdir()}
            if files & {ADAPTER, "config.json"}:
                return folder
            steps = {int(found[1]): each for each in files if (found := re.fullmatch(r"checkpoint-(\d+)", each))}
            if steps:
                return folder / steps[max(steps)]
            raise UserError(f"{folder} holds no model: it has neither {ADAPTER} nor config.json")
    if HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download

        repository, _, revision = name.partition("@")
        return fetched(name, lambda: snapshot_download(repository, revision=revision or None, allow_patterns=FETCHED))
    what = f"{name!r} is no folder and no Hub id" if name else f"{beside} does not name its base"
    raise UserError(f"{what}: name the adapter's base with BASE=..., a folder or owner/name")


def asked_in(prompts: str) -> list[dict[str, Any]]:
    """Conversations to ask, of a file with a prompt a line: text, or JSON with `messages`.

    Raises:
        UserError: it cannot be read.
    """
    if not prompts:
        return []
    found = []
    try:
        for line in Path(prompts).read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"] if line.startswith("{") else [{"role": "user", "content": line}]
            turns = [turn for turn in messages if turn["role"] != "assistant" or turn is not messages[-1]]
            found.append({"messages": [*turns, {"role": "assistant", "content": ""}]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"PROMPTS={prompts} cannot be read ({error!r}): a text a line, or JSON with messages") from None
    return found


if __name__ == "__main__":
    with boundary():
        foreign(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:5])
