"""What can answer in the playground: every run's artefacts, what is served, other endpoints; two at most are loaded."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Self

from pipeline.error import UserError
from pipeline.model import Trained
from pipeline.run import Receipt, Run
from serve.asking.endpoint import (
    Answer,
    client_of,
    failures,
    free_port,
    is_healthy,
    make_key,
    models_of,
    read_key,
    reason,
    url_of,
)
from serve.engines import llamacpp
from serve.running.backend import Endpoint, Service
from serve.running.supervisor import Keeper, Supervisor

WEIGHTS = "serve.engines.weights"
LOADED = 2  # as many as are compared; a third would cost the memory of both
LOAD_SECONDS = 600
GRACE_SECONDS = 3

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Artefact:
    """One choice of the page.

    `place` is a folder of weights, a GGUF file or the URL of an endpoint; `made_at` tells one training's from the
    next's; `adapter` lies beside the base in one process, which answers as `base` and as `adapter`. A training of whole
    weights leaves `trained`, a model of its own.
    """

    name: str
    about: str
    kind: str  # weights, gguf or endpoint
    place: str
    model: str
    recipe: str = ""
    stage: str = ""
    adapter: str = ""
    made_at: str = ""
    key: str = field(default="", repr=False)

    def label(self, recipe: str) -> str:
        """How a page about `recipe` names it."""
        other = f"{self.recipe}: " if self.recipe not in ("", recipe) else ""
        return f"{other}{self.model if self.kind != 'endpoint' else 'served'} · {self.about}"


def artefacts(recipe: str, root: Path = Path("runs")) -> dict[str, Artefact]:
    """Every choice by its name, those of `recipe` first; a run whose receipts are damaged has none.

    Raises:
        UserError: a receipt of `recipe` itself is damaged.
    """
    found = [*_of_run(Run(recipe, root))]
    for folder in sorted(path for path in root.glob("*") if path.is_dir() and path.name != recipe):
        try:
            found += _of_run(Run(folder.name, root))
        except UserError:
            continue
    known = {(artefact.place, artefact.model) for artefact in found}
    found += (other for other in _of_environment() if (other.place, other.model) not in known)
    return {artefact.name: artefact for artefact in found}


def _of_run(run: Run) -> Iterator[Artefact]:
    receipts = {name: run.find_receipt(name) for name in ("serve", "train", "merge", "gguf", "base")}
    if (served := receipts["serve"]) and (artefact := _served(run, served)):
        yield artefact
    whole = receipts["train"] is not None and Trained.read(run.path("trained")).kind == "weights"
    base, adapter = str(run.path("base")), str(run.path("trained")) if receipts["train"] and not whole else ""
    since = "".join(receipt.started_at for name in ("base", "train") if (receipt := receipts[name]))
    beside = {"kind": "weights", "place": base, "recipe": run.name, "adapter": adapter, "made_at": since}
    if whole and (train := receipts["train"]):
        place, about = str(run.path("trained")), "as trained"
        yield Artefact(
            f"{run.name}/trained", about, "weights", place, "trained", run.name, "train", "", train.started_at
        )
    elif receipts["train"] and receipts["base"]:
        yield Artefact(f"{run.name}/adapter", "on the base, as trained", model="adapter", stage="train", **beside)
    if merge := receipts["merge"]:
        place, about = str(run.path("merged")), "one set of weights"
        yield Artefact(f"{run.name}/merged", about, "weights", place, "merged", run.name, "merge", "", merge.started_at)
    for path in receipts["gguf"].outputs if receipts["gguf"] else ():
        if Path(path).match(f"{run.name}-*.gguf") and Path(path).is_file():  # the importance matrix is no model
            kind = Path(path).stem.removeprefix(f"{run.name}-")
            about = f"GGUF, {Path(path).stat().st_size / 1e6:.0f} MB"
            since = receipts["gguf"].started_at if receipts["gguf"] else ""
            yield Artefact(f"{run.name}/{kind}", about, "gguf", path, kind, run.name, "gguf", "", since)
    if receipts["base"]:
        yield Artefact(f"{run.name}/base", "before training", model="base", stage="base", **beside)


def _served(run: Run, served: Receipt) -> Artefact | None:
    """What `make serve` serves now, whichever engine it is; None when it does not answer."""
    url, model = served.metrics["url"], served.metrics["model"]
    try:
        key = read_key()
    except UserError:
        return None
    if model not in models_of(url, key):
        return None
    about = f"{served.metrics.get('type', model)} at {url.removeprefix('http://').removesuffix('/v1')}"
    return Artefact(f"{run.name}/served", about, "endpoint", url, model, run.name, "serve", key=key)


def _of_environment() -> Iterator[Artefact]:
    """The models of any endpoint of OpenAI's API, named by its client's own variables."""
    url = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    for model in models_of(url, key) if url else ():
        yield Artefact(f"{url} {model}", f"{model} at {url}", "endpoint", url, model, key=key)


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
class Chunk:
    """An answer so far; `speed` once it is whole."""

    text: str
    status: str
    speed: str = ""


class ModelPool:
    """The loaded models, the one asked last at the end; loading is done by one thread, one model after another."""

    def __init__(self, context: int, log_file: Path, key_file: Path) -> None:
        self.context = context
        self.log_file = log_file
        self.key_file = key_file  # of this playground's own processes alone
        self.loaded: dict[str, Keeper] = {}
        self.loader = ThreadPoolExecutor(1, "loader")
        self.supervisor = Supervisor([])

    def __enter__(self) -> Self:
        self.log_file.write_text("", encoding="utf-8")
        make_key(self.key_file)
        self.supervisor.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.ended.set()  # a load under way ends
        self.loader.shutdown(cancel_futures=True)
        self.supervisor.__exit__()

    def endpoint(self, artefact: Artefact) -> "Future[Endpoint]":
        """Where the artefact answers, once it is loaded."""
        return self.loader.submit(self._endpoint, artefact)

    def answer(
        self, artefact: Artefact, messages: list[dict[str, str]], sampling: Sampling, stop: Event
    ) -> Iterator[Chunk]:
        """The answer as it is loaded for and as it arrives, ended early by `stop`.

        Raises:
            UserError: it cannot be loaded, or gives no whole answer.
        """
        began, coming = time.monotonic(), self.endpoint(artefact)
        while not coming.done():
            try:
                coming.result(timeout=0.5)
            except NotYet:
                yield Chunk("", f"loading {artefact.model}: {time.monotonic() - began:.0f} s")
                if stop.is_set() and coming.cancel():
                    return
        endpoint, answer = coming.result(), None
        yield Chunk("", "reading the prompt")
        try:
            with client_of(endpoint.url, endpoint.key) as client:
                is_ours = bool(artefact.recipe)
                answer = Answer(client, endpoint.model, messages, **sampling.arguments(is_ours))  # type: ignore[arg-type]
                for _ in answer:
                    yield Chunk(answer.text, "answering")
                    if stop.is_set():
                        break
        except failures() as error:
            raise UserError(reason(error)) from None
        yield Chunk(answer.text, "", _speed(answer, stop.is_set()))

    def _endpoint(self, artefact: Artefact) -> Endpoint:
        if artefact.kind == "endpoint":
            return Endpoint(artefact.place, artefact.model, artefact.key)
        name = f"{artefact.place} {artefact.made_at}"
        if name in self.loaded and not self.loaded[name].is_running():
            self.supervisor.remove(self.loaded.pop(name))
        if name in self.loaded:
            self.loaded[name] = self.loaded.pop(name)
        else:
            for oldest in list(self.loaded)[: max(0, len(self.loaded) - LOADED + 1)]:
                self.supervisor.remove(self.loaded.pop(oldest))
            self.loaded[name] = self._load(artefact)
        port = self.loaded[name].service.port or 0
        return Endpoint(f"{url_of(port)}/v1", artefact.model, read_key(self.key_file))

    def _load(self, artefact: Artefact) -> Keeper:
        """Start the artefact's process, once its files are proved to be what their stage wrote, and await it."""
        Run(artefact.recipe).verified(artefact.stage, only=artefact.place if artefact.kind == "gguf" else "")
        port = free_port()
        keeper = self.supervisor.add(
            Service(
                name=artefact.name,
                argv=(sys.executable, "-m", *self._command(artefact, port)),
                log_file=self.log_file,
                port=port,
                loading=f"loading {artefact.name}",
                is_ready=lambda: is_healthy(port, timeout=1),
                ready_seconds=LOAD_SECONDS,
                grace_seconds=GRACE_SECONDS,
            )
        )
        if problem := keeper.start():
            self.supervisor.remove(keeper)
            raise UserError(f"{artefact.name} {problem}: see {self.log_file}")
        return keeper

    def _command(self, artefact: Artefact, port: int) -> list[str]:
        served = {"name": artefact.model, "port": port, "key_file": str(self.key_file)}
        if artefact.kind == "weights":
            name = "merged" if artefact.model == "merged" else "base"
            return [WEIGHTS, json.dumps(served | {"name": name, "folder": artefact.place, "adapter": artefact.adapter})]
        context = min(self.context, llamacpp.trained_context(Path(artefact.place)) or self.context)
        bounds = {"context": context, "slots": 1, "threads": 0, "temperature": 0.0}
        return [llamacpp.PROGRAM, json.dumps(served | bounds | {"model": artefact.place})]


def together(answers: list[Iterator[Chunk]], at_once: bool) -> Iterator[tuple[int, Chunk | UserError]]:
    """The next chunk of each answer, by its number: all at the same time, or one after another."""
    import queue
    import threading

    ready: queue.Queue[tuple[int, Chunk | UserError | None]] = queue.Queue()

    def generate(numbers: list[int]) -> None:
        for number in numbers:
            try:
                for part in answers[number]:
                    ready.put((number, part))
            except UserError as error:
                ready.put((number, error))
            except Exception as error:  # a bug: the page shows it, the log has its traceback
                log.exception("the playground could not answer")
                ready.put((number, UserError(f"{type(error).__name__}: {error}")))
            ready.put((number, None))

    numbers = list(range(len(answers)))
    for group in [[number] for number in numbers] if at_once else [numbers]:
        threading.Thread(target=generate, args=(group,), daemon=True).start()
    left = len(answers)
    while left:
        number, part = ready.get()
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
