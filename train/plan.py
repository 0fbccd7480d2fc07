"""Tell what a training takes before anything is downloaded:  python -m train.plan RECIPE

Memory, disk, time, energy and price, what fits this machine and which GPU would do.
"""

import shutil
import sys
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.command import boundary
from pipeline.load import environment_overrides, load
from pipeline.units import duration, number, size
from train.config import read_config
from train.inspection import refuse
from train.planning.architecture import STEP_TUNERS, cache_bytes
from train.planning.prediction import (
    PRICED,
    Job,
    Place,
    by_price,
    devices_needed,
    fitting,
    flops,
    impossible,
    job,
    memory_bytes,
    needed_bytes,
    place,
    tokens_per_second,
)

RENTED_SHOWN = 6


def plan(recipe: Recipe, run: Run) -> tuple[str, str]:
    """(the page, why the training cannot run or nothing); nothing is downloaded but the config of a Hub id.

    Raises:
        UserError: base or data cannot be read, base and recipe do not go together, or no such GPU.
    """
    refuse(recipe, read_config(recipe, run))
    of, at = job(recipe, run), place(recipe)
    sections = [_model(of), _memory(of, at), _disk(of, at), _time(of, at, run), _serving(of), _rent(of)]
    problem = impossible(of, at) or ("" if recipe.plan.gpu else _no_disk(of, at))
    return "\n\n".join(section for section in sections if section), problem


def _model(of: Job) -> str:
    base = of.base
    active = ""
    if base.active != base.parameters:
        multiplied = number(base.active - base.looked_up)
        active = f", of which a token meets {number(base.active)} ({multiplied} without the embedding)"
    return (
        f"{of.recipe.base_model}: {number(base.parameters)} weights{active}, {base.depth} layers of {base.width}\n"
        f"data: {number(of.data.tokens)} tokens an epoch by {of.data.told}, rows of {of.row(of.recipe.train)}, "
        f"{of.data.supervised:.0%} of them learned\n"
        f"rows: {'packed' if of.layout.packed else 'padded, a conversation each'}: {of.layout.why}"
    )


def _memory(of: Job, at: Place) -> str:
    """A column for each way to tune; the recipe's has a star."""
    tuner = of.recipe.train.tuner
    tuners = STEP_TUNERS if tuner in STEP_TUNERS else (*STEP_TUNERS, tuner)
    columns = {each: memory_bytes(of, at, each) for each in tuners}
    heads = [f"{each} *" if each == tuner else each for each in tuners]
    rows = [[part, *(size(columns[each][part]) for each in tuners)] for part in columns[tuners[0]]]
    totals = [sum(column.values()) for column in columns.values()]
    rows += [
        ["together", *map(size, totals)],
        [f"fits {size(at.memory)}", *("yes" if total <= at.memory else "no" for total in totals)],
    ]
    spread = f" x {at.devices}, {of.recipe.launch.strategy}" if at.devices > 1 else ""
    seconds = of.data.tokens * of.recipe.train.epochs / tokens_per_second(of, at)[0]
    rows.append(["time", *(duration(seconds * flops(of, at, each) / flops(of, at)) for each in tuners)])
    told = [f"memory of a step on {at.name}{spread}, {at.precision}", table(["", *heads], rows)]
    if "qlora" in tuners and of.base.experts:
        told.append(f"qlora keeps {number(of.base.experts)} weights of experts in 16 bits: bitsandbytes leaves them")
    total = sum(memory_bytes(of, at).values())
    if total > at.memory and (changes := fitting(of, at)):
        told.append(f"to fit: make train SET='{' '.join(changes)}'")
    return "\n".join(told)


def _disk(of: Job, at: Place) -> str:
    needed = _on_disk(of, at)
    parts = ", ".join(f"{name} {size(bytes)}" for name, bytes in needed.items())
    return f"disk: {size(sum(needed.values()))}, {size(shutil.disk_usage('.').free)} are free here ({parts})"


