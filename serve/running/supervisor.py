"""The supervisor of services: starts them in order, starts each again when it fails, ends them all, killed or not."""

import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pipeline.command import SILENT
from pipeline.error import UserError
from pipeline.progress import progress
from serve.asking.endpoint import port_problem
from serve.running.backend import Service

HEALTH_SECONDS = 10.0  # between two looks
MISSES = 3
FAILURES = 5
STEADY_SECONDS = 60
LONGEST_PAUSE_SECONDS = 30
LOG_BYTES = 10_000_000
# What a service that inherits nothing still needs to run as any program does.
PLAIN = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", *SILENT)

log = logging.getLogger("truetune")


@dataclass
class Condition:
    """How a service is, for `make status`."""

    name: str
    port: int | None
    pid: int | None = None
    state: str = "waiting"
    restarts: int = 0
    since: str = ""


class Supervisor:
    """All services of one session; `on_change` is called whenever one of them starts, answers or ends."""

    def __init__(self, services: Sequence[Service], on_change: Callable[[], None] = lambda: None) -> None:
        self.ended = threading.Event()
        self.keepers: list[Keeper] = []
        self.on_change = on_change
        self.since = now()
        self._watchdog: subprocess.Popen[str] | None = None
        for service in services:
            service.log_file.parent.mkdir(parents=True, exist_ok=True)
            service.log_file.write_text("", encoding="utf-8")
            self.add(service)

    def __enter__(self) -> Self:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import watchdog; watchdog()"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # neither a terminal's Ctrl-C nor its end reaches it
        )
        return self

    def __exit__(self, *_: object) -> None:
        wishes = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a second one must leave nothing behind
        before = {wish: signal.signal(wish, signal.SIG_IGN) for wish in wishes}
        self.ended.set()
        for keeper in reversed(self.keepers):
            keeper.stop()
        assert self._watchdog
        self._watchdog.communicate()
        for wish, handler in before.items():  # the proof goes on after its server
            signal.signal(wish, handler)

    def add(self, service: Service) -> "Keeper":
        """One more service, which is not started yet."""
        self.keepers.append(Keeper(service, self))
        return self.keepers[-1]

    def remove(self, keeper: "Keeper") -> None:
        """End a service, and forget it."""
        keeper.stop()
        self.keepers.remove(keeper)

    def start(self) -> None:
        """Start the services one after another, each when the one before answers.

        Raises:
            UserError: one does not answer, or its answer is wrong; says why.
        """
        for keeper in self.keepers:
            if problem := keeper.start():
                raise UserError(f"the {keeper.service.name} {problem}: see {keeper.service.log_file}")

    def watch(self) -> None:
        """Keep the services answering, until a signal.

        Raises:
            UserError: one failed too often, or must not be started again.
        """
        failures: queue.Queue[BaseException] = queue.Queue()
        for keeper in self.keepers:
            threading.Thread(target=keeper.keep, args=(failures.put,), daemon=True).start()
        raise failures.get()

    def peak_rss_bytes(self) -> int:
        """The largest resident memory of a service's process so far; 0 where the system does not tell."""
        return max((keeper.peak_rss_bytes() for keeper in self.keepers), default=0)

    def note(self, group: int, started: bool) -> None:
        """Tell the watchdog which process groups are to end with this process."""
        assert self._watchdog and self._watchdog.stdin
        with suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{'+' if started else '-'}{group}\n")
            self._watchdog.stdin.flush()


