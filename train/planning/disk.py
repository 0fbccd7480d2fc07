"""Whether the disk holds what the line will write, asked before anything is trained."""

import shutil
from pathlib import Path

from pipeline import Recipe, UserError
from pipeline.recipe import QUANTIZATIONS
from train.planning.memory import checkpoint_bytes

BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0}
MARGIN = 1.1  # tensors that a quantization cannot take are written in wider types


def needed_bytes(recipe: Recipe, parameters: int, trained: int = 0) -> dict[str, int]:
    """Bytes that merged weights, full GGUF and each quantization will take, by name; with `trained` weights also those
    of the base and of the checkpoints, two that are kept and one that is being written."""
    types = (recipe.gguf.full, *(type for type in recipe.gguf.types if type != recipe.gguf.full))
    needed = {"merged": BYTES_A_WEIGHT[recipe.merge.precision] * parameters}
    needed |= {type: QUANTIZATIONS[type] / 8 * parameters for type in types}
    needed = {name: size * MARGIN for name, size in needed.items()}
    if trained:
        base = 2.0 if "/" in recipe.base_model and not Path(recipe.base_model).exists() else 4.0
        needed = {
            "base": base * parameters,
            "checkpoints": 3 * checkpoint_bytes(parameters, trained, recipe.train.tuner, 4),
            **needed,
        }
    return {name: int(size) for name, size in needed.items()}


def check_disk(recipe: Recipe, parameters: int, folder: Path) -> None:
    """Raise UserError if merge, GGUF and quantizations will not fit beside what is there already."""
    needed = needed_bytes(recipe, parameters)
    missing = sum(needed.values()) - shutil.disk_usage(folder).free
    if missing > 0:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        raise UserError(
            f"the disk of {folder} lacks {missing / 1e9:.1f} GB for what follows training ({parts}): "
            "free some space or name fewer gguf.types"
        )
