"""What stands behind a chat window: an endpoint of OpenAI's API, and the processes of ours that it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.run import Fingerprints


@dataclass(frozen=True)
class Service:
    """One process under the supervisor.

    `argv` stands in the process list, so secrets go into `environment` or into files that only the owner reads.
    `is_ready` is cheap and asked often; `problem` is asked once it is: what is wrong with an answer, or nothing.
    `check` is asked before it is started again, and raises a UserError where that would serve something else.
    `environment` comes on top of ours, or alone where `inherits` is false; `port` is the one that it listens on.
    """

    name: str
    argv: tuple[str, ...]
    log_file: Path
    is_ready: Callable[[], bool]
    problem: Callable[[], str] = lambda: ""
    environment: dict[str, str] = field(default_factory=dict)
    ready_seconds: int = 600
    check: Callable[[], None] = lambda: None
    inherits: bool = True
    port: int | None = None
    loading: str = ""  # what its progress line says while it becomes ready
    grace_seconds: int = 5  # how long it may take to end by itself


@dataclass(frozen=True)
class Endpoint:
    """Where any client of OpenAI's API finds the model; `url` ends with `/v1`."""

    url: str
    model: str
    key: str


@dataclass(frozen=True)
class Backend:
    """An engine as `make serve` uses it; Ollama has no service, since its server is not ours.

    `inputs` are the files that are served, as their stage's receipt knows them; `packages` did the work.
    """

    endpoint: Endpoint
    services: tuple[Service, ...] = ()
    inputs: Fingerprints = field(default_factory=dict)
    packages: tuple[str, ...] = ()
