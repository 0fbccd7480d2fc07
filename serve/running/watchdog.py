"""Ends what a supervisor started when the supervisor itself is killed:  python -m serve.running.watchdog

Standard input names process groups, one a line: `+123` is started, `-123` has ended. Its end is the supervisor's.
"""

import os
import signal
import sys
from contextlib import suppress


def watchdog() -> None:
    """Wait for the end of standard input, then kill the groups that are left."""
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watchdog()
