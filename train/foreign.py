"""Let what another tool trained answer the probes:  python -m train.foreign FOLDER BASE PROMPTS REFERENCE ARTEFACT ...

REFERENCE and each ARTEFACT are an adapter, a folder of safetensors, a GGUF or a Hub id (`train.locate`). FOLDER gets
`reference/` in the format of `pipeline.reference`, with the logits of the adapter's base beside, `tokenizer/`, and
`reference.json`, which says where all of them lie. Of a GGUF there are the prompts alone, which `convert.foreign` lets
it answer; of a server, whose name is empty here, the messages alone.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.command import boundary
from pipeline.error import reason
from pipeline.files import fresh_folder, write_whole
from pipeline.model import ends_of, greedy, load, load_adapter, logits
from pipeline.reference import (
    CONTINUATION_TOKENS,
    OwnAnswer,
    Probe,
    Reference,
    most_likely,
    write_base_logits,
    write_own_answers,
    write_probes,
    write_reference,
)
from pipeline.rows import rendered
from train.locate import Located, locate
from train.probes import HARD_CASES, Case, ask, own_cases, probe_cases

MOST_PROMPTS = 100  # of the user's own; each more leaves fewer positions to compare of the others

log = logging.getLogger("truetune")


def foreign(folder: Path, base: str, prompts: str, name: str, artefacts: list[str]) -> None:
    """Write the reference, or as much of it as transformers can.

    Raises:
        UserError: REFERENCE cannot be used (train.locate), or has no chat template; PROMPTS have bad lines.
    """
    asked = asked_in(prompts)
    located = locate(name, base) if name else None
    places = {artefact: place(artefact, base) for artefact in artefacts}
    made = fresh_folder(folder / "reference")
    if located is None:
        cases = {each: Case(messages, []) for each, messages in HARD_CASES.items()} | own_cases(asked, MOST_PROMPTS)
        write_probes(
            made, [Probe(each, case.messages, case.tools, "", [], [], False, 0) for each, case in cases.items()]
        )
        bos = None
    else:
        tokenizer = tokenizer_of(located)
        cases = probe_cases(tokenizer, asked, MOST_PROMPTS)
        refused = len(own_cases(asked, MOST_PROMPTS)) - sum(each.startswith("own-") for each in cases)
        if refused:
            log.warning("prompts: the chat template refuses or drops %d of %s, left out", refused, prompts)
        if located.model.suffix == ".gguf":
            write_probes(made, [prompt_of(tokenizer, each, case) for each, case in cases.items()])
        else:
            answer(located, tokenizer, cases, folder)
        tokenizer.save_pretrained(fresh_folder(folder / "tokenizer"))
        bos = tokenizer.bos_token
    told = {"reference": name, "bos": bos, "artefacts": places} | (as_told(located) if located else {})
    write_whole(folder / "reference.json", json.dumps(told, indent=2) + "\n")


def place(artefact: str, base: str) -> dict[str, str | None]:
    """Where an artefact lies, or the `problem` with it."""
    try:
        return as_told(locate(artefact, base))
    except UserError as error:
        return {"problem": error.problems[0]}


def as_told(located: Located) -> dict[str, str | None]:
    return {"model": str(located.model), "base": str(located.base) if located.base else None}


def tokenizer_of(located: Located) -> Any:
    """The tokenizer with its chat template, of an adapter that has none its base's.

    Raises:
        UserError: transformers cannot read it, or there is no chat template.
    """
    from transformers import AutoTokenizer

    model, where = located.model, located.model
    try:
        if model.suffix == ".gguf":
            tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        else:
            where = model if (model / "tokenizer_config.json").is_file() else located.base or model
            tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # of whichever tokenizer's code
        fix = "put it there, or give the folder that it was made from"
        if model.suffix == ".gguf":
            fix = "fetch the file again if it is damaged or cut, else give the folder that it was made from"
        raise UserError(f"{where} has no tokenizer that transformers reads ({reason(error)}): {fix}") from None
    if not tokenizer.chat_template:
        raise UserError(f"{where} has no chat template: put the one that it was trained with beside the tokenizer")
    return tokenizer


def prompt_of(tokenizer: Any, name: str, case: Case) -> Probe:
    """What is to be answered; the ids, which are for its length, will be those of llama.cpp's tokenizer."""
    prompt = rendered(tokenizer, case.messages, case.tools, prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Probe(name, case.messages, case.tools, prompt, ids, [], False, 0)


def answer(located: Located, tokenizer: Any, cases: dict[str, Case], folder: Path) -> None:
    """Write the whole reference, and what an adapter's base says beside."""
    import numpy as np

    model_folder, base = located.model, located.base
    log.info("reference: %s%s", model_folder, f" on {base}" if base else "")
    try:
        model = load_adapter(model_folder, base, len(tokenizer), "float32") if base else load(model_folder, "float32")
    except Exception as error:  # of a stranger's files
        also = f": is {base} its base? Else set BASE" if base else ": fetch or save it again"
        raise UserError(f"{model_folder} cannot be loaded ({reason(error)}){also}") from None
    ends = list({*ends_of(model), tokenizer.eos_token_id} - {None})
    probes, scores = ask(model, tokenizer, cases, ends)
    write_reference(folder / "reference", Reference(probes, np.concatenate(scores), []))
    if not base:
        return
    with model.disable_adapter():
        rows = [logits(model, probe.sequence, probe.positions[0])[: probe.scored].numpy() for probe in probes]
        own = answers_of_base(model, tokenizer, probes, ends)
    if all(np.array_equal(row, score) for row, score in zip(rows, scores, strict=True)):
        log.warning(
            "reference: the adapter changes nothing: was it trained, and are its weights named as its base's are?"
        )
    write_base_logits(folder / "reference", np.concatenate(rows))
    write_own_answers(folder / "base-greedy.jsonl", own)


def answers_of_base(model: Any, tokenizer: Any, probes: list[Probe], ends: list[int]) -> list[OwnAnswer]:
    """What the base says without its adapter."""
    made = []
    said = greedy(model, tokenizer, [probe.ids for probe in probes], CONTINUATION_TOKENS, ends, "base")
    for probe, tokens in zip(probes, said, strict=True):
        rows = logits(model, probe.ids + tokens, len(probe.ids) - 1)[:-1].numpy()
        made.append(OwnAnswer("base", probe.name, tokens, tokens[-1] in ends, most_likely(rows)))
    return made


def asked_in(prompts: str) -> list[dict[str, Any]]:
    """Conversations to ask, of a file with a prompt a line: text, or JSON with `messages`.

    Raises:
        UserError: it cannot be read, or has bad lines, which are all told.
    """
    if not prompts:
        return []
    try:
        lines = Path(prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"PROMPTS={prompts} cannot be read ({error}): give a text file with a prompt a line") from None
    found, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(conversation(line.strip("\r")))
        except ValueError as error:
            problems.append(
                f"{prompts}:{number}: {error}: give a text, or JSON with `messages` that end with a question"
            )
    if not found and not problems:
        problems = [f"PROMPTS={prompts} is empty: give a prompt a line"]
    if problems:
        raise UserError(*problems)
    if len(found) > MOST_PROMPTS:
        log.warning("prompts: the first %d of %d are asked", MOST_PROMPTS, len(found))
    return found


def conversation(line: str) -> dict[str, Any]:
    """One prompt as a row whose last turn is the answer.

    Raises:
        ValueError: the JSON is damaged or no conversation.
    """
    if not line.lstrip().startswith("{"):
        return {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": ""}]}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError("has no `messages`")
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError("has a message without a `role`")
    if not all(isinstance(turn.get("content"), str) or turn.get("tool_calls") for turn in turns):
        raise ValueError("has a message whose `content` is no text")
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise ValueError("has no question")
    return row | {"messages": [*turns, {"role": "assistant", "content": ""}]}


if __name__ == "__main__":
    with boundary():
        base, prompts, reference, *artefacts = sys.argv[2:]
        foreign(Path(sys.argv[1]), base, prompts, reference, artefacts)
