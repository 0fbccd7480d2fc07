"""Who answers in the playground: processes loaded when first asked, two at most, and their streamed answers."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, Self

from pipeline.error import UserError
from pipeline.run import Run
from serve.asking.endpoint import free_port, is_healthy, url_of
from serve.asking.key import make_key, read_key
from serve.chat import Answer, failures, reason
from serve.comparing.artefacts import Artefact, client_of
from serve.engines import weights
from serve.gateway import engine
from serve.gateway.context import trained_context
from serve.running.backend import Endpoint

LOADED = 2  # as many as are compared; a third would cost the memory of both
LOAD_SECONDS = 600
GRACE_SECONDS = 3

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `top_k` 0 leaves it out."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int

    def arguments(self, is_ours: bool) -> dict[str, Any]:
        """For the client; `top_k` and `min_p` are not in OpenAI's API, but our engines have defaults of their own."""
        named = {key: value for key, value in asdict(self).items() if key != "top_k"}
        extra = {"top_k": self.top_k, "min_p": 0.0} if is_ours else {"top_k": self.top_k} if self.top_k else {}
        return named | {"extra_body": extra}


@dataclass(frozen=True)
class Said:
    """An answer so far; `speed` once it is whole."""

    text: str
    status: str
    speed: str = ""


@dataclass
class Loaded:
    """A process of ours with a model in it."""

    process: "subprocess.Popen[bytes]"
    port: int


class Voices:
    """The loaded processes, the one asked last at the end; loading is done by one thread that lives as long as they."""

    def __init__(self, context: int, log_file: Path, key_file: Path) -> None:
        self.context = context
        self.log_file = log_file
        self.key_file = key_file  # of this playground's own processes alone
        self.loaded: dict[str, Loaded] = {}
        # Linux ends the engine with the thread that started it, so a web server's passing threads must not.
        self.loader = ThreadPoolExecutor(1, "loader")
        self.ended = Event()
        self._watchdog: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.log_file.write_text("", encoding="utf-8")
        make_key(self.key_file)
        guard = [sys.executable, "-m", "serve.running.watchdog"]
        self._watchdog = subprocess.Popen(guard, stdin=subprocess.PIPE, text=True, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.loader.shutdown(cancel_futures=True)
        for name in list(self.loaded):
            self._end(self.loaded.pop(name).process)
        assert self._watchdog
        self._watchdog.communicate()

    def endpoint(self, artefact: Artefact) -> "Future[Endpoint]":
        """Where the artefact answers, once it is loaded."""
        return self.loader.submit(self._endpoint, artefact)

    def answer(
        self, artefact: Artefact, messages: list[dict[str, str]], sampling: Sampling, stop: Event
    ) -> Iterator[Said]:
        """The answer as it is loaded for and as it arrives, ended early by `stop`.

        Raises:
            UserError: it cannot be loaded, or gives no whole answer.
        """
        began, coming = time.monotonic(), self.endpoint(artefact)
        while not coming.done():
            try:
                coming.result(timeout=0.5)
            except NotYet:
                yield Said("", f"loading {artefact.model}: {time.monotonic() - began:.0f} s")
                if stop.is_set() and coming.cancel():
                    return
        endpoint, answer = coming.result(), None
        yield Said("", "reading the prompt")
        try:
            with client_of(endpoint.url, endpoint.key) as client:
                is_ours = bool(artefact.recipe)
                answer = Answer(client, endpoint.model, messages, **sampling.arguments(is_ours))  # type: ignore[arg-type]
                for _ in answer:
                    yield Said(answer.text, "answering")
                    if stop.is_set():
                        break
        except failures() as error:
            raise UserError(reason(error)) from None
        yield Said(answer.text, "", _speed(answer, stop.is_set()))

    def _endpoint(self, artefact: Artefact) -> Endpoint:
        if artefact.kind == "endpoint":
            return Endpoint(artefact.place, artefact.model, artefact.key)
        name = f"{artefact.place} {artefact.made_at}"
        if name in self.loaded and self.loaded[name].process.poll() is not None:
            self._end(self.loaded.pop(name).process)
        if name in self.loaded:
            self.loaded[name] = self.loaded.pop(name)
        else:
            for oldest in list(self.loaded)[: max(0, len(self.loaded) - LOADED + 1)]:
                self._end(self.loaded.pop(oldest).process)
            self.loaded[name] = self._load(artefact)
        return Endpoint(f"{url_of(self.loaded[name].port)}/v1", artefact.model, read_key(self.key_file))

    def _load(self, artefact: Artefact) -> Loaded:
        """Start the artefact's process, once its files are proved to be what their stage wrote, and await it."""
        run = Run(artefact.recipe)
        run.verified(artefact.stage, only=artefact.place if artefact.kind == "gguf" else "")
        port = free_port()
        with self.log_file.open("ab") as file:
            argv = [sys.executable, "-m", *self._command(artefact, port)]
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True)
        self._note(process, started=True)
        loaded, deadline = Loaded(process, port), time.monotonic() + LOAD_SECONDS
        try:
            while not is_healthy(port, timeout=1):
                if process.poll() is not None:
                    raise UserError(f"{artefact.name} ended while loading: see {self.log_file}")
                if self.ended.wait(0.1):
                    raise UserError(f"{artefact.name} was not loaded: the playground ends")
                if time.monotonic() > deadline:
                    raise UserError(f"{artefact.name} did not load within {LOAD_SECONDS} s: see {self.log_file}")
        except BaseException:
            self._end(process)
            raise
        return loaded

    def _command(self, artefact: Artefact, port: int) -> list[str]:
        if artefact.kind == "weights":
            name = "merged" if artefact.model == "merged" else "base"
            return [
                weights.__name__,
                _json(weights.Settings(artefact.place, name, artefact.adapter, port, str(self.key_file))),
            ]
        context = min(self.context, trained_context(Path(artefact.place)) or self.context)
        named = {"model": artefact.place, "name": artefact.model, "port": port, "key_file": str(self.key_file)}
        return [engine.__name__, _json(engine.Settings(**named, context=context, slots=1, threads=0, temperature=0.0))]

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """End a process: politely, then not."""
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin:
            process.stdin.close()
        self._note(process, started=False)

    def _note(self, process: "subprocess.Popen[bytes]", started: bool) -> None:
        """Tell the watchdog which processes are to end with this one, however it ends."""
        assert self._watchdog and self._watchdog.stdin
        with suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{'+' if started else '-'}{process.pid}\n")
            self._watchdog.stdin.flush()


