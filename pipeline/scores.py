"""A score: what was counted of the trained model beside the base, how sure a difference is, and a table of scores."""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from pipeline.units import change, figure, number, size

LEVEL = 0.95
RESAMPLES = 2000
LEAST_ROWS = 6  # of fewer, the sign test calls no difference significant at 5 %: 2 / 2**5 > 0.05
METHOD = (
    "95 % intervals, of the same rows for both models. Where each row is right or wrong: Wilson's score interval "
    "(1927), and Newcombe's for the difference of pairs (1998, method 10). Else: percentile bootstrap over rows, "
    f"{RESAMPLES:,} seeded resamples (Efron and Tibshirani, 1993). Each measure is judged by itself: of twenty that "
    "nothing changed, one is expected to be called better or worse. Changes of shares are in "
    "percentage points. Speeds: medians between order statistics."
)
WIDE = ("measure", "rows", "base", "95 % interval", "trained", "95 % interval", "change", "95 % interval", "verdict")
NARROW = ("measure, verdict", "rows", "base, 95 %", "trained, 95 %", "change, 95 %")  # intervals below their values
PIPE_CHARACTERS = 140  # of a line that no terminal bounds
STYLES = {"better": "green", "worse": "red"}


def has_fact(answer: str, fact: str) -> bool:
    """Whether the answer contains the fact, or one of its alternatives `this|that`, whatever the case."""
    return any(alternative.strip().casefold() in answer.casefold() for alternative in fact.split("|"))


def key_fact_accuracy(found: list[str], questions: list[dict[str, Any]]) -> float:
    """Share of all key facts that the answers contain."""
    hits = [hit for answer, question in zip(found, questions, strict=True) for hit in facts_in(answer, question)]
    return sum(hits) / len(hits) if hits else 0.0


def facts_in(answer: str, question: dict[str, Any]) -> list[bool]:
    """For each key fact of the question whether the answer has it."""
    return [has_fact(answer, fact) for fact in question["facts"]]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, where that can be told."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score:
    """A measure of the trained model beside the base, over the same `rows`; of what is served there is no base.

    `unit` is how it is shown: `share` (of one), `points` (of 100) or `number`. `verdict` is what the difference's
    interval shows: better, worse, no difference shown, or too few rows. `note` says how it was computed.
    """

    group: str
    name: str
    unit: str
    rows: int
    base: Estimate | None
    trained: Estimate
    difference: Estimate | None
    verdict: str
    note: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Score":
        """A score from a receipt."""
        keys = ("base", "trained", "difference")
        return cls(**row | {key: Estimate(**row[key]) if row[key] else None for key in keys})


def as_rows(scores: list[Score]) -> list[dict[str, Any]]:
    """The scores as a receipt keeps them."""
    return [asdict(score) for score in scores]


def mean(sums: Any) -> Any:
    """The ratio of two sums, (..., 2) to (...): of hits and trials, or of a score and its count."""
    return sums[..., 0] / sums[..., 1]


def compare(
    group: str,
    name: str,
    base: Any,
    trained: Any,
    score: Callable[[Any], Any] = mean,
    *,
    unit: str = "share",
    lower_is_better: bool = False,
    seed: int = 0,
    note: str = "",
) -> Score:
    """The measure `score` of both models; `base` and `trained` are (rows, statistics), one row for one question.

    `score` takes sums of statistics, (..., statistics), to values, (...). Without a `base` nothing is compared.
    """
    import numpy as np

    rows = len(trained)
    times = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)
    bounded = unit == "share" and score is mean

    def estimated(given: Any) -> tuple[Estimate, Any]:
        """A model's estimate, and its values in the resamples."""
        each = np.asarray(given, dtype=np.float64)
        value, resampled = float(np.asarray(score(each.sum(0, keepdims=True)))[0]), np.asarray(score(times @ each))
        if bounded and (_right_or_wrong(each) or value in (0, 1)):  # all at one end: too wide a bound beats none
            return wilson(round(value * rows), rows), resampled
        return _percentiles(value, resampled, rows), resampled

    second, after = estimated(trained)
    if base is None:
        return Score(group, name, unit, rows, None, second, None, "", note)
    first, before = estimated(base)
    if bounded and _right_or_wrong(np.asarray(base)) and _right_or_wrong(np.asarray(trained)):
        difference = newcombe(np.asarray(base)[:, 0] == 1, np.asarray(trained)[:, 0] == 1)
    elif bounded and {first.value, second.value} & {0.0, 1.0}:
        difference = squared_and_added(first, second)
    else:
        difference = _percentiles(second.value - first.value, after - before, rows)
    judged = verdict(rows, difference, lower_is_better)
    return Score(group, name, unit, rows, first, second, difference, judged, note)


