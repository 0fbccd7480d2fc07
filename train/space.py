"""Whether the disk holds what the line will write, asked before anything is trained."""

import shutil
from pathlib import Path

from recipe import Recipe, UserError
from recipe.schema import QUANTIZATIONS

BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0}
MARGIN = 1.1  # tensors that a quantization cannot take are written in wider types


def needed_bytes(recipe: Recipe, parameters: int) -> dict[str, int]:
    """Bytes that merged weights, full GGUF and each quantization will take, by name."""
    types = (recipe.gguf.full, *(type for type in recipe.gguf.types if type != recipe.gguf.full))
    needed = {"merged": BYTES_A_WEIGHT[recipe.merge.precision] * parameters}
    needed |= {type: QUANTIZATIONS[type] / 8 * parameters for type in types}
    return {name: int(size * MARGIN) for name, size in needed.items()}


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
