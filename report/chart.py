"""Where on the paper a chart's ticks, points, lines and labels lie; `chart.html.jinja` draws them as SVG.

The paper is as wide as a phone, so that its text can be read there; a wider screen enlarges it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

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