def median(values: list[float]) -> Estimate:
    """The median with its distribution-free interval: the order statistics that enclose it in 95 % of samples.

    Of fewer than six values, the least and the greatest.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    outside = max(int(binom.ppf((1 - LEVEL) / 2, len(ordered), 0.5)) - 1, 0)
    return Estimate(statistics.median(ordered), ordered[outside], ordered[-1 - outside])


def wilson(hits: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval, which also holds near 0 and 1."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / trials, float(low), float(high))


def newcombe(before: Any, after: Any) -> Estimate:
    """The change of a proportion of the same rows, given whether each was right: Newcombe (1998), method 10."""
    rows = len(before)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    together = both * neither - lost * won
    corrected = max(together - rows / 2, 0.0) if together > 0 else together
    correlation = corrected / math.sqrt(margins) if margins else 0.0
    return squared_and_added(wilson(both + lost, rows), wilson(both + won, rows), correlation)


def squared_and_added(first: Estimate, second: Estimate, correlation: float = 0.0) -> Estimate:
    """The difference of two estimates from what each end lies off (Zou and Donner, 2008)."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(second.value - first.value)

    def off(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    change = second.value - first.value
    down = off(second.value - second.low, first.high - first.value)
    return Estimate(change, change - down, change + off(second.high - second.value, first.value - first.low))


def verdict(rows: int, difference: Estimate, lower_is_better: bool) -> str:
    """What a difference shows, if its interval excludes zero."""
    if rows < LEAST_ROWS:
        return "too few rows"
    if difference.low is None or difference.high is None:
        return "no interval known" if difference.value else "no difference shown"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _percentiles(value: float, found: Any, rows: int) -> Estimate:
    """By the bootstrap, which tells nothing of few rows, nor of rows that are all alike."""
    import numpy as np

    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return Estimate(value, float(low), float(high)) if rows >= LEAST_ROWS and low < high else Estimate(value)


def _right_or_wrong(rows: Any) -> bool:
    """Whether each row is one trial that was won or lost."""
    return bool(((rows[:, 0] == 0) | (rows[:, 0] == 1)).all() and (rows[:, 1] == 1).all())


def interval(estimate: Estimate, unit: str, show: Callable[[float, str], str] = figure) -> str:
    """From its low to its high end; a dash where no interval can be told."""
    if estimate.low is None or estimate.high is None:
        return "\N{EN DASH}"
    return f"{show(estimate.low, unit)} to {show(estimate.high, unit)}"


def line(score: Score) -> str:
    """A score with its intervals in a line."""
    told = [
        figure(estimate.value, score.unit)
        + (f" ({interval(estimate, score.unit)})" if estimate.low is not None else "")
        for estimate in (score.base, score.trained)
        if estimate
    ]
    judged = f", {score.verdict}" if score.verdict else ""
    return f"{score.group}: {score.name} {' -> '.join(told)}{judged}"


def grouped(scores: list[Score]) -> list[tuple[str, list[Score]]]:
    """(group, its scores), in their order."""
    return [(group, list(members)) for group, members in groupby(scores, key=lambda score: score.group)]


def show(metrics: dict[str, Any]) -> None:
    """The scores as a table on standard output, and what the machine makes of each model."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_CHARACTERS, highlight=False)
    if metrics["scores"]:
        console.print(table(grouped([Score.of(row) for row in metrics["scores"]]), console))
    for name, row in metrics["speed"].items():
        console.print(f"{name}: {speed(row)}", markup=False)
    if metrics["scores"]:
        console.print(metrics["method"], markup=False)


def table(groups: list[tuple[str, list[Score]]], console: Any) -> Any:
    """A line for each score; two where the console is too narrow for that."""
    wide = _table(groups, WIDE)
    wanted = console.measure(wide, options=console.options.update(width=PIPE_CHARACTERS)).maximum
    return wide if wanted <= console.width else _table(groups, NARROW)


def _table(groups: list[tuple[str, list[Score]]], columns: tuple[str, ...]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for column in made.columns[1 : None if columns is NARROW else -1]:
        column.justify = "right"
    for group, scores in groups:
        made.add_section()
        made.add_row(Text(group, "bold"))
        for score in scores:
            pairs = [
                (shown(estimate.value, score.unit), interval(estimate, score.unit, shown)) if estimate else ("", "")
                for estimate, shown in ((score.base, figure), (score.trained, figure), (score.difference, change))
            ]
            name, verdict = Text(score.name), Text(score.verdict, STYLES.get(score.verdict, ""))
            if columns is NARROW:
                made.add_row(Text("\n").join((name, verdict)), str(score.rows), *("\n".join(pair) for pair in pairs))
            else:
                made.add_row(name, str(score.rows), *(cell for pair in pairs for cell in pair), verdict)
    return made


def speed(row: dict[str, Any]) -> str:
    """Time to the first token, tokens a second and memory, in one line."""
    first, rate = row["first_token_seconds"], row["tokens_per_second"]
    return (
        f"first token after {1000 * first['value']:.0f} ms ({1000 * first['low']:.0f} to {1000 * first['high']:.0f}), "
        f"then {number(rate['value'])} tokens a second ({number(rate['low'])} to {number(rate['high'])})"
        + (f", {size(row['bytes'])} of memory" if row["bytes"] else "")  # Ollama's is not ours to see
    )