class Keeper:
    """One service, and one process of it after another."""

    def __init__(self, service: Service, supervisor: Supervisor) -> None:
        self.service = service
        self.supervisor = supervisor
        self.process: subprocess.Popen[bytes] | None = None
        self.condition = Condition(service.name, service.port)
        self._starting = threading.Lock()

    def start(self) -> str:
        """Start a process and wait until it answers; what went wrong, or nothing."""
        self.stop()
        if self.service.port and (problem := port_problem(self.service.port)):
            return f"could not start: port {self.service.port} {problem}"
        begin = self._spawn()
        self._change("starting")
        doing = self.service.loading or f"waiting for the {self.service.name}"
        with progress(doing) as tick:
            deadline = time.monotonic() + self.service.ready_seconds
            while time.monotonic() < deadline and not self.supervisor.ended.is_set():
                if self.process is None or self.process.poll() is not None:
                    return f"{self._end()} while {doing}: {self._last_words(begin)}"
                if self.service.is_ready():
                    problem = self.service.problem()
                    self._change("wrong" if problem else "answers")
                    return problem
                tick()
                time.sleep(0.05)
        return (
            "was ended" if self.supervisor.ended.is_set() else f"did not answer within {self.service.ready_seconds} s"
        )

    def keep(self, fail: Callable[[BaseException], None]) -> None:
        """Keep the process that has started answering, or another in its place; what forbids that goes to `fail`."""
        try:
            self._keep()
        except Exception as error:
            fail(error)

    def stop(self) -> None:
        """End the process and what it started: politely, then not."""
        with self._starting:
            process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.service.grace_seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.supervisor.note(process.pid, started=False)
        self._change("ended")

    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.process is not None and self.process.poll() is None

    def peak_rss_bytes(self) -> int:
        """The process's largest resident memory so far; 0 where the system does not tell."""
        status = Path(f"/proc/{self.condition.pid}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(found[1]) * 1024 if found else 0

    def _spawn(self) -> int:
        """Start a process in a group of its own, so that all of it can be ended; where its log begins."""
        inherited = (
            os.environ if self.service.inherits else {key: os.environ[key] for key in PLAIN if key in os.environ}
        )
        with self._starting, self.service.log_file.open("ab") as file, open(os.devnull, "rb") as nothing:
            begin = file.tell()
            if self.supervisor.ended.is_set():
                return begin
            self.process = subprocess.Popen(
                self.service.argv,
                stdin=nothing,
                stdout=file,
                stderr=file,
                env={**inherited, **self.service.environment},
                start_new_session=True,
            )
            self.supervisor.note(self.process.pid, started=True)
            return begin

    def _keep(self) -> None:
        name, failures, problem = self.service.name, 0, ""
        while True:
            began = time.monotonic()
            problem = problem or self._await_failure()
            if self.supervisor.ended.is_set():
                return
            failures = 1 if time.monotonic() - began >= STEADY_SECONDS else failures + 1
            if failures >= FAILURES:
                see = f"see {self.service.log_file}"
                raise UserError(f"the {name} failed {failures} times in a row, at last it {problem}: {see}")
            pause = min(2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
            self._change("failed")
            log.warning("the %s %s: starting it again in %d s", name, problem, pause)
            if self.supervisor.ended.wait(pause):
                return
            self.service.check()
            self.condition.restarts += 1
            problem = self.start()
            if not problem:
                log.info("the %s is serving again", name)

    def _await_failure(self) -> str:
        misses = 0
        while misses < MISSES and self.process:
            try:
                self.process.wait(HEALTH_SECONDS)
                return f"{self._end()}: {self._last_words()}"
            except subprocess.TimeoutExpired:
                misses = 0 if self.service.is_ready() else misses + 1
            if self.service.log_file.stat().st_size > LOG_BYTES:  # keep the last part, go on in an empty file
                shutil.copy(self.service.log_file, f"{self.service.log_file}.1")
                os.truncate(self.service.log_file, 0)
        return f"did not answer {MISSES} times in a row"

    def _change(self, state: str) -> None:
        self.condition.state = state
        self.condition.pid = self.process.pid if self.process else None
        self.condition.since = now()
        self.supervisor.on_change()

    def _end(self) -> str:
        code = self.process.returncode if self.process else 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _last_words(self, begin: int | None = None) -> str:
        """The first error that llama.cpp logged after `begin`: those that follow are less exact; else the last line."""
        with self.service.log_file.open("rb") as file:
            file.seek(begin or 0)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [match[1] for line in lines if (match := re.match(r"[\d.]+ E (.*)", line))]
        return errors[0] if errors and begin is not None else lines[-1] if lines else "it logged nothing"


def watchdog() -> None:
    """End what a supervisor started when the supervisor itself is killed, which ends this process's standard input.

    That names process groups, one a line: `+123` is started, `-123` has ended.
    """
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def now() -> str:
    """This moment, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
