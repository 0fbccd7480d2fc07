"""Supervised fine-tuning: the loss is of the assistant's words alone.

TRL packs conversations into rows, where each has positions of its own and attends only to itself; where the base does
not keep them apart, each is a row (`train.packing`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from pipeline import Recipe, Run, UserError
from pipeline.files import write_whole
from pipeline.progress import progress
from pipeline.recipe import Train
from train.attention import attend_apart
from train.packing import layout_of, learned_positions, padded_to
from train.template import IGNORED, Example, batch_examples
from train.tokens import lengths, longest_and_sum, row_tokens
from train.trainer.resumable import Resumable, settings

__all__ = ["Example", "Sft", "columns", "measure", "trainer"]
columns = batch_examples


def trainer(
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    model: Any,
    rows: dict[str, Any],
    trackers: Sequence[str] = (),
    **resumable: Any,
) -> "Sft":
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of ids and labels.

    Raises:
        UserError: no answer's end is learned, or conversations are to be packed of which the base makes others.
    """
    validation = rows["validation"] if len(rows["validation"]) else None
    args = SFTConfig(**settings(recipe, run, validation is not None, trackers))  # several processes can speak now
    attend_apart(model)
    found, (longest, total) = layout_of(recipe, run, model, rows["train"]), longest_and_sum(rows.values())
    args.packing = found.packed
    args.max_length = row_tokens(longest, total, recipe.train.max_length) if found.packed else longest
    args.pad_to_multiple_of = padded_to(found.packed, args.max_length, recipe.train.batch_size)
    # What TRL does to rows that are not packed is done: they are cut, and none is without a label.
    args.dataset_kwargs = None if found.packed else {"skip_prepare_dataset": True}
    made = Sft(
        knobs=recipe.train,
        layout=found,
        order=run.path("checkpoints", "order.json"),
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=validation,
        **resumable,
    )
    made.check_stops()
    return made


def measure(trainer: "Sft", recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """Nothing beside what is measured of every method (train.worker)."""
    return {}


class Sft(Resumable, SFTTrainer):  # type: ignore[misc]
    """Same loss as its parent, without the parent's entropy and its second pass over the vocabulary.

    `python -m bench.train` measures both, side by side.
    """

    def __init__(self, knobs: Train, order: Path | None = None, **kwargs: Any) -> None:
        super().__init__(knobs=knobs, **kwargs)
        self.smoothing = knobs.label_smoothing
        self.noise = EmbeddingNoise(self.model, knobs.neftune) if knobs.neftune else None
        self.order = None if knobs.order == "random" else self._curriculum(knobs.order, order)

    def check_stops(self) -> None:
        """Raise UserError if the loss never sees the token that ends a turn (trl#1623): no answer would end."""
        tokenizer = self.processing_class
        end = tokenizer.eos_token_id
        ending = next((row for row in self.train_dataset if end in row["labels"]), None)
        if ending is None:
            raise UserError("no answer keeps its end within train.max_length, so none would learn to stop: raise it")
        if not (self.data_collator([ending])["labels"] == end).any():
            raise UserError(
                f"{tokenizer.eos_token!r} ends the assistant's turn and is masked in the labels, as padding is: the "
                "model would never learn to stop, give the tokenizer another pad_token"
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the supervised tokens; `inputs` are (batch, time) ids and labels, with
        positions where rows are packed, else with the attention mask.

        It is computed in float32. In training a share `smoothing` of each target is spread over the vocabulary.
        """
        if self.noise:
            self.noise.lengths(inputs)
        targets = inputs["labels"][:, 1:]
        kept, targets = learned_positions(targets)
        fields = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**fields, use_cache=False, logits_to_keep=kept)
        logits, targets = outputs.logits.flatten(0, 1).float(), targets.flatten()
        smoothing = self.smoothing if model.training else 0.0
        loss = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        supervised = (targets != IGNORED).sum()
        count = supervised if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is of all ranks
        return (loss, outputs) if return_outputs else loss

    def row_loss(self, row: dict[str, Any]) -> float:
        """The loss of one row, in nats a token, without training on it."""
        self.model.eval()
        with torch.inference_mode(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self.data_collator([row]))
            return float(self.compute_loss(self.model, inputs))

    def _curriculum(self, order: str, kept: Path | None) -> list[int]:
        """Indexes of the rows, easiest first, the same in every epoch.

        `short_first` goes by the mean length of a row's conversations; `easy_first` by its loss before training, which
        takes one pass over the data. Best-fit packing puts conversations of like length together, so rows differ.
        A training that resumes takes the order in `kept`: where losses are nearly equal, another number of cores or a
        GPU may sort them otherwise.
        """
        if kept and kept.is_file():
            found: list[int] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        rows = self.train_dataset
        if order == "short_first":
            hardness = (
                [sum(row) / len(row) for row in rows["seq_lengths"]] if self.args.packing else list(lengths(rows))
            )
        else:
            hardness = []
            with progress("loss under the base", len(rows), "rows") as tell:
                for row in rows:
                    hardness.append(self.row_loss(row))
                    tell(len(hardness))
        indexes = sorted(range(len(rows)), key=hardness.__getitem__)
        if kept:
            write_whole(kept, json.dumps(indexes))
        return indexes

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order


class EmbeddingNoise:
    """Adds uniform noise of at most `strength / sqrt(tokens x width)` to the embeddings in training.

    The tokens are those of the conversation, as in the paper (https://arxiv.org/abs/2310.05914); transformers' own
    takes those of the packed row, which weakens the noise by the root of the number of conversations in it.
    """

    def __init__(self, model: Any, strength: float) -> None:
        self.strength = strength
        self.tokens = torch.empty(0)
        model.get_input_embeddings().register_forward_hook(self._add)

    def lengths(self, inputs: dict[str, Any]) -> None:
        """Take the batch that comes next: (batch, time) ids with the attention mask or, of packed ones, positions."""
        if "attention_mask" in inputs:
            self.tokens = inputs["attention_mask"].sum(1, keepdim=True).expand_as(inputs["input_ids"])
            return
        starts = inputs["position_ids"] == 0
        conversation = starts.flatten().cumsum(0)
        self.tokens = torch.bincount(conversation)[conversation].reshape(starts.shape)

    def _add(self, module: Any, inputs: Any, embedded: Any) -> Any:
        if not module.training:
            return embedded
        most = self.strength / (self.tokens * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most.to(embedded)[..., None]
