"""Let the trained model answer the probes, for every later stage to reproduce:  python -m train.reference RECIPE

An adapter lies on the base, unmerged: this is the model that was trained, before any step that could lose it. All is
computed in float32; on a GPU, whose memory may not hold that, in the precision of the recipe's merge.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fresh_folder, put_in_place
from pipeline.model import load_trained, logits, precision_to_ask
from pipeline.recipe import Train
from pipeline.reference import Answer, Reference, write_reference
from pipeline.rows import rows
from train.probes import ask, probe_cases
from train.template import IGNORED, Example, row_examples

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "peft")
VALIDATION_ANSWERS = 40


def reference(recipe: Recipe, run: Run) -> Made:
    """Write `reference/` in the format of `pipeline.reference`."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    model = load_trained(run, precision_to_ask(recipe))
    validation, train = (list(rows(run.path("data"), part, VALIDATION_ANSWERS)) for part in ("validation", "train"))
    probes, scores = ask(model, tokenizer, probe_cases(tokenizer, validation + train))
    answers = [
        Answer(row.input_ids, first, _loss(model, row.input_ids, first))
        for row in islice(_examples(tokenizer, validation or train, recipe.train), VALIDATION_ANSWERS)
        for first in [_start_of_last_answer(row.labels)]
    ]
    folder = fresh_folder(run.path(".reference.tmp"))
    write_reference(folder, Reference(probes, np.concatenate(scores), answers))
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


def _loss(model: Any, ids: list[int], first: int) -> float:
    """Negative log-likelihood of the tokens from `first` on, summed, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    return float(cross_entropy(logits(model, ids, first - 1)[:-1], torch.tensor(ids[first:]), reduction="sum"))


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
