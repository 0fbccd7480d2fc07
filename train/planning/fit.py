"""Whether a training fits the machine, and the fewest changes with which it does; asked before weights are loaded."""

import dataclasses
import logging
import os

from pipeline import Recipe, Run, UserError
from pipeline.recipe import Plan
from pipeline.units import size
from train.planning.corpus import counted
from train.planning.devices import DEVICES
from train.planning.prediction import (
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

log = logging.getLogger("truetune")


def check(recipe: Recipe, run: Run, counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """What this training will take, for its receipt; before weights are loaded. `counts` are of train.tokens.

    Raises:
        UserError: it does not fit this machine, unless FORCE=1 says to try.
    """
    of, at = job(recipe, run, counted(counts, recipe)), place(_of_this_machine(recipe))
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
    mend = f"SET='{' '.join(changes)}' fits" if changes else f"a base of at most {_weights(largest_base(of, at))} fits"
    rent = next((name for name in by_price() if devices_needed(of, of.recipe, name, most=1)), "")
    where = f", or plan.gpu={rent}" if rent and rent != of.recipe.plan.gpu else ""
    return f"training needs {size(needed)} a device, {at.name} has {size(at.memory)}: {mend}{where}"


def _of_this_machine(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, plan=Plan(efficiency=recipe.plan.efficiency, tokens=recipe.plan.tokens))


def by_price() -> list[str]:
    """Those that are rented."""
    return sorted((name for name in DEVICES if DEVICES[name].price[0]), key=lambda name: DEVICES[name].price[0])


def _weights(count: int) -> str:
    return f"{count / 1e9:.3g} billion weights" if count >= 1e9 else f"{count / 1e6:.3g} million weights"
