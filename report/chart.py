"""The charts of a run, and where on the paper their ticks, points, lines and labels lie; `chart.html.jinja` draws them.

The paper is as wide as a phone, so that its text can be read there; a wider screen enlarges it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pipeline.proof import Comparison
from pipeline.run import Receipt
from pipeline.scores import Estimate, Score
from pipeline.units import change, figure, number, power, size

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 346, 32, 218
LETTER, LINE = 7.4, 12.0  # of a label, wide and high; a wide font's, so that labels keep their distance
TRACK = 38  # high
TICKS = 5  # about so many
ROOM = 0.05  # of the range, beyond the values
MOST_POINTS = 300  # of a line: more than the paper resolves


@dataclass(frozen=True)
class Axis:
    """The values of one direction, from `low` at `start` to `high` at `end` on the paper."""

    label: str
    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    show: Callable[[float], str]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; what is off the scale lies on its edge."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)


@dataclass(frozen=True)
class Point:
    """A labelled dot; `kind` is how it is drawn: plain, chosen or failed."""

    label: str
    x: float
    y: float
    kind: str = "plain"
    text: str = ""


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) pairs; `kind` is how it is drawn, `dots` whether each pair is marked."""

    label: str
    pairs: list[tuple[float, float]]
    kind: str = "plain"
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart, what it shows (`caption`) and, for those who cannot see it, what it says (`description`)."""

    name: str
    title: str
    caption: str
    description: str
    x: Axis
    y: Axis
    points: list[Point] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    breaks: list[float] = field(default_factory=list)  # x at which the line was interrupted

    def path(self, curve: Curve) -> str:
        """The `d` of an SVG path."""
        return "M" + "L".join(f"{self.x.at(x):g},{self.y.at(y):g}" for x, y in curve.pairs)

    def labels(self) -> list[tuple[Point, float, float, str]]:
        """(point, x, y, anchor) of each point's label: beside it, or up to two lines off, wherever nothing else is."""
        taken = [_box(self.x.at(p.x) - 5, self.y.at(p.y) - 5, 10, 10) for p in self.points]
        placed = []
        for point, own in zip(self.points, list(taken), strict=True):
            x, y, width = self.x.at(point.x), self.y.at(point.y), LETTER * len(point.label)
            sides = (("start", x + 9, x + 8), ("end", x - 9, x - 8 - width))
            choices = [
                (at, y + 4 + shift, anchor, _box(left, y - 6 + shift, width, LINE))
                for shift in (0, -LINE, LINE, -2 * LINE, 2 * LINE)
                for anchor, at, left in sides
            ]
            others = [box for box in taken if box is not own]
            free = [c for c in choices if _inside(c[3]) and not any(_overlap(c[3], box) for box in others)]
            left, top, anchor, box = (free or [c for c in choices if _inside(c[3])] or choices)[0]
            taken.append(box)
            placed.append((point, round(left, 1), round(top, 1), anchor))
        return placed


@dataclass(frozen=True)
class Track:
    """A measure on a line of its own: (value, low, high) before and after, and how the change is called."""

    label: str
    text: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    kind: str = "plain"


@dataclass(frozen=True)
class Tracks:
    """Measures one below the other on one scale, each as two intervals; `description` as of a chart."""

    name: str
    title: str
    caption: str
    description: str
    x: Axis
    tracks: list[Track]

    @property
    def height(self) -> int:
        return TRACK * len(self.tracks) + 34

    def top(self, index: int) -> int:
        """Where the track of that number begins."""
        return TRACK * index + 4


def across(values: Iterable[float], show: Callable[[float], str] | None = None) -> Axis:
    """The scale of tracks, over the whole paper, with room for every value."""
    return _linear("", list(values), 8.0, WIDTH - 12.0, show)


def horizontal(label: str, values: Iterable[float], show: Callable[[float], str] | None = None) -> Axis:
    """The lower edge of the paper, with room for every value."""
    return _linear(label, list(values), LEFT, RIGHT, show)


