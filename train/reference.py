"""Let the trained model answer the probes, for every later stage to reproduce:  python -m train.reference RECIPE

The adapter lies on the base, unmerged: this is the model that was trained, before any step that could lose it. All is
computed in float32; on a GPU, whose memory may not hold that, in the precision of the recipe's merge.
"""

import json
import logging
from pathlib import Path
from typing import Any

from recipe import Made, Recipe, Run, command
from recipe.files import fresh_folder, put_in_place
from recipe.reference import CONTINUATION_TOKENS, SCORED_POSITIONS, Answer, Probe, Reference, write_reference
from train.probes import probe_messages
from train.template import IGNORED, examples, render

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "peft")
VALIDATION_ANSWERS = 40


def reference(recipe: Recipe, run: Run) -> Made:
    """Write `reference/` in the format of `recipe.reference`."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, recipe.merge.precision) if on_gpu else torch.float32
    place = {"device_map": {"": torch.cuda.current_device()}} if on_gpu else {}
    base = AutoModelForCausalLM.from_pretrained(run.path("base"), dtype=dtype, **place)
    model = PeftModel.from_pretrained(base, run.path("adapter")).eval()
    conversations = _conversations(run.path("data"))

    cases = probe_messages(tokenizer, conversations)
    positions = max(1, SCORED_POSITIONS // len(cases))
    probes, logits = [], []
    for name, messages in cases.items():
        probe, scored = ask(model, tokenizer, name, messages, positions)
        if probe is None:
            log.info("reference: probe '%s' is longer than the base's context, left out", name)
            continue
        probes.append(probe)
        logits.append(scored)
    answers = [
        Answer(row.input_ids, first, _loss(model, row.input_ids, first))
        for messages in conversations[:VALIDATION_ANSWERS]
        for row in examples(tokenizer, messages, recipe.train.max_tokens)
        for first in [_start_of_last_answer(row.labels)]
    ]
    folder = fresh_folder(run.path(".reference.tmp"))
    write_reference(folder, Reference(probes, np.concatenate(logits), answers))
    put_in_place(folder, run.path("reference"))
    return Made(
        outputs=[run.path("reference")],
        metrics={
            "probes": len(probes),
            "stopped": sum(probe.stopped for probe in probes),
            "scored_positions": sum(probe.scored for probe in probes),
            "validation_tokens": sum(len(answer.ids) - answer.first for answer in answers),
            "validation_loss": sum(a.loss for a in answers) / max(1, sum(len(a.ids) - a.first for a in answers)),
        },
        packages=PACKAGES,
    )


def ask(model: Any, tokenizer: Any, name: str, messages: list[dict[str, str]], positions: int) -> tuple[Any, Any]:
    """A probe answered greedily, and the (scored, vocabulary) float32 logits from the prompt's last token on.

    (None, None) if prompt and answer do not fit the positions that the base knows.
    """
    import torch

    prompt = render(tokenizer, messages, prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known and len(ids) + CONTINUATION_TOKENS > known:
        return None, None
    with torch.inference_mode():
        batch = torch.tensor([ids], device=model.device)
        made = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=CONTINUATION_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=tokenizer.eos_token_id,
        )[0].tolist()
        continuation = made[len(ids) :]
        scored = min(positions, len(continuation))
        # One pass over prompt and answer, as later stages do it, not the pieces that generation made.
        found = model(torch.tensor([made], device=model.device)).logits[0, len(ids) - 1 : len(ids) - 1 + scored]
    probe = Probe(name, messages, prompt, ids, continuation, continuation[-1] == tokenizer.eos_token_id, scored)
    return probe, found.float().cpu().numpy()


def _loss(model: Any, ids: list[int], first: int) -> float:
    """Negative log-likelihood of the tokens from `first` on, summed, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, first - 1 : -1].float()
    return float(cross_entropy(logits.cpu(), torch.tensor(ids[first:]), reduction="sum"))


def _start_of_last_answer(labels: list[int]) -> int:
    """Index of the first token of the last supervised stretch that reaches the end; the row is cut after it."""
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    while last > 0 and labels[last - 1] != IGNORED:
        last -= 1
    return last


def _conversations(data: Path) -> list[list[dict[str, str]]]:
    """Validation conversations, or training ones where nothing was held back."""
    rows: list[dict[str, Any]] = []
    for part in ("validation", "train"):
        with (data / f"{part}.jsonl").open(encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
        if rows:
            break
    return [row["messages"] for row in rows]


if __name__ == "__main__":
    command("reference", reference)
