"""The chat in the terminal and the single answer."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from gguf_fixture import CONTEXT, NAME, WORDS, Server, environment, free_port

pytest_plugins = ["serve_fixtures"]


def chat(
    folder: Path, port: int, *arguments: str, given: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.chat", f"{NAME}.yaml", *arguments],
        cwd=folder,
        env=environment(PORT=str(port), **variables),
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ask_writes_the_answer_and_nothing_else(server: Server):
    done = chat(server.folder, server.port, "--ask", "apple")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) <= set(WORDS)
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("question", ['it\'s "quoted" $HOME `ls`', "日本語 🙂", "two\nlines"])
def test_ask_takes_any_question_from_the_environment(server: Server, question: str):
    done = chat(server.folder, server.port, "--ask", Q=question)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_ask_reads_standard_input(server: Server):
    done = chat(server.folder, server.port, "--ask", "-", given="apple")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_ask_without_a_question_shows_how(server: Server):
    done = chat(server.folder, server.port, "--ask", Q="  ")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no question given: make ask Q=")


def test_ask_too_much_names_the_key(server: Server):
    done = chat(server.folder, server.port, "--ask", "apple " * CONTEXT)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: \d+ tokens, but serve.context is {CONTEXT}: .*\n", done.stderr)


def test_chat_works_in_a_pipe(server: Server):
    done = chat(server.folder, server.port, given="apple\n\n/reset\nbread\n/exit\n/quit\nnever asked\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(NAME)
    assert len(re.findall(r"^\d+ tokens, [\d.]+ a second, the first after [\d.]+ s$", done.stdout, re.MULTILINE)) == 2
    assert "forgotten" in done.stdout
    assert done.stdout.count("/reset forgets the conversation") == 2  # at the start, and for a command that is none


def test_what_is_not_served_is_told(server: Server, tmp_path: Path):
    shutil.copy(server.folder / f"{NAME}.yaml", tmp_path)
    done = chat(tmp_path, server.port, "--ask", "apple")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: runs/{NAME} is not served yet: run 'make serve RECIPE={NAME}.yaml' in ")


def test_chat_remembers_until_reset(server: Server):
    first, second = "a" * (CONTEXT // 3), "b" * (CONTEXT * 2 // 3)  # a letter is a token here
    done = chat(server.folder, server.port, given=f"{first}\n{second}\n/reset\n{second}\n")
    assert done.returncode == 0
    assert done.stdout.count("but serve.context is") == 1


def test_nothing_there(server: Server):
    port = free_port()
    done = chat(server.folder, port, "--ask", "apple")
    assert done.returncode == 1
    start = f"run 'make serve RECIPE={NAME}.yaml' in another terminal first"
    assert done.stderr == f"error: nothing answers on http://127.0.0.1:{port}: {start}\n"


def test_another_model_there(server: Server, tmp_path: Path):
    for part in (".secrets", "runs"):
        shutil.copytree(server.folder / part, tmp_path / part)
    (tmp_path / "runs" / NAME).rename(tmp_path / "runs" / "other")
    shutil.copy(server.folder / f"{NAME}.yaml", tmp_path / "other.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "serve.chat", "other.yaml", "--ask", "apple"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {server.url} serves 'small', not 'other': ")


def test_another_key(server: Server, tmp_path: Path):
    shutil.copytree(server.folder / "runs", tmp_path / "runs")
    shutil.copy(server.folder / f"{NAME}.yaml", tmp_path)
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "api-key").write_text("another\n")
    done = chat(tmp_path, server.port, "--ask", "apple")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {server.url} refuses the key: ")


def test_control_c_stops_the_answer_then_the_chat(server: Server):
    control_c, engine = b"\x03", server.engine()
    assert engine
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(server.folder)
        os.execve(sys.executable, [sys.executable, "-m", "serve.chat", f"{NAME}.yaml"], environment(TERM="xterm"))
    try:
        expect(terminal, b"> ")
        os.kill(engine, signal.SIGSTOP)
        os.write(terminal, b"apple\n")
        expect(terminal, b"...")
        os.write(terminal, control_c)
        expect(terminal, b"stopped")
        os.kill(engine, signal.SIGCONT)
        expect(terminal, b"> ")
        os.write(terminal, b"apple\n")
        expect(terminal, b"a second")
        expect(terminal, b"> ")
        assert ended(pid, press=lambda: os.write(terminal, control_c)) == 0
    finally:
        os.kill(engine, signal.SIGCONT)
        os.close(terminal)  # which hangs up on a chat that is still there


def ended(pid: int, press: Callable[[], object], seconds: float = 15) -> int:
    """Exit code of a process that a key ends; pressed again, as readline may sleep through one at its prompt."""
    end = time.monotonic() + seconds
    pressed_at = 0.0
    while time.monotonic() < end:
        if time.monotonic() - pressed_at > 3:
            pressed_at = time.monotonic()
            with suppress(OSError):
                press()
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    raise AssertionError(f"it is still there after {seconds} s")


def expect(terminal: int, text: bytes, seconds: float = 15) -> None:
    """Read until the terminal shows `text`."""
    shown, end = b"", time.monotonic() + seconds
    while text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"no {text!r} in {shown!r}"
        shown += os.read(terminal, 1)  # so that what follows is left for the next call
