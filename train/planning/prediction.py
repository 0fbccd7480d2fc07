"""What a training will take on a device: memory, disk, time, energy and price, and with which changes it fits.

The devices are GPUs that one can rent or buy, with their makers' figures, and this machine's processor as measured.
"""

import dataclasses
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pipeline import Recipe, Run, UserError
from pipeline.files import files_below
from pipeline.machine import cores, free_bytes, gpus, machine
from pipeline.methods import METHODS
from pipeline.recipe import QUANTIZATIONS, Plan, Train
from pipeline.units import size
from train.config import read_config
from train.launch import launch
from train.packing import Layout, expected
from train.planning.architecture import (
    Architecture,
    Rehearsal,
    architecture,
    checkpoint_bytes,
    fused,
    rehearse,
    state_bytes,
    token_flops,
    training_flops,
    whole_bytes,
)
from train.planning.corpus import Corpus, corpus, counted, supervised_positions
from train.tuners import TUNERS

GIB = 2**30
# Spot and on-demand prices of RunPod in USD an hour, as deploybase.ai/articles/runpod-gpu-pricing lists them. From
# elsewhere: mi300x (cliffcenter.com/research/amd-inference-economics, May 2026), rtx-6000-ada (benchmarks of
# AnswerDotAI/fsdp_qlora, 2024), and rtx-3060, t4, a10g, a100-40gb and a6000, which are guesses from lists of 2025.
# No price means that it is bought, not rented. They move: plan.price names your own.
PRICED = "March 2026"
# Resident before any weight: Python with torch, transformers and TRL, or CUDA's context with its libraries' buffers.
RUNTIME_BYTES = {"processor": 0.58e9, "gpu": 0.8e9}
NCCL_BYTES = 1e9  # a device's buffers to talk to others: 1 to 2 GiB (ml-engineering, training/performance)
# What the allocators hold beyond the tensors of a step: glibc a quarter (measured), CUDA's caching one a tenth.
HOLES = {"processor": 1.25, "gpu": 1.1}
# Of the peak: published LoRA and full trainings on GPUs reach 0.33 to 0.52; a small model on a processor far less.
EFFICIENCY = {"processor": 0.15, "gpu": 0.35}
WATTS_A_CORE = 10
ZERO = {"ddp": 0, "zero2": 2, "zero3": 3, "fsdp": 3}  # FSDP2 shares what ZeRO stage 3 does
# What 4 bits and DoRA's norms add to a step on a processor: a share of it, and once a step as much as so many tokens.
# Measured on SmolLM2-135M with rows of 128 and 512 tokens: 1.23 and 1.10 times LoRA, and 1.77 and 1.35 times.
BESIDE = {"qlora": (0.06, 22), "dora": (0.21, 72)}
BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0}
MARGIN = 1.1  # tensors that a quantization cannot take are written in wider types

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Device:
    """Peak of dense matrix products in FLOP/s by precision, memory in bytes."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    watts: int
    price: tuple[float, float]


def _gpu(name: str, gib: float, bf16: float, fp32: float, watts: int, low: float = 0, high: float = 0) -> Device:
    return Device(name, int(gib * GIB), bf16 * 1e12, fp32 * 1e12, watts, (low, high))


# Data sheets of NVIDIA and AMD: dense, float32 accumulation. Memory is what the driver reports, a little below what is
# sold. T4 and V100 multiply float16 but no bfloat16 in hardware, so that they train in float32 here.
DEVICES = {
    device.name: device
    for device in (
        _gpu("rtx-4060", 7.6, 30, 15.1, 115),
        _gpu("rtx-3060", 11.7, 51, 12.7, 170, 0.10, 0.20),
        _gpu("rtx-4070", 11.6, 58, 29.1, 200),
        _gpu("rtx-5070", 11.6, 61, 30.9, 250),
        _gpu("t4", 14.6, 8.1, 8.1, 70, 0.35, 0.55),
        _gpu("rtx-4080", 15.6, 97, 48.7, 320),
        _gpu("rtx-5080", 15.6, 112, 56.3, 360),
        _gpu("rtx-3090", 23.6, 71, 35.6, 350, 0.22, 0.39),
        _gpu("rtx-4090", 23.6, 165, 82.6, 450, 0.34, 0.60),
        _gpu("l4", 22.0, 121, 30.3, 72, 0.44, 0.78),
        _gpu("a10g", 22.0, 70, 31.2, 300, 0.75, 1.21),
        _gpu("rtx-5090", 31.4, 209, 104.8, 575, 0.69, 1.22),
        _gpu("v100-32gb", 31.7, 15.7, 15.7, 300),
        _gpu("a100-40gb", 39.4, 312, 19.5, 400, 1.00, 1.80),
        _gpu("a6000", 47.4, 155, 38.7, 300, 0.33, 0.80),
        _gpu("rtx-6000-ada", 47.4, 364, 91.1, 300, 1.14, 1.60),
        _gpu("l40", 44.4, 181, 90.5, 300, 0.69, 1.22),
        _gpu("l40s", 44.4, 362, 91.6, 350, 0.79, 1.40),
        _gpu("a100-80gb", 79.2, 312, 19.5, 400, 1.39, 2.45),
        _gpu("rtx-pro-6000", 94.9, 503, 125, 600, 0.89, 1.57),
        _gpu("h100-pcie", 79.2, 756, 51, 350, 1.99, 3.51),
        _gpu("h100-80gb", 79.2, 989, 67, 700, 2.69, 4.76),
        _gpu("h200", 139.8, 989, 67, 700, 3.59, 6.35),
        _gpu("mi300x", 191.7, 1307, 163.4, 750, 1.50, 1.99),
        _gpu("b200", 178.0, 2250, 80, 1000, 5.98, 10.57),
    )
}


def like(name: str, memory: int) -> tuple[Device, bool]:
    """The device that a driver calls `name`, else one with as much memory; and whether it is known by its name."""
    words = name.lower().replace("-", " ").split()
    parts = {each: [part for part in each.split("-") if not part.endswith("gb")] for each in DEVICES}
    known = [each for each in DEVICES if all(part in words for part in parts[each])]
    found = max(
        known or DEVICES, key=lambda each: (len(parts[each]) * bool(known), -abs(DEVICES[each].memory - memory))
    )
    return DEVICES[found], bool(known)


def processor_peak(precision: str) -> float:
    """FLOP/s of this machine's free processor in a matrix product of a layer's size, from 0.3 s of its time."""
    import time

    import torch

    size = 1024
    left, right = (torch.ones(size, size, dtype=getattr(torch, precision)) for _ in range(2))
    fastest, left_seconds = float("inf"), 0.3
    while left_seconds > 0:
        start = time.process_time()  # not the clock's: other programs may run
        left @ right
        spent = time.process_time() - start
        fastest, left_seconds = min(fastest, spent), left_seconds - spent
    return 2.0 * size**3 / fastest * torch.get_num_threads()


@dataclass(frozen=True)
class Place:
    """Where a training runs: one kind of device, its memory in bytes, and what it multiplies fast."""

    name: str
    kind: str  # processor or gpu
    memory: float
    precision: str
    peak: float
    watts: float
    price: tuple[float, float]
    devices: int = 1
    zero: int = 0
    known: bool = True  # whether the peak is this device's own and not that of one like it


@dataclass
class Job:
    """A recipe with what its base, its data and its rows are."""

    recipe: Recipe
    config: Any
    base: Architecture
    data: Corpus
    layout: Layout
    rehearsed: dict[Any, Rehearsal] = field(default_factory=dict)

    def row(self, knobs: Train) -> int:
        return min(self.data.row, knobs.max_length)

    def rehearsal(self, place: Place, tuner: str, knobs: Train) -> Rehearsal:
        tokens = METHODS[knobs.method].sequences * knobs.batch_size * self.row(knobs)
        width = "float32" if place.kind == "processor" else place.precision
        supervised = supervised_positions(tokens, self.data.supervised)
        fast = place.precision == "bfloat16"
        config = TUNERS[tuner].config
        key = (
            "full" if config is None else (*config, knobs.lora),
            tokens,
            supervised,
            fast,
            width,
            knobs.gradient_checkpointing,
        )
        if key not in self.rehearsed:
            knobs = dataclasses.replace(knobs, tuner=cast(Any, tuner))
            adapted = None if config is None else dataclasses.replace(self.recipe, train=knobs)
            model = self.config if place.kind == "processor" else fused(self.config)
            self.rehearsed[key] = rehearse(model, adapted, *key[1:])
        return self.rehearsed[key]


def job(recipe: Recipe, run: Run, counts: dict[str, dict[str, int]] | None = None) -> Job:
    """Reads the base's config and the data, and neither weights nor anything from the Hub but one config.json.

    Args:
        counts: of train.tokens, if its tokens are made.

    Raises:
        UserError: of train.planning.architecture and train.planning.corpus.
    """
    config = read_config(recipe, run)
    layout = expected(recipe, run, config)
    data = counted(counts, recipe, layout.packed) if counts else corpus(recipe, run, layout.packed)
    return Job(recipe, config, architecture(config), data, layout)


def place(recipe: Recipe) -> Place:
    """The recipe's `plan.gpu`, else this machine.

    Raises:
        UserError: of train.launch.
    """
    name, asked = recipe.plan.gpu, recipe.launch
    if name is None:
        return _here(recipe)
    return rented(recipe, name, asked.nodes * (1 if asked.gpus == "all" else asked.gpus), ZERO[asked.strategy])


def rented(recipe: Recipe, name: str, devices: int = 1, zero: int = 0) -> Place:
    """A GPU of the table."""
    known = DEVICES[name]
    precision = "bfloat16" if known.bfloat16 > known.float32 and recipe.train.precision != "float32" else "float32"
    price = (recipe.plan.price,) * 2 if recipe.plan.price else known.price
    peak = known.bfloat16 if precision == "bfloat16" else known.float32
    return Place(name, "gpu", known.memory, precision, peak, known.watts, price, devices, zero)


def _here(recipe: Recipe) -> Place:
    import torch

    from pipeline.machine import fast_precision

    precision = fast_precision() if recipe.train.precision == "auto" else recipe.train.precision
    price = (recipe.plan.price,) * 2
    launched, zero = launch(recipe, gpus()), ZERO[recipe.launch.strategy]
    if not torch.cuda.is_available():
        each = launched.processes  # they share memory and cores
        memory, peak, watts = free_bytes() / each, processor_peak(precision) / each, WATTS_A_CORE * cores() / each
        name = "this machine's processor"
        return Place(name, "processor", memory, precision, peak, watts, price, launched.world, zero)
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    near, known = like(name, memory)
    peak = near.bfloat16 if precision == "bfloat16" else near.float32
    return Place(name, "gpu", memory, precision, peak, near.watts, price, launched.world, zero, known)


def memory_bytes(of: Job, at: Place, tuner: str = "", knobs: Train | None = None) -> dict[str, float]:
    """What each device holds at the peak of a step, by what it is for."""
    knobs, tuner = knobs or of.recipe.train, tuner or of.recipe.train.tuner
    step = of.rehearsal(at, tuner, knobs)
    held = states(of, at, tuner, step.trained)
    held["activations and logits"] = HOLES[at.kind] * step.bytes
    return held | {"libraries": RUNTIME_BYTES[at.kind] + (NCCL_BYTES if at.devices > 1 else 0)}


def states(of: Job, at: Place, tuner: str, trained: int) -> dict[str, float]:
    """What each device holds of weights, gradients and optimizer."""
    width = 4 if at.kind == "processor" or at.precision == "float32" else 2
    counts = (of.base.parameters, trained, of.base.linear, tuner, width)
    held = state_bytes(*counts, at.devices, at.zero)
    if METHODS[of.recipe.train.method].asked:
        held["frozen copy"] = width * of.base.parameters * of.recipe.train.needs_copy(tuner)
    held["weights"] += whole_bytes(of.base, state_bytes(*counts)["weights"], tuner, width, at.zero * (at.devices > 1))
    return held


def flops(of: Job, at: Place, tuner: str = "") -> float:
    """FLOPs of one token of training, with those that would take as long as what a tuner does beside them."""
    knobs, tuner = of.recipe.train, tuner or of.recipe.train.tuner
    forward = token_flops(of.base, of.row(knobs), of.data.supervised)
    share, tokens = BESIDE.get(tuner, (0.0, 0)) if at.kind == "processor" else (0.0, 0)
    longer = 1 + share + tokens / (knobs.batch_size * of.row(knobs))
    asked = 0 if knobs.precomputes else METHODS[knobs.method].asked
    return longer * training_flops(forward, tuner, knobs.gradient_checkpointing) + asked * forward


def full_speed(of: Job, at: Place) -> float:
    """Tokens a second of devices that do nothing but train at their peak, by which a measured speed is divided.

    What checkpointing computes again is no training (model FLOPs utilization, arXiv 2204.02311, appendix B).
    """
    forward = token_flops(of.base, of.row(of.recipe.train), of.data.supervised)
    return at.devices * at.peak / training_flops(forward, of.recipe.train.tuner, False)


def tokens_per_second(of: Job, at: Place, run: Run | None = None) -> tuple[float, str]:
    """(tokens that all devices train in a second, where the speed is from): this run's own last training, if it is
    there and ran on this machine, else the peak and the efficiency."""
    made = run.find_receipt("train") if run else None
    known = machine()
    if made and not of.recipe.plan.efficiency and of.recipe.plan.gpu is None:
        alike = all(made.machine.get(key) == known[key] for key in ("processor", "cores"))
        same = all(
            made.recipe["train"].get(key) == getattr(of.recipe.train, key)
            for key in ("tuner", "gradient_checkpointing")
        )
        if (
            alike
            and same
            and made.recipe.get("base_model") == of.recipe.base_model
            and made.metrics.get("tokens_per_second")
        ):
            return made.metrics["tokens_per_second"], "measured by this run's last training"
    efficiency = of.recipe.plan.efficiency or EFFICIENCY[at.kind]
    return at.devices * at.peak * efficiency / flops(of, at), f"{efficiency:.0%} of {at.peak / 1e12:.3g} TFLOP/s"


def fitting(of: Job, at: Place) -> list[str]:
    """The fewest changes of the recipe, as `key=value`, with which a step fits; empty if none suffices."""
    knobs, tuner = of.recipe.train, of.recipe.train.tuner
    changes: list[str] = []
    row = of.row(knobs)
    accumulate = knobs.batch_size * knobs.gradient_accumulation  # with it fewer rows at once learn the same
    steps: list[tuple[str, Any]] = (
        [("batch_size", 1), ("gradient_accumulation", accumulate)] if knobs.batch_size > 1 else []
    )
    steps += [("gradient_checkpointing", True)] if not knobs.gradient_checkpointing else []
    steps += [("tuner", "lora")] if tuner == "full" else []
    steps += [("tuner", "qlora")] if tuner in ("full", "lora") else []
    steps += [("max_length", size) for size in (4096, 2048, 1024, 512, 256, 128) if size < row]
    for key, value in steps:
        knobs = dataclasses.replace(knobs, **{key: value})
        changes = [change for change in changes if not change.startswith(f"train.{key}=")]
        changes.append(f"train.{key}={str(value).lower()}")
        if key == "batch_size" or sum(states(of, at, knobs.tuner, 0).values()) > at.memory:
            continue  # the weights alone are too many, which needs no rehearsal
        if sum(memory_bytes(of, at, knobs.tuner, knobs).values()) <= at.memory:
            return changes
    return []


def devices_needed(of: Job, recipe: Recipe, name: str, most: int = 64) -> Place | None:
    """The fewest of this GPU, by powers of two, that hold the training; more than one by ZeRO stage 3."""
    devices = 1
    while devices <= most:
        at = rented(recipe, name, devices, 3 if devices > 1 else 0)
        if sum(memory_bytes(of, at).values()) <= at.memory:
            return at
        devices *= 2
    return None


def largest_base(of: Job, at: Place) -> int:
    """About how many weights a base may have to fit, all else in proportion."""
    held = memory_bytes(of, at)
    free = at.memory - held.pop("libraries")
    return max(0, math.floor(of.base.parameters * free / sum(held.values())))


def predicted(of: Job, at: Place, run: Run) -> dict[str, float]:
    """What a receipt keeps of a prediction, beside what was measured."""
    speed, _ = tokens_per_second(of, at, run)
    tokens = of.data.tokens * of.recipe.train.epochs
    peak = {"peak_tokens_per_second": round(full_speed(of, at), 1)} if at.known else {}
    return peak | {
        "memory_bytes": round(sum(memory_bytes(of, at).values())),
        "tokens": round(tokens),
        "tokens_per_second": round(speed, 1),
        "seconds": round(tokens / speed, 1),
    }


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
