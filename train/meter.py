"""How far a piece of work is: a bar on a terminal, else a line every few seconds, with rate and time left."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from recipe.units import duration

log = logging.getLogger("truetune")
SECONDS_BETWEEN_LINES = 5.0


class Meter:
    """Counts units done of a total, of which the time left is computed, and rows, of which the rate is shown."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, max(1, total)
        self.done = self.rows = 0
        self.start = self.last_line = time.monotonic()
        console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn(name),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(name, total=self.total, rate="")

    def add(self, done: int, rows: int) -> None:
        self.done += done
        self.rows += rows
        now = time.monotonic()
        passed = max(now - self.start, 1e-9)
        rate = f"{self.rows:,} rows  {self.rows / passed:,.0f} rows/s"
        self.bar.update(self.task, completed=self.done, rate=rate)
        if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = duration(passed * max(0, self.total - self.done) / max(1, self.done))
            log.info("%s %d %%  %s  %s left", self.name, min(100, 100 * self.done // self.total), rate, left)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
