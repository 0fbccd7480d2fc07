"""How far a piece of work is: a bar on a terminal, else a line every few seconds, with rate and time left."""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, TextIO

from pipeline.units import duration

BAR_SECONDS = 0.05  # a person sees no more
LINE_SECONDS = 5
LEAST_BAR = 8  # columns: what a narrow terminal has no more room for is left out, the last first

log = logging.getLogger("truetune")


class Tell(Protocol):
    """Called with how much is done; `notes` stand in the rate's place, `seconds_left` in that of its own estimate."""

    def __call__(self, done: float = 0, *notes: str, seconds_left: float | None = None) -> None: ...


@contextmanager
def progress(doing: str, total: float = 0, unit: str = "", scale: float = 1) -> Iterator[Tell]:
    """`scale` turns what is counted into `unit`, such as 1e-6 for bytes in MB; 0 in `total` is an unknown one.

    A bar within another's work is drawn below it; each is gone when its work ends, however it ends.
    """
    began = said = time.monotonic()
    whole = float(total * scale).is_integer() or not total
    digits = 0 if whole else max(0, 1 - math.floor(math.log10(total * scale)))  # two that count, of a small total

    def told(done: float, notes: tuple[str, ...], seconds_left: float | None) -> list[str]:
        passed = max(time.monotonic() - began, 1e-3)
        if not total:
            return [duration(passed), *notes]
        if seconds_left is None and done:
            seconds_left = passed * (total - done) / done
        left = [] if seconds_left is None else [f"{duration(max(0, seconds_left))} left"]
        rate = f"{done * scale / passed:,.1f} {unit}".strip() + " a second"
        return [f"{done * scale:,.{digits}f} of {total * scale:,.{digits}f} {unit}".strip(), *left, *(notes or (rate,))]

    def line(done: float = 0, *notes: str, seconds_left: float | None = None) -> None:
        nonlocal said
        ended = 0 < total <= done and seconds_left is None
        if time.monotonic() - said >= LINE_SECONDS and not ended:
            said = time.monotonic()
            log.info("%s: %s", doing, ", ".join(told(done, notes, seconds_left)))

    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn

    console = _console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    texts = TextColumn("{task.fields[text]}", markup=False)
    # Without rich's thread, whose drawing and a log line's mix: half a bar is left then.
    with Progress(*columns, texts, console=console, transient=True, redirect_stdout=False, auto_refresh=False) as bar:
        task, drawn = bar.add_task(doing, total=total or None, text=""), 0.0

        def draw(done: float = 0, *notes: str, seconds_left: float | None = None) -> None:
            nonlocal drawn
            room = console.width - len(doing) - LEAST_BAR - 2
            is_due = time.monotonic() - drawn >= BAR_SECONDS
            drawn = time.monotonic() if is_due else drawn
            bar.update(task, completed=done, text=_fitting(told(done, notes, seconds_left), room), refresh=is_due)

        yield draw


def _fitting(parts: list[str], room: int) -> str:
    """As many of the parts, from the first on, as there is room for."""
    while parts and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)


@cache
def _console() -> Any:
    """One for all bars, so that each knows of the others."""
    from rich.console import Console

    return Console(stderr=True)


class AboveBars(logging.StreamHandler[TextIO]):
    """Log lines to stderr as it is now: while a bar is drawn, rich puts there what writes above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
