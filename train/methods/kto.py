"""KTO: good answers become likelier than they were and bad ones less likely, each judged by itself.

The loss is TRL's, of arXiv 2402.01306. What an answer gains counts beside what answers to other questions gain: each
batch pairs its prompts with the answers of their neighbours, so it needs two rows.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer

from pipeline import Recipe, Run
from train.packing import layout_of, padded, padded_to
from train.preferences import Judgement, judgements
from train.scoring.preference import (
    ANSWERS,
    drop_second_adapter,
    frozen_copy,
    measured,
    score_only_labels,
    scores_of_judgements,
)
from train.template import IGNORED
from train.tokens import longest_and_sum
from train.trainer.resumable import Resumable, settings

Example = Judgement
columns = judgements


def trainer(
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    model: Any,
    rows: dict[str, Any],
    trackers: Sequence[str] = (),
    **resumable: Any,
) -> "Kto":
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of `Judgement`.

    Raises:
        UserError: of `frozen_copy`.
    """
    knobs, validation = recipe.train.kto, rows["validation"] if len(rows["validation"]) else None
    longest, _ = longest_and_sum(rows.values())
    args = KTOConfig(
        **settings(recipe, run, validation is not None, trackers),
        beta=knobs.beta,
        loss_type=knobs.loss_type,
        desirable_weight=knobs.good_weight,
        undesirable_weight=knobs.bad_weight,
        max_length=longest,
        remove_unused_columns=False,
    )
    return Kto(
        knobs=recipe.train,
        layout=layout_of(recipe, run, model, rows["train"]),
        model=model,
        ref_model=frozen_copy(recipe, run, model),
        args=args,
        data_collator=Neighbours(tokenizer.pad_token_id or 0, padded_to(False, longest), longest),
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=validation,
        **resumable,
    )


def measure(trainer: "Kto", recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """Of train.scoring.preference, of held-out answers."""
    scores = partial(scores_of_judgements, beta=recipe.train.kto.beta, seed=recipe.seed)
    return measured(trainer, before, ANSWERS, scores)


class Kto(Resumable, KTOTrainer):  # type: ignore[misc]
    """TRL's, over columns that are made already and in a new order each epoch, and that lasts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        drop_second_adapter(self.model)
        score_only_labels()
        # TRL pairs neighbours before training, and so wants them in the file's order; here the batch itself is paired.
        self.args.train_sampling_strategy = "random"

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class Neighbours:
    """A batch of judged answers, padded (train.packing), and `KL_...`: each prompt with the row before's answer."""

    def __init__(self, padding: int, multiple: int, longest: int) -> None:
        self.padding, self.multiple, self.longest = padding, multiple, longest

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        spans = [_answer(row["labels"]) for row in rows]
        others = [(rows[index - 1], spans[index - 1]) for index in range(len(rows))]
        swapped = []
        for row, (first, _), (other, span) in zip(rows, spans, others, strict=True):
            prompt = row["input_ids"][:first]
            ids, labels = (other[name][slice(*span)] for name in ("input_ids", "labels"))
            swapped.append(((prompt + ids)[: self.longest], ([IGNORED] * first + labels)[: self.longest]))
        own, neighbours = (
            padded(each, self.padding, self.multiple)
            for each in ([(row["input_ids"], row["labels"]) for row in rows], swapped)
        )
        label = torch.tensor([bool(row["good"][0]) for row in rows])
        return own | {f"KL_{name}": values for name, values in neighbours.items()} | {"label": label}


def _answer(labels: list[int]) -> tuple[int, int]:
    """From and to where the judged answer reaches."""
    places = [index for index, label in enumerate(labels) if label != IGNORED]
    return places[0], places[-1] + 1
