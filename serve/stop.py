"""Stop what serves the run, from any terminal:  python -m serve.stop RECIPE"""

import logging
import os
import signal
import time
from contextlib import suppress

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.run import Run
from serve.running.session import find

DOES = "Stop what serves the run: engine and chat window"
PATIENCE_SECONDS = 30

log = logging.getLogger("truetune")


def stop(run: Run) -> None:
    """Ask the supervisor to end, as Ctrl-C does, and wait until it has.

    Raises:
        UserError: it does not end.
    """
    session = find(run)
    if session is None:
        log.info("%s is not being served", run.folder)
        return
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
        stop(Run.of(recipe_of_arguments("serve.stop", DOES)))
