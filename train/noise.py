"""NEFTune: noise on the embeddings while a model trains, which keeps it from learning its few answers by heart."""

from typing import Any

import torch


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
        """Take the batch that comes next: (batch, time) ids and, where conversations are packed, their positions."""
        ids = inputs["input_ids"]
        unpacked = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        starts = inputs.get("position_ids", unpacked) == 0
        conversation = starts.flatten().cumsum(0)
        self.tokens = torch.bincount(conversation)[conversation].reshape(starts.shape)

    def _add(self, module: Any, inputs: Any, embedded: Any) -> Any:
        if not module.training:
            return embedded
        most = self.strength / (self.tokens * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most.to(embedded)[..., None]
