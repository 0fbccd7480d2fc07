"""The scores of `make eval` as a person reads them: figures with their unit, and a table on the terminal."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.confidence import Estimate, Score
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.units import number, share, size

WIDE = ("measure", "rows", "base", "95 % interval", "trained", "95 % interval", "change", "95 % interval", "verdict")
NARROW = ("measure, verdict", "rows", "base, 95 %", "trained, 95 %", "change, 95 %")  # intervals below their values
PIPE_CHARACTERS = 140  # of a line that no terminal bounds
STYLES = {"better": "green", "worse": "red"}
MINUS = "\N{MINUS SIGN}"


def figure(value: float, unit: str) -> str:
    """A value in its unit: a share in percent, points of 100 with one decimal."""
    shown = share(abs(value)) if unit == "share" else f"{abs(value):.1f}" if unit == "points" else number(abs(value))
    return (MINUS if value < 0 and shown.strip("0.%") else "") + shown


def change(value: float, unit: str) -> str:
    """A difference, with its sign; of shares in points of a hundred, so that nobody takes it for a ratio."""
    shown = figure(100 * value, "points") if unit == "share" else figure(value, unit)
    return shown if shown.startswith(MINUS) or not shown.strip("0.") else f"+{shown}"


def interval(estimate: Estimate, unit: str, show: Callable[[float, str], str] = figure) -> str:
    """From its low to its high end; a dash where no interval can be told."""
    if estimate.low is None or estimate.high is None:
        return "\N{EN DASH}"
    return f"{show(estimate.low, unit)} to {show(estimate.high, unit)}"


def grouped(scores: list[Score]) -> list[tuple[str, list[Score]]]:
    """(group, its scores), in their order."""
    return [(group, list(members)) for group, members in groupby(scores, key=lambda score: score.group)]


@dataclass(frozen=True)
class Evaluated:
    """What `make eval` found, for the page: scores by group, of the weights and of what is served; speeds; method."""

    groups: list[tuple[str, list[Score]]]
    speeds: list[tuple[str, str]]
    method: str
    changed: str | None

    @property
    def scores(self) -> list[Score]:
        return [score for _, scores in self.groups for score in scores]


def evaluated(recipe: Recipe, run: Run) -> Evaluated | None:
    """The receipt's scores, and those of what was served last; None before there are any."""
    receipt, serving, served = run.find_receipt("eval"), run.find_receipt("serve"), run.path("served.json")
    if receipt is None:
        return None
    parts = [receipt.metrics]
    if serving and served.is_file():
        told = json.loads(served.read_text(encoding="utf-8"))
        parts += [told] if told["inputs"] == serving.inputs else []
    scores = [Score.of(row) for part in parts for row in part["scores"]]
    speeds = [(name, speed(row)) for part in parts for name, row in part["speed"].items()]
    return Evaluated(grouped(scores), speeds, receipt.metrics["method"], run.state("eval", recipe).changed)


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
