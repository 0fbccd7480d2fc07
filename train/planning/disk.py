"""Whether the disk holds what the line will write, asked before anything is trained."""

import shutil
from pathlib import Path

from pipeline import Recipe, UserError
from pipeline.files import files_below
from pipeline.recipe import QUANTIZATIONS
from train.planning.memory import checkpoint_bytes

BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0}
MARGIN = 1.1  # tensors that a quantization cannot take are written in wider types


def needed_bytes(recipe: Recipe, parameters: int, trained: int = 0) -> dict[str, int]:
    """Bytes that merged weights, full GGUF and each quantization will take, by name; with `trained` weights also those
    of the base and of the checkpoints, two that are kept and one that is being written.

    Whole weights that were trained are kept in float32, and the merge links them if it has that precision.
    """
    whole = recipe.train.tuner == "full"
    needed = {"trained": 4.0 * parameters} if whole else {}
    if not whole or recipe.merge.precision != "float32":
        needed["merged"] = BYTES_A_WEIGHT[recipe.merge.precision] * parameters
    needed |= {type: QUANTIZATIONS[type] / 8 * parameters for type in recipe.gguf.written}
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
    """Raise UserError if merge, GGUF and quantizations will not fit, nor checkpoints if they are of whole weights."""
    needed = needed_bytes(recipe, parameters, parameters if recipe.train.tuner == "full" else 0)
    needed.pop("base", None)
    there = sum(file.stat().st_size for file in files_below(folder / "checkpoints")) if "checkpoints" in needed else 0
    missing = sum(needed.values()) - there - shutil.disk_usage(folder).free
    if missing > 0:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        raise UserError(
            f"the disk of {folder} lacks {missing / 1e9:.1f} GB for training and what follows ({parts}): "
            "free some space or name fewer gguf.types"
        )
