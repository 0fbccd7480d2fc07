"""The supervisor of the engine: starts it, waits until it answers, starts it again when it fails, ends it."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from recipe.error import UserError
from recipe.files import fingerprint
from serve.endpoint import ERRORS, ask, is_healthy, port_problem, served_model
from serve.engine import Settings

READY_SECONDS = 600
HEALTH_SECONDS = 10.0  # between two looks, and the longest wait for an answer
MISSES = 3
FAILURES = 5
STEADY_SECONDS = 60
LONGEST_PAUSE_SECONDS = 30
GRACE_SECONDS = 5
LOG_BYTES = 10_000_000

log = logging.getLogger("truetune")


class Supervisor:
    """One engine after another, all with the same settings."""

    def __init__(self, settings: Settings, key: str, log_file: Path, known: dict[str, str | int]) -> None:
        self.settings = settings
        self.key = key
        self.log_file = log_file
        self.known = known
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.log_file.write_text("", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        for wish in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave the engine behind
            signal.signal(wish, signal.SIG_IGN)
        self.stop()

    def start(self) -> str:
        """Start an engine and wait until it answers; what went wrong, or nothing."""
        self.stop()
        if problem := port_problem(self.settings.port):
            return f"could not start: port {self.settings.port} {problem}"
        with self.log_file.open("ab") as file:
            begin = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.engine", json.dumps(asdict(self.settings))],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor only
            )
        with _progress(f"loading {self.settings.model}") as tick:
            deadline = time.monotonic() + READY_SECONDS
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    return f"{self._end()} while loading: {self._last_words(begin)}"
                if is_healthy(self.settings.port, timeout=1):
                    return self._proof()
                tick()
                time.sleep(0.05)
        return f"did not answer within {READY_SECONDS} s"

    def watch(self) -> None:
        """Keep an engine that has started answering, until a signal.

        Raises:
            UserError: it failed too often, or its model's file is no longer the one that was proved.
        """
        failures, problem = 0, ""
        while True:
            began = time.monotonic()
            problem = problem or self._await_failure()
            failures = 1 if time.monotonic() - began >= STEADY_SECONDS else failures + 1
            if failures >= FAILURES:
                raise UserError(
                    f"the engine failed {failures} times in a row, at last it {problem}: see {self.log_file}"
                )
            pause = min(2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
            log.warning("the engine %s: starting it again in %d s", problem, pause)
            time.sleep(pause)
            if fingerprint(Path(self.settings.model)) != self.known:
                raise UserError(f"{self.settings.model} was replaced while it was served: run 'make serve' again")
            problem = self.start()
            if not problem:
                log.info("serving again")

    def stop(self) -> None:
        """End the engine: politely, then not."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self.process = None

    def peak_rss_bytes(self) -> int | None:
        """The engine's largest resident memory so far, where the system tells."""
        status = Path(f"/proc/{self.process.pid}/status") if self.process else None
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status and status.exists() else None
        return int(found[1]) * 1024 if found else None

    def _await_failure(self) -> str:
        assert self.process is not None
        misses = 0
        while misses < MISSES:
            try:
                self.process.wait(HEALTH_SECONDS)
                return f"{self._end()}: {self._last_words()}"
            except subprocess.TimeoutExpired:
                misses = 0 if is_healthy(self.settings.port, HEALTH_SECONDS) else misses + 1
            if self.log_file.stat().st_size > LOG_BYTES:
                os.truncate(self.log_file, 0)
        return f"did not answer {MISSES} times in a row"

    def _proof(self) -> str:
        """Ask for one token, as a client would; what is wrong with the answer, or nothing."""
        wanted, name = self.settings.context, self.settings.name
        question = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            model = served_model(self.settings.port, self.key)
            status, answer = ask(self.settings.port, "/v1/chat/completions", self.key, question, timeout=READY_SECONDS)
        except (UserError, *ERRORS) as error:
            return f"does not answer a question: {error}"
        if status != 200 or not answer.get("choices"):
            return f"does not answer a question: {answer.get('error', answer)}"
        if model["id"] != name or answer["model"] != name:
            return f"answers as {model['id']!r}, not as {name!r}"
        if model["meta"]["n_ctx"] < wanted:
            return f"gives a conversation {model['meta']['n_ctx']} tokens, not the {wanted} of serve.context"
        return ""

    def _end(self) -> str:
        assert self.process is not None
        code = self.process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _last_words(self, begin: int | None = None) -> str:
        """The first error that llama.cpp logged after `begin`: those that follow are less exact; else the last line."""
        with self.log_file.open("rb") as file:
            file.seek(begin or 0)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [match[1] for line in lines if (match := re.match(r"[\d.]+ E (.*)", line))]
        return errors[0] if errors and begin is not None else lines[-1] if lines else "it logged nothing"


@contextmanager
def _progress(doing: str) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal, else a line every few seconds."""
    began = said = time.monotonic()

    def line() -> None:
        nonlocal said
        if time.monotonic() - said >= 5:
            said = time.monotonic()
            log.info("%s: %.0f s", doing, said - began)

    if not sys.stderr.isatty():
        yield line
        return
    from rich.console import Console

    with Console(stderr=True).status(doing) as status:
        yield lambda: status.update(f"{doing}: {time.monotonic() - began:.0f} s")