def together(answers: list[Iterator[Said]], at_once: bool) -> Iterator[tuple[int, Said | UserError]]:
    """What each of the answers says next, by its number: all at the same time, or one after another."""
    import queue
    import threading

    said: queue.Queue[tuple[int, Said | UserError | None]] = queue.Queue()

    def speak(numbers: list[int]) -> None:
        for number in numbers:
            try:
                for part in answers[number]:
                    said.put((number, part))
            except UserError as error:
                said.put((number, error))
            except Exception as error:  # a bug: the page tells it, the log has its traceback
                log.exception("the playground could not answer")
                said.put((number, UserError(f"{type(error).__name__}: {error}")))
            said.put((number, None))

    numbers = list(range(len(answers)))
    for group in [[number] for number in numbers] if at_once else [numbers]:
        threading.Thread(target=speak, args=(group,), daemon=True).start()
    left = len(answers)
    while left:
        number, part = said.get()
        if part is None:
            left -= 1
        else:
            yield number, part


def _speed(answer: Answer, is_stopped: bool) -> str:
    """How much came, how fast, how soon, and why it ended; a rate over too short a time would say nothing."""
    seconds = answer.last_at - answer.first_at
    return " · ".join(
        [
            *([f"{answer.tokens} token{'s' * (answer.tokens > 1)}"] if answer.tokens else []),
            *([f"{(answer.tokens - 1) / seconds:.1f} tokens/s"] if answer.tokens > 1 and seconds > 0.05 else []),
            *([f"first after {answer.first_at - answer.asked_at:.2f} s"] if answer.first_at else ["an empty answer"]),
            *(["stopped"] if is_stopped else ["cut at max tokens"] if answer.finish_reason == "length" else []),
        ]
    )


def _json(settings: Any) -> str:
    return json.dumps(asdict(settings))
