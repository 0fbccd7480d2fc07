"""Progress: as much as a terminal has room for, lines elsewhere, nothing left drawn after an error."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from pipeline import progress as module
from pipeline.progress import progress

SHOW = """
import logging, sys, time
from pipeline.progress import AboveBars, progress
logging.basicConfig(format="%(message)s", handlers=[AboveBars()])
with progress("train", 80) as tell:
    tell(12, "loss 2.345", "validation 2.500", "1,234 tokens/s", seconds_left=62)
    with progress("validation", 40, "batches") as tell_inner:
        tell_inner(7)
        time.sleep(0.3)
    logging.warning("SIGTERM: a line above the bar")
    time.sleep(0.3)
    if sys.argv[1:]:
        raise SystemExit("error: it failed")
"""
MOVES = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?25[lh]|\r\n|\r|[^\x1b\r\n]+")


def on_terminal(columns: int, *arguments: str) -> str:
    """All that a program with a bar writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, *arguments], stderr=theirs, stdout=theirs, env=plain | {"TERM": "xterm"}
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:
            break
    process.wait()
    os.close(ours)
    return written.decode().replace("\N{NO-BREAK SPACE}", " ")


def screen(written: str) -> list[str]:
    """What stands there in the end: text, cursor up, and erased lines are all that a bar uses."""
    lines, row, column = [""], 0, 0
    for move in MOVES.finditer(written):
        text = move[0]
        if text == "\r\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text == "\r":
            column = 0
        elif move[2] == "A":
            row -= int(move[1] or 1)
        elif move[2] == "K":
            lines[row] = ""
        elif not text.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def drawn(written: str) -> list[str]:
    """Every line that was on the screen at some time, without colours."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", written)]


@pytest.mark.parametrize("columns", [24, 40, 80, 160])
def test_a_bar_takes_one_line_of_any_terminal_and_tells_first_what_matters_most(columns: int) -> None:
    written = on_terminal(columns)
    bars = [line for line in drawn(written) if line.startswith("train")]
    assert bars and all(len(line) <= columns for line in bars)
    told = max(bars, key=len)
    order = [("12 of 80", 24), ("1 min 2 s left", 40), ("loss 2.345", 80), ("1,234 tokens/s", 160)]
    assert [part for part, _ in order if part in told] == [part for part, least in order if columns >= least]


def test_a_bar_within_another_is_drawn_below_it_and_log_lines_above() -> None:
    written = on_terminal(120)
    assert any(line.startswith("validation") and "7 of 40 batches" in line for line in drawn(written))
    assert screen(written) == ["SIGTERM: a line above the bar"]


def test_nothing_is_left_drawn_after_an_error() -> None:
    assert screen(on_terminal(80, "fail")) == ["SIGTERM: a line above the bar", "error: it failed"]


@pytest.mark.parametrize(
    ("total", "notes", "line"),
    [
        (40_000_000, (), r"doing: 10 of 40 MB, [\d.]+ (s|min .*) left, [\d,.]+ MB a second"),
        (40_000_000, ("3 rows",), r"doing: 10 of 40 MB, .* left, 3 rows"),
        (0, ("3 rows",), r"doing: [\d.]+ s, 3 rows"),
        (4_400_000, (), r"doing: 1.1 of 4.4 MB, .*"),
        (1_200, (), r"doing: 0.0003 of 0.0012 MB, .*"),
    ],
)
def test_elsewhere_there_are_lines(
    total: int, notes: tuple[str, ...], line: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    caplog.set_level(logging.INFO, "truetune")
    with progress("doing", total, "MB", 1e-6) as tell:
        tell(total / 4, *notes)
    assert re.fullmatch(line, caplog.messages[0].replace("\N{NO-BREAK SPACE}", " "))


def test_the_end_is_no_line_of_its_own(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    caplog.set_level(logging.INFO, "truetune")
    with progress("doing", 1_300, "MB", 1e-6) as tell:
        tell(1_300)
    assert caplog.messages == []


def test_time_left_has_the_validations_that_are_still_to_come() -> None:
    from train.trainer.metrics import TrainingProgress

    shown, told = TrainingProgress(), []
    shown.tell = lambda done, *notes, seconds_left: told.append((done, seconds_left))
    shown.step_seconds, shown.steps = 20.0, 10  # 2 s a step
    shown.validation_seconds, shown.validations = 12.0, 2  # 6 s each
    state = SimpleNamespace(global_step=10, max_steps=25, eval_steps=5)
    shown.on_log(None, state, None, {"loss": 2.0})
    shown.on_evaluate(None, state, None, {"eval_loss": 2.0})
    assert told == [(10, 15 * 2 + 4 * 6), (10, 15 * 2 + 3 * 6)]  # after steps 10, 15, 20 and 25
