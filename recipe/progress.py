"""Progress towards a known total: a bar on a terminal, else a line every few seconds, with rate and time left."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 5

log = logging.getLogger("truetune")


@contextmanager
def progress(doing: str, total: int, unit: str = "", scale: float = 1) -> Iterator[Callable[[int], None]]:
    """Call what it yields with how much is done; `scale` turns that into `unit`, such as 1e-6 for bytes in MB."""
    began = said = time.monotonic()

    def line(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= LINE_SECONDS and done:
            said, rate = now, done / (now - began)
            count = f"{done * scale:.0f} of {total * scale:.0f} {unit}".strip()
            left = f"{rate * scale:.1f} {unit} a second".replace("  ", " ")
            log.info("%s: %s, %s, %.0f s left", doing, count, left, (total - done) / rate)

    if not sys.stderr.isatty():
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total, rate="")
        yield lambda done: bar.update(
            task, completed=done, rate=f"{done * scale / max(time.monotonic() - began, 1e-3):.1f} {unit}/s"
        )
