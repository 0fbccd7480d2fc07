"""What a training will take on a device: memory at its peak, time, energy and price, from base, recipe and data."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.machine import cores, free_bytes, gpus, machine
from pipeline.recipe import Train
from train.config import read_config
from train.launch import launch
from train.packing import Layout, expected
from train.planning.architecture import (
    Architecture,
    architecture,
    state_bytes,
    token_flops,
    training_flops,
    whole_bytes,
)
from train.planning.corpus import Corpus, corpus, counted, supervised_positions
from train.planning.devices import DEVICES, like, processor_peak
from train.planning.rehearsal import Rehearsal, fused, rehearse
from train.tuners import TUNERS

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
        tokens = knobs.batch_size * self.row(knobs)
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
            knobs = dataclasses.replace(knobs, tuner=tuner)
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
        UserError: no such GPU in the table, or of train.launch.
    """
    name, asked = recipe.plan.gpu, recipe.launch
    if name is None:
        return _here(recipe)
    if name not in DEVICES:
        raise UserError(f"plan.gpu={name!r} is unknown: choose one of: {', '.join(DEVICES)}")
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
    held["weights"] += whole_bytes(of.base, state_bytes(*counts)["weights"], tuner, width, at.zero * (at.devices > 1))
    return held


def flops(of: Job, at: Place, tuner: str = "") -> float:
    """FLOPs of one token of training, with those that would take as long as what a tuner does beside them."""
    knobs, tuner = of.recipe.train, tuner or of.recipe.train.tuner
    forward = token_flops(of.base, of.row(knobs), of.data.supervised)
    share, tokens = BESIDE.get(tuner, (0.0, 0)) if at.kind == "processor" else (0.0, 0)
    longer = 1 + share + tokens / (knobs.batch_size * of.row(knobs))
    return longer * training_flops(forward, tuner, knobs.gradient_checkpointing)


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
