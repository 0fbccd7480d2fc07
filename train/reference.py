"""Let the trained model answer the probes, for every later stage to reproduce:  python -m train.reference RECIPE

The adapter lies on the base, unmerged: this is the model that was trained, before any step that could lose it. All is
computed in float32; on a GPU, whose memory may not hold that, in the precision of the recipe's merge.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fresh_folder, put_in_place
from pipeline.recipe import Train
from pipeline.reference import CONTINUATION_TOKENS, SCORED_POSITIONS, Answer, Probe, Reference, write_reference
from pipeline.rows import rendered, rows
from train.probes import Case, probe_cases
from train.template import IGNORED, Example, row_examples

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "peft")
VALIDATION_ANSWERS = 40
PROBES_AT_ONCE = 16  # a step of so many costs little more than of one
MOST_PADDING = 2  # times the shortest prompt of a group, so that a long one is not computed for all


def reference(recipe: Recipe, run: Run) -> Made:
    """Write `reference/` in the format of `pipeline.reference`."""
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
    validation, train = (list(rows(run.path("data"), part, VALIDATION_ANSWERS)) for part in ("validation", "train"))
    probes, logits = ask(model, tokenizer, probe_cases(tokenizer, validation + train))
    answers = [
        Answer(row.input_ids, first, _loss(model, row.input_ids, first))
        for row in islice(_examples(tokenizer, validation or train, recipe.train), VALIDATION_ANSWERS)
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


def ask(model: Any, tokenizer: Any, cases: dict[str, Case]) -> tuple[list[Probe], list[Any]]:
    """The cases answered greedily, and each one's (scored, vocabulary) float32 logits from the prompt's last token on.

    Left out are those that with their answer do not fit the positions that the base knows.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompts = {name: rendered(tokenizer, case.messages, prompt=True, tools=case.tools) for name, case in cases.items()}
    ids = {name: tokenizer(prompt, add_special_tokens=False)["input_ids"] for name, prompt in prompts.items()}
    for name in [name for name in ids if len(ids[name]) + CONTINUATION_TOKENS > known]:
        log.info("reference: probe '%s' is longer than the base's context, left out", name)
        del ids[name]
    answered = greedy_answers(model, tokenizer, ids)
    most = max(1, SCORED_POSITIONS // len(cases))
    probes, logits = [], []
    for name, prompt in ids.items():
        # One pass over prompt and answer, as later stages do it, not the pieces that generation made.
        found = _logits(model, prompt + answered[name], len(prompt))
        if found[:-1].argmax(-1).tolist() != answered[name]:  # padding may tip a near tie
            answered |= greedy_answers(model, tokenizer, {name: prompt})
            found = _logits(model, prompt + answered[name], len(prompt))
        answer = answered[name]
        scored = min(most, len(answer))
        stopped = answer[-1] == tokenizer.eos_token_id
        case = cases[name]
        probes.append(Probe(name, case.messages, case.tools, prompts[name], prompt, answer, stopped, scored))
        logits.append(found[:scored].numpy())
    return probes, logits


def greedy_answers(model: Any, tokenizer: Any, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Greedy answers, up to and with the end of the turn; prompts of like length are asked together."""
    import torch

    found = {}
    groups: list[list[str]] = [[]]
    for name in sorted(prompts, key=lambda name: len(prompts[name])):
        shortest = len(prompts[groups[-1][0]]) if groups[-1] else 0
        if len(groups[-1]) == PROBES_AT_ONCE or len(prompts[name]) > MOST_PADDING * shortest:
            groups.append([])
        groups[-1].append(name)
    for names in groups[1:]:
        rows = {"input_ids": [prompts[name] for name in names]}
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            made = model.generate(
                **batch,
                max_new_tokens=CONTINUATION_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=tokenizer.eos_token_id,
            )[:, batch["input_ids"].shape[1] :].tolist()
        for name, row in zip(names, made, strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found[name] = row[:end]
    return found


def _logits(model: Any, ids: list[int], first: int) -> Any:
    """(tokens from `first` on and one, vocabulary) float32 logits of each of them and of what follows the last."""
    import torch

    with torch.inference_mode():
        asked = torch.tensor([ids], device=model.device)
        return model(asked, logits_to_keep=len(ids) - first + 1).logits[0].float().cpu()


def _loss(model: Any, ids: list[int], first: int) -> float:
    """Negative log-likelihood of the tokens from `first` on, summed, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    return float(cross_entropy(_logits(model, ids, first)[:-1], torch.tensor(ids[first:]), reduction="sum"))


def _start_of_last_answer(labels: list[int]) -> int:
    """Index of the first token of the last supervised stretch that reaches the end; the row is cut after it."""
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    while last > 0 and labels[last - 1] != IGNORED:
        last -= 1
    return last


def _examples(tokenizer: Any, rows: list[dict[str, Any]], knobs: Train) -> Iterator[Example]:
    """The rows as training read them; what it left out, as `train.on_template_error` wishes, is left out here."""
    for row in rows:
        with suppress(UserError):
            yield from row_examples(tokenizer, row, knobs.max_length, knobs.supervise)


if __name__ == "__main__":
    command("reference", reference)
