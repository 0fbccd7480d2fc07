"""What stands behind a chat window: an endpoint of OpenAI's API, the processes of ours that it takes, and its proof."""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.error import UserError
from pipeline.proof import read_comparisons
from pipeline.recipe import Recipe
from pipeline.run import Fingerprints, Receipt, Run

ENGINES = {
    "llamacpp": "serve.engines.llamacpp",
    "ollama": "serve.engines.ollama.registration",
    "vllm": "serve.engines.vllm",
}

log = logging.getLogger("truetune")


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


def backend_of(recipe: Recipe, run: Run) -> Backend:
    """The engine that the recipe names, its files proved to be what their stages wrote."""
    made: Backend = importlib.import_module(ENGINES[recipe.serve.engine]).backend(recipe, run)
    return made


def refuse_without_gguf(recipe: Recipe, loader: str) -> None:
    """Say what serves a model of which no GGUF is made, to who would load one.

    Raises:
        UserError: none is made.
    """
    if not recipe.gguf.types:
        raise UserError(
            f"gguf.types is empty, so {loader} has no GGUF to load: name a type, as SET='gguf.types=[Q8_0]', or let "
            "vLLM serve the merged weights, 'make serve ENGINE=vllm'"
        )


def chosen(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with `serve.type` filled in by the recommendation, where it names none and the types were compared.

    Raises:
        UserError: nothing that was made can be served.
    """
    if recipe.serve.engine == "vllm":
        return recipe
    refuse_without_gguf(recipe, recipe.serve.engine)
    compare = run.find_receipt("compare")
    if recipe.serve.type or compare is None:
        return recipe
    kind = compare.metrics["recommended"]
    if kind is None:
        raise UserError(f"no GGUF of {run.folder} can be used: see 'make prove RECIPE={run.given}'")
    made = kind in recipe.gguf.written  # else the comparison is of types asked for before
    return replace(recipe, serve=replace(recipe.serve, type=kind)) if made else recipe


def refuse_disproved(recipe: Recipe, run: Run) -> None:
    """What was found not to be the trained model is not served, unless FORCE=1 says so."""
    # Another quantization's fault is not the served one's.
    line = ("merge",) if recipe.serve.engine == "vllm" else ("merge", recipe.gguf.full, recipe.served_type)
    rows = read_comparisons(run.path("compare.jsonl")) if judged(run, "compare") else []
    problems = [f"{row.name}: {problem}" for row in rows if row.name in line for problem in row.problems]
    proof = judged(run, "prove")
    if proof and not proof.metrics["passed"]:
        problems += [problem for row in proof.metrics["comparisons"] for problem in row["problems"]]
    if not problems:
        return
    if os.environ.get("FORCE") == "1":
        log.warning("WARNING: serving what is NOT the model that was trained (FORCE=1): %s", problems[0])
        return
    raise UserError(f"{run.folder} failed its proof ({problems[0]}): fix it, or serve it all the same with FORCE=1")


def judged(run: Run, name: str) -> Receipt | None:
    """The receipt of a comparison, if what it compared is what stands there now."""
    receipt, files, merge = (run.find_receipt(stage) for stage in (name, "gguf", "merge"))
    if receipt is None or files is None or not files.outputs.items() <= receipt.inputs.items():
        return None
    return None if merge and not merge.outputs.items() <= files.inputs.items() else receipt
