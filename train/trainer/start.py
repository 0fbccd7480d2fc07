"""The model as it was at the start of a training, with which preference methods compare what it has become."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl.trainer.utils
from peft.tuners.tuners_utils import BaseTunerLayer

from pipeline import Recipe, Run, UserError
from train.tuners import base_to_train


def frozen_copy(recipe: Recipe, run: Run, model: Any) -> Any:
    """A second model, where the trained one cannot be what it was: its weights, or tokens that were added, are trained.

    None where the adapter switched off is the start exactly.

    Raises:
        UserError: the adapter changes the output layer, which TRL's fused losses would neither see nor train.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        why = f"train.lora.targets has the output layer, which {recipe.train.method} does not train"
        raise UserError(f"{why}: name other layers")
    adapters = getattr(model, "peft_config", {})
    tokens = any(config.trainable_token_indices for config in adapters.values())
    if not (tokens or recipe.train.needs_copy(recipe.train.tuner)):
        return None
    return base_to_train(recipe, run).requires_grad_(False).eval()


def drop_second_adapter(model: Any) -> None:
    """Remove the copy that TRL makes of an adapter, as if it were trained already: switched off it is the start."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")


def score_only_labels() -> None:
    """Have TRL's fused output layer take the labelled tokens alone on every device, as it does on CUDA (trl.kernels).

    Where compilers want one shape it takes all tokens; here none compiles, and prompts and padding are most of a batch.
    """
    trl.trainer.utils._use_triton = lambda device: True


def is_held(trainer: Any) -> bool:
    """Whether the start can be asked: not that of whole weights whose log-probabilities are precomputed."""
    return trainer.ref_model is not None or hasattr(trainer.model, "peft_config")


@contextmanager
def start(trainer: Any) -> Iterator[Any]:
    """The model at the start."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        yield trainer.model
