"""Direct preference optimization: of two answers the better one becomes likelier than it was, beside the worse one.

The losses are TRL's. They compare the model with what it was at the start: the adapter switched off, where that is the
start exactly, else a second, frozen copy (arXiv 2305.18290).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from pipeline import Recipe, Run, UserError
from pipeline.scores import as_rows
from train.packing import layout_of, padded_to
from train.pairs import Pair, pairs
from train.scoring.preference import judged, scores
from train.scoring.questions import asked
from train.template import IGNORED
from train.tokens import longest_and_sum
from train.trainer.resumable import Resumable, settings
from train.tuners import TUNERS, base_to_train

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
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of `train.pairs.Pair`.

    Raises:
        UserError: the adapter changes the output layer, which TRL would not train.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError("train.lora.targets has the output layer, which dpo does not train: name other layers")
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
        ref_model=_copy(recipe, run, model),
        args=args,
        data_collator=Sides(tokenizer.pad_token_id or 0, padded_to(False, longest)),
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=validation,
        **resumable,
    )


def measure(trainer: "Dpo", recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """What is asked after any method, what each held-out pair got and, after training, the scores of all of them."""
    when = "after" if before else "before"
    found = asked(trainer, recipe, run, when)
    if trainer.eval_dataset is None:
        return found
    with trainer.autocast_smart_context_manager():
        start = trainer.start if before and trainer.has_start else None
        found["pairs"] = judged(trainer.model, trainer.eval_dataset, f"held-out pairs, {when}", start)
    if before:
        found["scores"] = as_rows(scores(before["pairs"], found["pairs"], recipe.train.dpo.beta, recipe.seed))
    return found


def _copy(recipe: Recipe, run: Run, model: Any) -> Any:
    """The frozen copy of the start, where the trained model cannot be it: all its weights or its tokens are trained."""
    adapter = TUNERS[recipe.train.tuner].config is not None
    if recipe.train.dpo.precompute or (adapter and not model.peft_config["default"].trainable_token_indices):
        return None
    return base_to_train(recipe, run).requires_grad_(False).eval()


class Dpo(Resumable, DPOTrainer):  # type: ignore[misc]
    """TRL's, over columns that are made already, and that lasts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model: Any
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's copy of an adapter that is only just begun
            self.model.delete_adapter("ref")

    @property
    def has_start(self) -> bool:
        """Whether the model at the start can be asked: not of whole weights whose log-probabilities are precomputed."""
        return self.ref_model is not None or hasattr(self.model, "peft_config")

    @contextmanager
    def start(self) -> Any:
        """The model as it was before training."""
        off: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            off = self.accelerator.unwrap_model(self.model).disable_adapter()
        with off:
            yield self.ref_model or self.model

    def validation_loss(self) -> float | None:
        found = super().validation_loss()
        self._metrics["eval"].clear()  # else they would enter the next validation's
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # of this process alone; ours outlive it
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class Sides:
    """A batch of pairs: the chosen conversations above the rejected ones, (2 x pairs, time), padded on the right.

    `completion_mask` is 1 where an answer's token is compared.
    """

    def __init__(self, padding: int, multiple: int) -> None:
        self.padding, self.multiple = padding, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row[name] for name in ("input_ids", "rejected_input_ids") for row in rows]
        labels = [row[name] for name in ("labels", "rejected_labels") for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.padding),
            "attention_mask": self._padded([[1] * len(side) for side in ids], 0),
            "completion_mask": (self._padded(labels, IGNORED) != IGNORED).long(),
        }
        known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in known}

    def _padded(self, sides: list[list[int]], value: int) -> Any:
        found = pad_sequence([torch.tensor(side) for side in sides], batch_first=True, padding_value=value)
        return torch.nn.functional.pad(found, (0, -found.shape[1] % self.multiple), value=value)