def _no_disk(of: Job, at: Place) -> str:
    missing = sum(_on_disk(of, at).values()) - shutil.disk_usage(".").free
    return f"the disk lacks {size(missing)}: free some space or name fewer gguf.types" if missing > 0 else ""


def _on_disk(of: Job, at: Place) -> dict[str, int]:
    trained = of.rehearsal(at, of.recipe.train.tuner, of.recipe.train).trained
    return needed_bytes(of.recipe, of.base.parameters, trained)


def _time(of: Job, at: Place, run: Run) -> str:
    speed, told = tokens_per_second(of, at, run)
    tokens = of.data.tokens * of.recipe.train.epochs
    seconds = tokens / speed
    lines = f"time: {duration(seconds)} for {number(round(tokens))} tokens, {number(round(speed))} a second ({told})"
    return f"{lines}\nenergy: {_energy(at, seconds)} at {at.watts:g} W a device{_cost(at, seconds)}"


def _energy(at: Place, seconds: float) -> str:
    hours = at.watts * at.devices * seconds / 3600
    return f"{number(hours / 1000)} kWh" if hours >= 100 else f"{number(hours)} Wh"


def _cost(at: Place, seconds: float) -> str:
    hours = seconds / 3600 * at.devices
    low, high = (hours * price for price in at.price)
    if high < 0.01:
        return ", less than 0.01 USD" if high else ""
    return f", {low:.2f} USD" if low == high else f", {low:.2f} to {high:.2f} USD"


def _serving(of: Job) -> str:
    serve = of.recipe.serve
    served = of.recipe.served_type or "merged"
    weights = needed_bytes(of.recipe, of.base.parameters)[served]
    whole = served == "Q8_0" if serve.repeatable is None else serve.repeatable
    cache = serve.slots * cache_bytes(of.config, serve.context, whole=whole)
    told = f"{serve.slots} conversations of {serve.context} tokens"
    return f"serving: {size(weights + cache)}: {served} {size(weights)}, cache of {told} {size(cache)}"


def _rent(of: Job) -> str:
    """The cheapest GPUs, by the price of the whole training, that hold it."""
    found = []
    for name in by_price():
        at = devices_needed(of, of.recipe, name)
        if at:
            seconds = of.data.tokens * of.recipe.train.epochs / tokens_per_second(of, at)[0]
            found.append((at.price[0] * at.devices * seconds, at, seconds))
    found.sort(key=lambda row: row[0])
    rows = [
        [
            f"{at.devices} x {at.name}",
            size(at.memory),
            size(sum(memory_bytes(of, at).values())),
            duration(seconds),
            _energy(at, seconds),
            _cost(at, seconds).removeprefix(", "),
        ]
        for _, at, seconds in found[:RENTED_SHOWN]
    ]
    heads = ["GPU", "memory", "needed", "time", "energy", "price"]
    if not rows:
        return f"no 64 of the GPUs that are known hold it by ZeRO stage 3 with rows of {of.row(of.recipe.train)} tokens"
    return f"to rent, by price ({PRICED}, spot to on demand; plan.price sets yours)\n{table(heads, rows)}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left, numbers to the right."""
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [heads, *rows]
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _arguments() -> Any:
    """The recipe with SET, which a plan does not keep for later commands."""
    given = sys.argv[1:]
    if not given or given[0].startswith("-"):
        raise UserError("no recipe given: usage: python -m train.plan RECIPE [key=value ...]")
    overrides = given[1:] or environment_overrides()
    recipe = load(given[0], overrides)
    return recipe if recipe.plan.tokens else load(given[0], overrides, complete=True)  # with tokens no data is read


if __name__ == "__main__":
    with boundary():
        recipe = _arguments()
        page, problem = plan(recipe, Run.of(recipe))
        sys.stdout.write(f"{page}\n")
        sys.stdout.flush()
        if problem:
            raise UserError(problem)