def vertical(label: str, values: Iterable[float], show: Callable[[float], str] | None = None) -> Axis:
    """The left edge of the paper, with room for every value."""
    return _linear(label, list(values), BOTTOM, TOP, show)


def logarithmic(label: str, values: Iterable[float], show: Callable[[float], str] = "{:g}".format) -> Axis:
    """The left edge of the paper in powers of ten, from the one below the least value (above zero) to the one above."""
    given = [value for value in values if value > 0] or [1.0]
    first = math.floor(math.log10(min(given)))
    last = max(first + 1, math.ceil(math.log10(max(given))))
    every = math.ceil((last - first) / 6)
    ticks = [10.0**power for power in range(first, last + 1, every)]
    return Axis(label, 10.0**first, 10.0**last, BOTTOM, TOP, ticks, show, True)


def _linear(label: str, values: list[float], start: float, end: float, show: Callable[[float], str] | None) -> Axis:
    """From the least value to the greatest, a little further where that is not zero, with round numbers as ticks.

    Unless `show` says otherwise, all ticks have as many decimals as their step.
    """
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-9):  # one value has no range of its own
        low, high = low - max(abs(low) / 10, 1e-9), high + max(abs(high) / 10, 1e-9)
    rough = (high - low) / TICKS
    step = 10 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough * 0.999)
    room = ROOM * (high - low)
    low, high = low - room if low else low, high + room if high else high
    ticks = [round(index * step, 12) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(label, low, high, start, end, ticks, show or f"{{:,.{decimals}f}}".format)


def thinned(pairs: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` pairs, each the mean of its neighbours."""
    if len(pairs) <= most:
        return pairs
    bounds = [len(pairs) * index // most for index in range(most + 1)]
    groups = [pairs[low:high] for low, high in pairwise(bounds)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(pairs: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average of y, corrected for its start (Kingma and Ba, 2015, section 3)."""
    mean, made = 0.0, []
    for index, (x, y) in enumerate(pairs, 1):
        mean = weight * mean + (1 - weight) * y
        made.append((x, mean / (1 - weight**index)))
    return made


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x, y, x + width, y + height


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[1] >= 0 and box[2] <= WIDTH and box[3] <= BOTTOM


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def size_chart(files: list[Comparison], choice: dict[str, Any]) -> Chart | None:
    """What each quantization saves, and what it costs."""
    rows = [row for row in files if row.measures.get("divergence_mean", 0) > 0]
    if len(rows) < 2:
        return None
    points = [
        Point(
            row.name,
            row.measures["bytes"],
            row.measures["divergence_mean"],
            _kind(row, choice),
            f"{row.name}: {size(row.measures['bytes'])}, {number(row.measures['divergence_mean'])} nats",
        )
        for row in rows
    ]
    return Chart(
        "size",
        "Size against divergence",
        "Mean KL divergence from the trained model; lower is truer, left is smaller.",
        "; ".join(point.text for point in points),
        horizontal("file size", [0, *(point.x for point in points)], lambda count: size(count) if count else "0"),
        logarithmic("KL divergence, nats a token", [point.y for point in points], power),
        points,
    )


def speed_chart(files: list[Comparison], choice: dict[str, Any]) -> Chart | None:
    """How fast each quantization answers, and how well it knows the validation answers."""
    rows = [row for row in files if {"decode_tokens_per_second", "perplexity"} <= row.measures.keys()]
    if len(rows) < 2:
        return None
    points = [
        Point(
            row.name,
            row.measures["perplexity"],
            row.measures["decode_tokens_per_second"],
            _kind(row, choice),
            f"{row.name}: {number(row.measures['decode_tokens_per_second'])} tokens/s, "
            f"perplexity {number(row.measures['perplexity'])}",
        )
        for row in rows
    ]
    return Chart(
        "speed",
        "Speed against perplexity",
        "Perplexity of the validation answers; higher is faster, left is better.",
        "; ".join(point.text for point in points),
        horizontal("perplexity", [point.x for point in points]),
        vertical("answer tokens a second", [0, *(point.y for point in points)]),
        points,
    )


def loss_chart(train: Receipt, loss: str = "nats a token") -> Chart | None:
    """Training loss by step, as it was and smoothed, and the validation losses from before the first step on.

    Args:
        loss: what it is counted in (pipeline.methods).
    """
    losses = [(float(step), loss) for step, loss in train.metrics.get("loss_curve", [])]
    if len(losses) < 2:
        return None
    before = train.metrics.get("before", {}).get("validation_loss")
    known = ([(0.0, before)] if before is not None else []) + train.metrics.get("validation_curve", [])
    validation = [(float(step), loss) for step, loss in dict(known).items()]
    curves = [
        Curve("training loss", thinned(losses), "faint"),
        Curve("smoothed", thinned(smoothed(losses)), "plain"),
        Curve("validation loss", validation, "chosen", dots=True),
    ]
    marks = _marks(train, validation, curves[1].pairs[-1])
    stops = train.metrics.get("interruptions", [])
    told = [mark.text for mark in marks] + [f"interrupted at step {stop['step']}: {stop['why']}" for stop in stops]
    ends = f"Training loss from {number(losses[0][1])} to {number(curves[1].pairs[-1][1])} in {len(losses)} steps"
    held = ", ".join(f"{number(loss)} at step {step:g}" for step, loss in validation)
    return Chart(
        "losses",
        "Loss by step",
        f"Loss, {loss}; the validation conversations were never trained on.",
        "; ".join([ends, *([f"validation loss {held}"] if held else []), *told]) + ".",
        horizontal("step", [0, *(step for step, _ in losses)]),
        vertical(f"loss, {loss}", [0, *(y for curve in curves for _, y in curve.pairs)]),
        points=marks,
        curves=[curve for curve in curves if curve.pairs],
        breaks=[float(stop["step"]) for stop in stops],
    )


def _marks(train: Receipt, validation: list[tuple[float, float]], end: tuple[float, float]) -> list[Point]:
    """The step whose weights were kept, and where training ended if that was before its epochs were done."""
    best, ended = train.metrics.get("best_step"), train.metrics.get("ended")
    marks = [Point("best", *pair, "chosen", f"best at step {pair[0]:g}") for pair in validation if pair[0] == best]
    if ended not in (None, "all epochs were done"):
        marks.append(Point("stopped", *end, "plain", f"stopped at step {end[0]:g}: {ended}"))
    return marks


def change_chart(scores: list[Score]) -> Tracks | None:
    """What training changed, measure by measure: the base's interval beside the trained model's, of 100."""
    shown = [score for score in scores if score.base and score.difference and score.unit in ("share", "points")]
    if not shown:
        return None

    def percent(estimate: Estimate, unit: str) -> tuple[float, float, float]:
        """The value and its ends; without an interval, the value alone."""
        times = 100 if unit == "share" else 1
        low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
        return times * estimate.value, times * low, times * high

    kinds = {"better": "chosen", "worse": "failed"}
    tracks = [
        Track(
            score.name if score.name != "accuracy" else score.group,
            f"{figure(score.base.value, score.unit)} \N{RIGHTWARDS ARROW} {figure(score.trained.value, score.unit)}",
            percent(score.base, score.unit),
            percent(score.trained, score.unit),
            kinds.get(score.verdict, "plain"),
        )
        for score in shown
        if score.base
    ]
    ends = [end for track in tracks for end in (*track.before, *track.after)]
    return Tracks(
        "change",
        "What training changed",
        "On a scale of 100: each line is a 95 % interval, its dot the value; above the base, below the trained model.",
        "; ".join(
            f"{score.group}, {score.name}: {change(score.difference.value, score.unit)}, {score.verdict}"
            for score in shown
            if score.difference
        )
        + ".",
        across([0, *ends]),
        tracks,
    )


def _kind(row: Comparison, choice: dict[str, Any]) -> str:
    return "failed" if row.problems else "chosen" if row.name == choice.get("recommended") else "plain"
