"""Chat with any artefact in the browser, or compare two:  python -m serve.playground RECIPE [key=value ...]

It needs a trained adapter and nothing more; what else is there, is served or is named by `OPENAI_BASE_URL` can be
chosen too. `PLAYGROUND_PORT` in the environment overrides `serve.playground_port`.
"""

import logging
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.files import own_folder
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import HOST, port_problem
from serve.asking.key import make_key
from serve.comparing.artefacts import artefacts
from serve.comparing.door import Door
from serve.comparing.voices import Voices

DOES = "Chat with any artefact of the run in the browser, or compare two"
TOKEN_FILE = Path(".secrets/playground-token")
ADDRESS = """
The playground of {name} is at

  http://{shown}:{port}/?token={token}

Ctrl-C stops it.
"""

log = logging.getLogger("truetune")


def playground(recipe: Recipe) -> None:
    """Serve the page until Ctrl-C; no process outlives this function.

    Raises:
        UserError: nothing of the run can answer yet, or the port is taken.
    """
    run, port = Run(recipe.name), port_of(recipe)
    if not artefacts(recipe.name):
        raise UserError(f"nothing below {run.folder} can answer yet: run 'make train RECIPE={recipe.name}' first")
    token = make_key(TOKEN_FILE)
    log.info("the playground starts")
    with ExitStack() as ending:
        scratch = ending.enter_context(own_folder("truetune-playground"))
        files = str(scratch / "files")  # the page may serve whatever lies there, so the key lies beside
        os.environ |= {"GRADIO_TEMP_DIR": files, "HF_HUB_OFFLINE": "1"}
        run.folder.mkdir(parents=True, exist_ok=True)
        voices = Voices(recipe.serve.context, run.path("playground.log"), scratch / "key")
        ending.enter_context(voices)
        serve(recipe, voices, token, port)


def serve(recipe: Recipe, voices: Voices, token: str, port: int) -> None:
    """The page behind its door, on loopback; a container that publishes it on loopback sets GRADIO_SERVER_NAME."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from serve.comparing.page import CSS, page, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, token=token, port=port)
    gradio.mount_gradio_app(
        app,
        page(recipe, voices),
        path="/",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="1mb",
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css_paths=[CSS],
    )
    # A log must not have the token; a terminal's owner may.
    shown = token if sys.stdout.isatty() else f"$(cat {TOKEN_FILE})"
    config = uvicorn.Config(
        app,
        host=os.environ.get("GRADIO_SERVER_NAME", HOST),
        port=port,
        log_level="critical",  # Ctrl-C cuts open pages off, which is no error; Gradio tells its own
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # an open page listens for ever
    )
    with suppress(KeyboardInterrupt), config.bind_socket() as bound:
        bound.listen()  # whoever comes from now on waits
        sys.stdout.write(ADDRESS.format(name=recipe.name, shown=HOST, port=port, token=shown))
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[bound])
    log.info("stopped")


def port_of(recipe: Recipe) -> int:
    """The page's port, which is free.

    Raises:
        UserError: it is no port, or another program has it.
    """
    text = os.environ.get("PLAYGROUND_PORT") or str(recipe.serve.playground_port)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise UserError(f"PLAYGROUND_PORT={text!r} is not a port: give a whole number from 1 to 65535")
    if problem := port_problem(int(text)):
        free = next((port for port in range(int(text) + 1, 65536) if not port_problem(port)), 7860)
        raise UserError(f"port {text} {problem}: choose another with 'PLAYGROUND_PORT={free} make playground'")
    return int(text)


if __name__ == "__main__":
    with boundary():
        playground(recipe_of_arguments("serve.playground", DOES))
