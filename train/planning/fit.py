"""Whether a training fits the machine and its disk, and the fewest changes with which it does, before it starts."""

import dataclasses
import logging
import os
import shutil
from pathlib import Path

from pipeline import Recipe, Run, UserError
from pipeline.files import files_below
from pipeline.recipe import QUANTIZATIONS, Plan
from pipeline.units import size
from train.planning.architecture import checkpoint_bytes
from train.planning.prediction import (
    DEVICES,
    Job,
    Place,
    devices_needed,
    fitting,
    job,
    largest_base,
    memory_bytes,
    place,
    predicted,
)

BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0}
MARGIN = 1.1  # tensors that a quantization cannot take are written in wider types

log = logging.getLogger("truetune")


def check(recipe: Recipe, run: Run, counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """What this training will take, for its receipt; before weights are loaded. `counts` are of train.tokens.

    Raises:
        UserError: it does not fit this machine, unless FORCE=1 says to try.
    """
    of, at = job(recipe, run, counts), place(_of_this_machine(recipe))
    if problem := impossible(of, at):
        if os.environ.get("FORCE") != "1":
            raise UserError(f"{problem}; FORCE=1 tries it all the same")
        log.warning("WARNING: %s (FORCE=1)", problem)
    return predicted(of, at, run)


def advice(recipe: Recipe, run: Run) -> str:
    """What to change when a training ran out of memory, though it was planned to fit: `key=value` and what it saves."""
    of, at = job(recipe, run), place(_of_this_machine(recipe))
    needed = sum(memory_bytes(of, at).values())
    tight = Place(**{**vars(at), "memory": min(at.memory, 0.8 * needed)})
    changes = fitting(of, tight)
    if changes:
        return f"set {' '.join(changes)}: planned with {size(needed)}, with that it has at most {size(tight.memory)}"
    return f"use a base of at most {_weights(largest_base(of, tight))}, this one has {_weights(of.base.parameters)}"


def impossible(of: Job, at: Place) -> str:
    """Why the training cannot run there and what would, or nothing."""
    needed = sum(memory_bytes(of, at).values())
    if needed <= at.memory:
        return ""
    changes = fitting(of, at)
    fix = f"SET='{' '.join(changes)}' fits" if changes else f"a base of at most {_weights(largest_base(of, at))} fits"
    rent = next((name for name in by_price() if devices_needed(of, of.recipe, name, most=1)), "")
    where = f", or plan.gpu={rent}" if rent and rent != of.recipe.plan.gpu else ""
    return f"training needs {size(needed)} a device, {at.name} has {size(at.memory)}: {fix}{where}"


def _of_this_machine(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, plan=Plan(efficiency=recipe.plan.efficiency, tokens=recipe.plan.tokens))


def by_price() -> list[str]:
    """Those that are rented."""
    return sorted((name for name in DEVICES if DEVICES[name].price[0]), key=lambda name: DEVICES[name].price[0])


def _weights(count: int) -> str:
    return f"{count / 1e9:.3g} billion weights" if count >= 1e9 else f"{count / 1e6:.3g} million weights"


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
