"""The boundary: exit codes and messages, the frozen usage of every command, and an end by signal that unwinds."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.stages import STAGES

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
USAGE = """usage: python -m {} RECIPE [key=value ...]

{}.

RECIPE is a shipped recipe's name or the path of a YAML file; key=value overrides one of its keys.
"""
# The whole surface of the command line. A flag or a command is added here first.
DOES = {
    "train.data": "Read, check and split the conversations",
    "train.base": "Bring the base model into one plain folder",
    "train.run": "Train the base by the recipe's method and tuner",
    "convert.merge": "Make one set of full-precision weights of what was trained",
    "convert.gguf": "Convert to GGUF and quantize",
    "serve.api": "Serve in a chat window and over an OpenAI-compatible API",
    "serve.chat": "Chat with the served model in the terminal; with --ask QUESTION, print one answer",
    "pipeline.resolve": "Check the recipe and tell Make what changed",
}


def python(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("module", DOES)
def test_help_is_frozen(module: str, flag: str) -> None:
    done = python("-m", module, flag)
    assert (done.returncode, done.stdout, done.stderr) == (0, USAGE.format(module, DOES[module]), "")


def test_every_stage_has_a_command_with_help() -> None:
    for stage in STAGES:
        done = python("-m", stage.module, "--help")
        assert (done.returncode, done.stdout) == (0, USAGE.format(stage.module, stage.does)), done.stderr


@pytest.mark.parametrize("arguments", [[], ["--tiny"], ["train.epochs=1", "tiny"]])
def test_no_recipe_is_told_with_the_usage(arguments: list[str]) -> None:
    done = python("-m", "train.data", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no recipe given: usage: python -m train.data RECIPE [key=value ...]\n"


def bounded(statement: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A statement run inside the boundary, in a process of its own."""
    imports = "import errno, os, sys\nfrom pipeline.command import boundary\nfrom pipeline import UserError"
    code = f"{imports}\nwith boundary():\n    {statement}"
    return python("-c", code, folder=folder)


ENDS = {
    "success": ("print('made')", 0, "made\n", ""),
    "one problem": ("raise UserError('a 1: fix it')", 1, "", "error: a 1: fix it\n"),
    "several problems": (
        "raise UserError('a: fix it', 'b: fix it too')",
        1,
        "",
        "error: a: fix it\nerror: b: fix it too\n",
    ),
    "more than anyone reads": (
        "raise UserError(*(f'a {number}' for number in range(20_000)))",
        1,
        "",
        "".join(f"error: a {number}\n" for number in range(20)) + "error: and 19,980 more of the kind\n",
    ),
    "a text from outside": (
        "raise UserError('x' * 9999 + chr(10) + 'y' * 9999)",
        1,
        "",
        f"error: {'x' * 1000} ... {'y' * 1000}\n",
    ),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, "", "stopped: the same command resumes from here\n"),
    "full disk": (
        "open('/dev/full', 'wb', buffering=0).write(b'x')",
        1,
        "",
        "error: the disk is full ({folder}): free some space and run again\n",
    ),
    "full disk, with a name": (
        "raise OSError(errno.ENOSPC, 'No space left on device', 'runs/x')",
        1,
        "",
        "error: the disk is full (runs/x): free some space and run again\n",
    ),
    "full quota": (
        "raise OSError(errno.EDQUOT, 'Disk quota exceeded', 'runs/x')",
        1,
        "",
        "error: the disk is full (runs/x): free some space and run again\n",
    ),
    "full disk, as safetensors tells it": (
        "raise RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)')",
        1,
        "",
        "error: the disk is full ({folder}): free some space and run again\n",
    ),
    "read-only disk": (
        "raise OSError(errno.EROFS, 'Read-only file system', 'runs/x')",
        1,
        "",
        "error: runs/x: Read-only file system: let this user read and write there\n",
    ),
    "another user's folder": (
        "raise PermissionError(errno.EACCES, 'Permission denied', 'runs/x')",
        1,
        "",
        "error: runs/x: Permission denied: let this user read and write there\n",
    ),
    "no memory": (
        "bytearray(1 << 62)",
        1,
        "",
        "error: out of memory: lower train.max_length or choose a smaller base, then run again\n",
    ),
    "reader gone": ("raise BrokenPipeError", 1, "", ""),
    "exit of its own": ("sys.exit(7)", 7, "", ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_each_end_has_its_code_and_its_words(end: str, tmp_path: Path) -> None:
    statement, code, stdout, stderr = ENDS[end]
    done = bounded(statement, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, stderr.format(folder=tmp_path))


@pytest.mark.parametrize("bug", ["KeyError('x')", "OSError(errno.EIO, 'broken')", "ValueError('x')"])
def test_a_bug_keeps_its_traceback(bug: str, tmp_path: Path) -> None:
    done = bounded(f"raise {bug}", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert not re.search("^error: ", done.stderr, re.M)


def test_what_a_terminal_cannot_spell_is_shown_by_its_code() -> None:
    code = "from pipeline.command import boundary\nwith boundary():\n    print('Gr\\u00fc\\u00dfe \\u27e6')"
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (found.returncode, found.stdout) == (0, b"Gr\xfc\xdfe \\u27e6\n"), found.stderr


def test_a_reader_that_is_gone_is_no_traceback(tmp_path: Path) -> None:
    code = "from pipeline.command import boundary\nwith boundary():\n    while True: print('x' * 9999)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout and writer.stderr
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 1


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unwinds(wish: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal, time; from pipeline.command import boundary\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background of a shell ignores it
        "with boundary():\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    finally: open('unwound', 'w').close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        start = time.monotonic()
        process.send_signal(wish)
        assert process.stderr.read() == b"stopped: the same command resumes from here\n"
    assert process.returncode == 130
    assert time.monotonic() - start < 10
    assert (tmp_path / "unwound").exists()
