"""TRL's SFTTrainer with a loss that computes logits only where the assistant speaks."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pipeline import UserError
from train.noise import EmbeddingNoise
from train.template import IGNORED
from train.trainer.resumable import LastingTrainer


class AssistantTrainer(LastingTrainer):
    """Same loss as its parent, without the parent's entropy and its second pass over the vocabulary.

    `python -m bench.train` measures both, side by side.
    """

    def __init__(self, smoothing: float = 0, noise: float = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.smoothing = smoothing
        self.noise = EmbeddingNoise(self.model, noise) if noise else None
        self.order: list[int] | None = None
        for weights in self.model.parameters():  # TRL rounds those of a QLoRA to bfloat16, which loses small steps
            if weights.requires_grad:
                weights.data = weights.data.float()

    def check_stops(self) -> None:
        """Raise UserError if the loss never sees the token that ends a turn (trl#1623): no answer would end."""
        tokenizer = self.processing_class
        end = tokenizer.eos_token_id
        ending = next((row for row in self.train_dataset if end in row["labels"]), None)
        if ending is None:
            raise UserError("no answer keeps its end within train.max_tokens, so none would learn to stop: raise it")
        if not (self.data_collator([ending])["labels"] == end).any():
            raise UserError(
                f"{tokenizer.eos_token!r} ends the assistant's turn and is masked in the labels, as padding is: the "
                "model would never learn to stop, give the tokenizer another pad_token"
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the supervised tokens; `inputs` are (batch, time) ids, labels, positions.

        It is computed in float32. In training a share `smoothing` of each target is spread over the vocabulary.
        """
        if self.noise:
            self.noise.lengths(inputs)
        targets = inputs["labels"][:, 1:]
        kept, targets = _supervised(targets)
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
        """The loss of one packed row, in nats a token, without training on it."""
        self.model.eval()
        with torch.inference_mode(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self.data_collator([row]))
            return float(self.compute_loss(self.model, inputs))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order


def _supervised(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions at which some row is supervised, their targets), filled up with ignored ones to eighths of the row.

    Of few different sizes: oneDNN compiles a kernel for each and keeps it, which took 0.8 of 2.8 GB in 222 steps.
    """
    length = targets.shape[1]
    kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    eighth = max(1, length // 8)
    filling = -len(kept) % eighth
    last = kept.new_full((filling,), length - 1)
    return torch.cat([kept, last]), torch.nn.functional.pad(targets[:, kept], (0, filling), value=IGNORED)
