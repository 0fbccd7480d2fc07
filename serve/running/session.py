"""The session of a run that is being served: who serves it and how, in a file for other terminals.

The lock on that file ends with the process that holds it, however it ends, so a stale file deceives nobody.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.error import UserError
from pipeline.files import write_whole
from pipeline.run import Run


@dataclass(frozen=True)
class Session:
    """What `make serve` reports of itself; `services` are their conditions, one a dict."""

    pid: int
    engine: str
    ui: str
    url: str
    ui_url: str
    model: str
    since: str
    services: list[dict[str, Any]]


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Be the one process that serves this run.

    Raises:
        UserError: another one does; says where.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.path(".serving").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse_second(run)
            raise UserError(f"{run.folder} is just being started or stopped: wait for it") from None
        run.path("session.json").unlink(missing_ok=True)
        try:
            yield
        finally:
            run.path("session.json").unlink(missing_ok=True)


def report(run: Run, session: Session) -> None:
    """Write it for other terminals."""
    write_whole(run.path("session.json"), json.dumps(vars(session), indent=2) + "\n")


def find(run: Run) -> Session | None:
    """The session now, if there is one."""
    try:
        with run.path(".serving").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # nobody holds it
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pass
    try:
        return Session(**json.loads(run.path("session.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None  # it has just begun or is about to end


def refuse_second(run: Run) -> None:
    """Say where the run is already served, if it is.

    Raises:
        UserError: it is.
    """
    if session := find(run):
        stop = f"use it, or stop it with 'make stop RECIPE={run.given}'"
        raise UserError(f"{run.folder} is already being served on {session.url}: {stop}")


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and of those that it started."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        pass  # it ends just now
    return total
