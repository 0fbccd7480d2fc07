"""Direct preference optimization: of two answers the better one becomes likelier than it was, beside the worse one.

The losses are TRL's. They compare the model with what it was at the start: the adapter switched off, where that is the
start exactly, else a second, frozen copy (arXiv 2305.18290).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from trl import DPOConfig, DPOTrainer

from pipeline import Recipe, Run
from train.packing import Sides, layout_of, padded_to
from train.preferences import Pair, pairs
from train.scoring.preference import (
    PAIRS,
    drop_second_adapter,
    frozen_copy,
    measured,
    score_only_labels,
    scores_of_pairs,
)
from train.tokens import longest_and_sum
from train.trainer.resumable import Resumable, settings

Example = Pair
columns = pairs


def trainer(
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    model: Any,
    rows: dict[str, Any],
    trackers: Sequence[str] = (),
    **resumable: Any,
) -> "Dpo":
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of `Pair`.

    Raises:
        UserError: of `frozen_copy`.
    """
    knobs, validation = recipe.train.dpo, rows["validation"] if len(rows["validation"]) else None
    longest, _ = longest_and_sum(rows.values())
    args = DPOConfig(
        **settings(recipe, run, validation is not None, trackers),
        beta=knobs.beta,
        loss_type=list(knobs.loss_type),
        loss_weights=list(knobs.loss_weights) or None,
        label_smoothing=knobs.label_smoothing,
        precompute_ref_log_probs=knobs.precompute,
        max_length=longest,
        remove_unused_columns=False,
    )
    return Dpo(
        knobs=recipe.train,
        layout=layout_of(recipe, run, model, rows["train"]),
        model=model,
        ref_model=frozen_copy(recipe, run, model),
        args=args,
        data_collator=Sides(tokenizer.pad_token_id or 0, padded_to(False, longest)),
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=validation,
        **resumable,
    )


def measure(trainer: "Dpo", recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """Of train.scoring.preference, of held-out pairs."""
    scores = partial(scores_of_pairs, beta=recipe.train.dpo.beta, seed=recipe.seed)
    return measured(trainer, before, PAIRS, scores)


class Dpo(Resumable, DPOTrainer):  # type: ignore[misc]
    """TRL's, over columns that are made already, and that lasts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        drop_second_adapter(self.model)
        score_only_labels()

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset
