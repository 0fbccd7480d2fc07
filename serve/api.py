"""Serve the model until Ctrl-C, in a chat window and over OpenAI's API:  python -m serve.api RECIPE [--check]

The model that is served is proved to be the one that was trained, and to answer, before its address is printed.
`ENGINE`, `PORT`, `UI` and `UI_PORT` in the environment override the keys of `serve` that are named like them.
"""

import logging
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

from pipeline.command import boundary, peak_rss_bytes, recipe_of_arguments, versions
from pipeline.error import UserError
from pipeline.load import as_dict
from pipeline.machine import cores
from pipeline.recipe import Recipe
from pipeline.run import Receipt, Run
from pipeline.stages import stage
from serve.asking.endpoint import KEY_FILE, port_problem, url_of, with_environment
from serve.running.backend import Backend, Service, backend_of, chosen, refuse_disproved, refuse_without_gguf
from serve.running.session import Session, held, refuse_second, report
from serve.running.supervisor import Supervisor

OPENWEBUI = """
{name} ({type}) answers in the chat window

  {ui}
  sign in as {email} with the password in {password}

and behind OpenAI's API
"""
BUILTIN = """
{name} ({type}) answers in llama.cpp's own page

  {ui}
  'Enter API Key' there asks for the key once; it is in {key}

and behind OpenAI's API
"""
NONE = """
{name} ({type}) is served at
"""
ENDPOINT = """
  URL    {url}
  model  {name}
  key    {known_by}

Try it in another terminal, from this folder:

  curl -s {url}/chat/completions {authorization}\
-H 'Content-Type: application/json' -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

or chat with it: make chat RECIPE={recipe}
Ctrl-C stops it, or in another terminal: make stop RECIPE={recipe}
"""

log = logging.getLogger("truetune")


def api(recipe: Recipe) -> None:
    """Check, start, prove, tell, watch; no process outlives this function."""
    run = Run.of(recipe)
    refuse_second(run)
    recipe = chosen(recipe, run)
    refuse_taken_ports(recipe)
    with ExitStack() as ending:
        ending.enter_context(held(run))
        with run.lock():  # until the model is loaded, so that no other make replaces it in between
            refuse_disproved(recipe, run)
            backend = backend_of(recipe, run)
            services = [*backend.services, *chat_window(recipe, run, backend)]
            supervisor = ending.enter_context(Supervisor(services))
            supervisor.on_change = lambda: report(run, session_of(recipe, backend, supervisor))
            run.write_receipt(start(recipe, backend, supervisor))
        with suppress(KeyboardInterrupt):
            sys.stdout.write(welcome(recipe, backend))
            sys.stdout.flush()
            open_browser(recipe)
            supervisor.watch()
    log.info("stopped")


def refuse_taken_ports(recipe: Recipe) -> None:
    """Before anything heavy: say which port is taken, and which one is free."""
    ports = {"PORT": recipe.serve.port} if recipe.serve.engine != "ollama" else {}
    ports |= {"UI_PORT": recipe.serve.ui_port} if recipe.serve.ui == "openwebui" else {}
    problems = []
    for variable, port in ports.items():
        if problem := port_problem(port):
            taken = ports.values()
            free = next((n for n in range(port + 1, 65536) if n not in taken and not port_problem(n)), 8000)
            fix = f"stop the other program or choose another with '{variable}={free} make serve'"
            problems.append(f"port {port} {problem}: {fix}")
    if problems:
        raise UserError(*problems)


def refuse_unknown_positions(recipe: Recipe, run: Run) -> None:
    """What the base knows stands in its receipt; a base that is still to be made is judged then.

    Raises:
        UserError: `serve.context` is more.
    """
    made = run.find_receipt("base")
    known = made.metrics.get("positions") if made and made.recipe.get("base_model") == recipe.base_model else None
    if known is not None and recipe.serve.context > known:
        raise UserError(
            f"serve.context: {recipe.serve.context} is more than the {known} tokens that base {recipe.base_model!r} "
            f"knows: set serve.context={known}"
        )


def chat_window(recipe: Recipe, run: Run, backend: Backend) -> list[Service]:
    """Open WebUI in front of the engine, if the recipe wants it."""
    if recipe.serve.ui != "openwebui":
        return []
    from serve.openwebui import openwebui

    return [openwebui(run, backend.endpoint, recipe.serve.ui_port)]


def start(recipe: Recipe, backend: Backend, supervisor: Supervisor) -> Receipt:
    """Start the services, which prove themselves, and say so in the stage's receipt."""
    log.info("serve: %s", stage("serve").does if recipe.serve.ui != "none" else "Serve over an OpenAI-compatible API")
    started_at, begin = datetime.now(UTC), time.monotonic()
    supervisor.start()
    seconds = round(time.monotonic() - begin, 3)
    return Receipt(
        stage="serve",
        recipe=as_dict(recipe),
        inputs=backend.inputs,
        outputs={},
        versions=versions(backend.packages),
        metrics={
            "engine": recipe.serve.engine,
            "url": backend.endpoint.url,
            "model": backend.endpoint.model,
            "type": recipe.served_artefact,
            "ui": recipe.serve.ui,
            "ui_url": ui_url(recipe),
            "pid": os.getpid(),
            "port": recipe.serve.port,
            "context": recipe.serve.context,
            "slots": recipe.serve.slots,
            "threads": recipe.serve.threads or cores(),
            "seconds_to_ready": seconds,
        },
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=seconds,
        peak_rss_bytes=supervisor.peak_rss_bytes() or peak_rss_bytes(),
    )


def session_of(recipe: Recipe, backend: Backend, supervisor: Supervisor) -> Session:
    """What other terminals show."""
    return Session(
        pid=os.getpid(),
        engine=recipe.serve.engine,
        ui=recipe.serve.ui,
        url=backend.endpoint.url,
        ui_url=ui_url(recipe),
        model=backend.endpoint.model,
        since=supervisor.since,
        services=[vars(keeper.condition) for keeper in supervisor.keepers],
    )


def ui_url(recipe: Recipe) -> str:
    """Where the chat window is; empty if there is none."""
    ports = {"openwebui": recipe.serve.ui_port, "builtin": recipe.serve.port}
    return url_of(ports[recipe.serve.ui]) if recipe.serve.ui in ports else ""


def welcome(recipe: Recipe, backend: Backend) -> str:
    """Where everything is; secrets by their file."""
    from serve.openwebui import EMAIL, PASSWORD_FILE

    window = {"openwebui": OPENWEBUI, "builtin": BUILTIN, "none": NONE}[recipe.serve.ui]
    guarded = bool(backend.services)  # Ollama asks for no key
    return (window + ENDPOINT).format(
        recipe=recipe.given,
        known_by=f"in {KEY_FILE}" if guarded else "none: Ollama asks for none",
        authorization=f'-H "Authorization: Bearer $(cat {KEY_FILE})" ' if guarded else "",
        name=backend.endpoint.model,
        type=recipe.served_artefact,
        url=backend.endpoint.url,
        key=KEY_FILE,
        ui=ui_url(recipe),
        email=EMAIL,
        password=PASSWORD_FILE,
    )


def open_browser(recipe: Recipe) -> None:
    """Show the chat window to the person who sits here; a server without a screen shows nothing."""
    import webbrowser

    has_display = sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if ui_url(recipe) and sys.stdout.isatty() and has_display:
        webbrowser.open(ui_url(recipe))


def check(recipe: Recipe) -> None:
    """Before minutes of training, not after: what serving would stumble over; environments are made now."""
    from serve import openwebui
    from serve.engines import vllm

    if recipe.serve.engine != "vllm":
        refuse_without_gguf(recipe, recipe.serve.engine)
    refuse_unknown_positions(recipe, Run.of(recipe))
    refuse_second(Run.of(recipe))
    refuse_taken_ports(recipe)
    if recipe.serve.ui == "openwebui":
        openwebui.python()
    if recipe.serve.engine == "vllm":
        vllm.python()


def main() -> None:
    """`make serve`, and what it does first."""
    this, checks = stage("serve"), "--check" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--check"]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal ends all, `nohup` does not
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    recipe = with_environment(recipe_of_arguments(this.module, this.does))
    (check if checks else api)(recipe)


if __name__ == "__main__":
    with boundary():
        main()
