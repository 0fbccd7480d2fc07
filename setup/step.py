"""A step of the set-up: what it prints goes to a log, how far it is and why it failed to the terminal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRESS_EVERY_SECONDS = 10


class SetupError(Exception):
    """What is wrong and what mends it."""


def run(log: Path, what: str, command: list[str], may_fail: bool = False, **extra: str) -> bool:
    """Run a step, its output in the log, with a progress line every few seconds; False if it may fail and did."""
    say(what)
    start, skip = time.monotonic(), log.stat().st_size
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    clean = {key: value for key, value in os.environ.items() if key not in elsewhere} | extra
    with log.open("ab") as output, open(os.devnull) as none:
        # In a session of its own, so that Ctrl-C reaches it and its compilers once, from here.
        process = subprocess.Popen(  # with the lock of `alone`, the one file that is inherited
            command, stdin=none, stdout=output, stderr=output, env=clean, start_new_session=True, close_fds=False
        )
    while process.returncode is None:
        try:
            process.wait(PROGRESS_EVERY_SECONDS)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - start
            say(f"  {seconds:.0f} s{progress(printed(log, skip), seconds)}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()  # it tidies up; a second Ctrl-C does not wait
            raise
    if process.returncode and not may_fail:
        raise SetupError(reason(what, log, printed(log, skip)))
    return process.returncode == 0


def printed(log: Path, skip: int) -> str:
    return log.read_bytes()[skip:].decode(errors="replace")


def reason(what: str, log: Path, text: str) -> str:
    """Why a step failed, from its output."""
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return f"{what}: the disk is full: free some space and run again (see {log})"
    if re.search(r"from versions: none|ConnectionError|Max retries exceeded|Temporary failure in name", text):
        return f"{what}: no package index answers: connect to the network and run again (see {log})"
    return "\n  ".join([f"{what}: see {log}", *[line for line in text.splitlines() if line.strip()][-6:]])


def progress(text: str, seconds: float) -> str:
    """How far a step is: ninja's `[12/78]` while compiling, uv's megabytes, else pip's packages and last action."""
    if counts := re.findall(r"^\s*\[\s*(\d+)/(\d+)\]", text, re.M):
        done, total = map(int, counts[-1])
        left = f"{seconds * (total - done) / done / 60:.0f} min left"
        return f": {100 * done // total} %, {done} of {total} files, {left}"
    if sizes := dict(re.findall(r"^Downloading (\S+) \(([\d.]+)MiB\)", text, re.M)):
        megabytes = sum(map(float, sizes.values()))
        got = sum(float(sizes.get(name, 0)) for name in re.findall(r"^ Downloaded (\S+)", text, re.M))
        left = f", {got / seconds:.1f} MB a second, {seconds * (megabytes - got) / got:.0f} s left" if got else ""
        return f": {got:.0f} of {megabytes:.0f} MB{left}"
    packages = len(re.findall(r"^Collecting ", text, re.M))
    actions = re.findall(r"^\s*((?:Collecting|Downloading|Building|Preparing|Installing) \S+)", text, re.M)
    return f": {packages} packages, {packages / seconds:.1f} a second: {actions[-1]}" if actions else ""


def say(line: str) -> None:
    print(f"set-up: {line}", file=sys.stderr, flush=True)
