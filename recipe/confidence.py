"""How sure a measure is: 95 % intervals by resampling the rows, of each model and of the difference between the two.

Every measure is a function of sums over rows, so one bootstrap serves all: exact match as well as BLEU or macro F1.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95
RESAMPLES = 2000
LEAST_ROWS = 6  # of fewer, the sign test calls no difference significant at 5 %: 2 / 2**5 > 0.05
METHOD = (
    f"95 % intervals: percentile bootstrap over rows, {RESAMPLES} seeded resamples, the same rows for both models "
    "(Efron and Tibshirani, 1993); Wilson's score interval where each row is right or wrong (1927)"
)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


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

    def estimated(given: Any) -> tuple[Estimate, Any]:
        """A model's estimate, and its values in the resamples."""
        each = np.asarray(given, dtype=np.float64)
        value, resampled = float(np.asarray(score(each.sum(0, keepdims=True)))[0]), np.asarray(score(times @ each))
        exact = score is mean and _right_or_wrong(each)
        return wilson(int(each[:, 0].sum()), rows) if exact else _percentiles(value, resampled), resampled

    second, after = estimated(trained)
    if base is None:
        return Score(group, name, unit, rows, None, second, None, "", note)
    first, before = estimated(base)
    difference = _percentiles(second.value - first.value, after - before)
    verdict = _verdict(rows, difference, lower_is_better)
    return Score(group, name, unit, rows, first, second, difference, verdict, note)


def median(values: list[float]) -> Estimate:
    """The median with its distribution-free interval: the order statistics that enclose it in 95 % of samples.

    Of fewer than six values, the least and the greatest.
    """
    from scipy.stats import binom  # type: ignore[import-untyped]

    ordered = sorted(values)
    outside = max(int(binom.ppf((1 - LEVEL) / 2, len(ordered), 0.5)) - 1, 0)
    return Estimate(statistics.median(ordered), ordered[outside], ordered[-1 - outside])


def wilson(hits: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval, which also holds near 0 and 1."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / trials, float(low), float(high))


def _verdict(rows: int, difference: Estimate, lower_is_better: bool) -> str:
    if rows < LEAST_ROWS:
        return "too few rows"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _percentiles(value: float, found: Any) -> Estimate:
    import numpy as np

    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))


def _right_or_wrong(rows: Any) -> bool:
    """Whether each row is one trial that was won or lost."""
    return bool(((rows[:, 0] == 0) | (rows[:, 0] == 1)).all() and (rows[:, 1] == 1).all())
