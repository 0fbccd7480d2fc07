"""Serve the model over an OpenAI-compatible API until Ctrl-C:  python -m serve.api RECIPE [key=value ...]

The model that is served is proved to be the one that `make gguf` wrote, and to answer, before its address is
printed. `PORT` in the environment overrides `serve.port`.
"""

import logging
import os
import sys
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from recipe.command import boundary, peak_rss_bytes, recipe_of_arguments, versions
from recipe.error import UserError
from recipe.load import as_dict
from recipe.machine import cores
from recipe.proof import read_comparisons
from recipe.recommend import chosen
from recipe.run import Receipt, Run
from recipe.schema import Recipe
from recipe.stages import stage
from serve.context import trained_context
from serve.endpoint import is_healthy, port_of_environment, port_problem, url_of
from serve.engine import Settings
from serve.key import KEY_FILE, make_key
from serve.supervisor import Supervisor

ENDPOINT = """
{name} ({type}) is served at

  URL    {url}/v1
  model  {name}
  key    in {key}

Try it in another terminal, from this folder:

  curl -s {url}/v1/chat/completions -H "Authorization: Bearer $(cat {key})" \
-H 'Content-Type: application/json' -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

or chat with it: make chat RECIPE={name}
Ctrl-C stops the server.
"""

log = logging.getLogger("truetune")


def api(recipe: Recipe) -> None:
    """Check, start, prove, tell, watch; the engine never outlives this function."""
    run = Run(recipe.name)
    run.receipt("gguf")
    recipe = chosen(recipe, run)
    port = port_of_environment(recipe.serve.port)
    refuse_taken_port(run, port)
    with ExitStack() as ending:
        with run.lock():  # until the model is loaded, so that no other make replaces it in between
            path, known = served_file(recipe, run)
            refuse_disproved(recipe, run)
            refuse_long_context(recipe.serve.context, path)
            settings = settings_of(recipe, path, port)
            supervisor = ending.enter_context(Supervisor(settings, make_key(), run.path("serve.log"), known))
            run.write_receipt(start(recipe, supervisor))
        with suppress(KeyboardInterrupt):
            text = ENDPOINT.format(name=recipe.name, type=recipe.served_type, url=url_of(port), key=KEY_FILE)
            sys.stdout.write(text)
            sys.stdout.flush()
            supervisor.watch()
    log.info("stopped")


def refuse_taken_port(run: Run, port: int) -> None:
    """Before anything heavy: say who has the port, and which one is free."""
    problem = port_problem(port)
    if not problem:
        return
    served = run.find_receipt("serve")
    if served and served.metrics["port"] == port and is_alive(served.metrics["pid"]) and is_healthy(port):
        raise UserError(f"{run.folder} is already being served on {url_of(port)}/v1: use it, or stop it with Ctrl-C")
    free = next((other for other in range(port + 1, 65536) if not port_problem(other)), 8000)
    raise UserError(f"port {port} {problem}: stop the other program or choose another with 'PORT={free} make serve'")


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def served_file(recipe: Recipe, run: Run) -> tuple[Path, dict[str, str | int]]:
    """The GGUF that the recipe serves and its fingerprint, proved to be what 'gguf' wrote."""
    path = run.path("gguf", f"{recipe.name}-{recipe.served_type}.gguf")
    verified = run.verified("gguf", only=str(path))
    if str(path) not in verified:
        raise UserError(f"{run.receipt_path('gguf')} knows no {path}: run 'make gguf RECIPE={recipe.name}' first")
    return path, verified[str(path)]


def refuse_disproved(recipe: Recipe, run: Run) -> None:
    """What was found not to be the trained model is not served, unless FORCE=1 says so."""
    line = ("merge", recipe.gguf.full, recipe.served_type)  # another quantization's fault is not the served one's
    rows = read_comparisons(run.path("parity.jsonl")) if run.path("parity.jsonl").is_file() else []
    problems = [f"{row.name}: {problem}" for row in rows if row.name in line for problem in row.problems]
    proof, made = run.find_receipt("prove"), run.receipt("gguf").outputs
    if proof is not None and not proof.metrics["passed"] and made.items() <= proof.inputs.items():
        problems += [problem for row in proof.metrics["comparisons"] for problem in row["problems"]]
    if not problems:
        return
    if os.environ.get("FORCE") == "1":
        log.warning("WARNING: serving what is NOT the model that was trained (FORCE=1): %s", problems[0])
        return
    raise UserError(f"{run.folder} failed its proof ({problems[0]}): mend it, or serve it all the same with FORCE=1")


def refuse_long_context(context: int, path: Path) -> None:
    """llama.cpp would allocate such a context, then cut it to the trained one in silence."""
    trained = trained_context(path)
    if trained is not None and context > trained:
        raise UserError(f"serve.context: {context} is more than the {trained} tokens that {path} knows: lower it")


def settings_of(recipe: Recipe, path: Path, port: int) -> Settings:
    """What the recipe says to the engine."""
    return Settings(
        model=str(path),
        name=recipe.name,
        port=port,
        key_file=str(KEY_FILE),
        context=recipe.serve.context,
        slots=recipe.serve.slots,
        threads=recipe.serve.threads,
        temperature=recipe.serve.temperature,
    )


def start(recipe: Recipe, supervisor: Supervisor) -> Receipt:
    """Start the engine, which proves itself, and say so in the stage's receipt."""
    settings = supervisor.settings
    log.info("serve: %s", stage("serve").does)
    started_at, begin = datetime.now(UTC), time.monotonic()
    if problem := supervisor.start():
        raise UserError(f"{settings.model} cannot be served: the engine {problem}: see {supervisor.log_file}")
    seconds = round(time.monotonic() - begin, 3)
    return Receipt(
        stage="serve",
        recipe=as_dict(recipe),
        inputs={settings.model: supervisor.known},
        outputs={},
        versions=versions(("xllamacpp",)),
        metrics={
            "url": f"{url_of(settings.port)}/v1",
            "model": settings.name,
            "type": recipe.served_type,
            "pid": os.getpid(),
            "port": settings.port,
            "context": settings.context,
            "slots": settings.slots,
            "threads": settings.threads or cores(),
            "seconds_to_ready": seconds,
        },
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=seconds,
        peak_rss_bytes=supervisor.peak_rss_bytes() or peak_rss_bytes(),
    )


if __name__ == "__main__":
    with boundary():
        this = stage("serve")
        api(recipe_of_arguments(this.module, this.does))
