"""The charts of a run: size against divergence, speed against perplexity, loss by step; none of what is not known."""

from typing import Any

from pipeline.proof import Comparison
from pipeline.run import Receipt
from pipeline.scores import Estimate, Score, change, figure
from pipeline.units import number, power, size
from report.chart import (
    Chart,
    Curve,
    Point,
    Track,
    Tracks,
    across,
    horizontal,
    logarithmic,
    smoothed,
    thinned,
    vertical,
)


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


def loss_chart(train: Receipt) -> Chart | None:
    """Training loss by step, as it was and smoothed, and the validation losses from before the first step on."""
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
        "Nats a token of the assistant's words; the validation conversations were never trained on.",
        "; ".join([ends, *([f"validation loss {held}"] if held else []), *told]) + ".",
        horizontal("step", [0, *(step for step, _ in losses)]),
        vertical("loss, nats a token", [0, *(loss for curve in curves for _, loss in curve.pairs)]),
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
