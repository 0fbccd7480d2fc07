"""Show what serves the run, or stop it, from any terminal:  python -m serve.status RECIPE [--stop]"""

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.run import Run
from serve.running.session import Session, find, memory_bytes

DOES = "Show what serves the run: its services, their ports, processes, restarts and memory; with --stop, end them"
TEXTS, NUMBERS = ("service", "state"), ("port", "process", "restarts", "memory", "since")
PATIENCE_SECONDS = 30

log = logging.getLogger("truetune")


def status(session: Session) -> None:
    """The endpoint, and a row for each service."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*TEXTS, *(Column(name, justify="right") for name in NUMBERS))
    for service in session.services:
        pid = service["pid"]
        memory = f"{memory_bytes(pid) / 1e6:.0f} MB" if pid else "-"
        cells = (service["name"], service["state"], service["port"], pid, service["restarts"], memory)
        table.add_row(*(str(cell if cell is not None else "-") for cell in cells), ago(service["since"]))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"{session.model} is served at {session.url} by {session.engine}, process {session.pid},", end=" ")
    console.print(f"for {ago(session.since)}" + (f"; chat window at {session.ui_url}" if session.ui_url else ""))
    console.print(table)


def ago(moment: str) -> str:
    """How long ago an ISO 8601 moment was, as people say it."""
    if not moment:
        return "-"
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def stop(session: Session, run: Run) -> None:
    """Ask the supervisor to end, as Ctrl-C does, and wait until it has.

    Raises:
        UserError: it does not end.
    """
    with suppress(ProcessLookupError):
        os.kill(session.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while find(run):
        if time.monotonic() > deadline:
            raise UserError(f"process {session.pid} does not end: 'kill -9 {session.pid}' ends it and its services")
        time.sleep(0.1)
    log.info("%s is no longer served", run.folder)


if __name__ == "__main__":
    with boundary():
        stops = "--stop" in sys.argv
        sys.argv = [argument for argument in sys.argv if argument != "--stop"]
        recipe = recipe_of_arguments("serve.status", DOES)
        run = Run.of(recipe)
        session = find(run)
        if session is None and stops:
            log.info("%s is not being served", run.folder)
        elif session is None:
            raise UserError(f"{run.folder} is not being served: 'make serve RECIPE={recipe.given}' starts it")
        elif stops:
            stop(session, run)
        else:
            status(session)
