"""Chat with any artefact in the browser, or compare two:  python -m serve.playground RECIPE [key=value ...]

It needs a training and nothing more; what else is there, is served or is named by `OPENAI_BASE_URL` can be
chosen too. `PLAYGROUND_PORT` in the environment overrides `serve.playground_port`.
"""

import logging
import os
import secrets
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.files import own_folder
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import HOST, make_key, port_problem
from serve.comparing.pool import ModelPool, artefacts

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DOES = "Chat with any artefact of the run in the browser, or compare two"
TOKEN_FILE = Path(".secrets/playground-token")
ADDRESS = """
The playground of {name} is at

  http://{shown}:{port}/?token={token}

Ctrl-C stops it.
"""

# What Gradio's page needs of its own server; fonts, frames and scripts of other hosts stay out.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
SHUT = """<!doctype html><meta name="viewport" content="width=device-width"><title>Truetune playground</title>
<style>body {font: 16px system-ui; max-width: 26em; margin: 20vh auto; padding: 0 1em; color-scheme: light dark}</style>
<h1>Truetune playground</h1>
<p>Open the address with the token that <code>make playground</code> printed, or give the token:</p>
<form><input name="token" type="password" autocomplete="off" autofocus> <button>Enter</button></form>"""

log = logging.getLogger("truetune")


def playground(recipe: Recipe) -> None:
    """Serve the page until Ctrl-C; no process outlives this function.

    Raises:
        UserError: nothing of the run can answer yet, or the port is taken.
    """
    run, port = Run.of(recipe), port_of(recipe)
    if not artefacts(recipe.name):
        raise UserError(f"nothing below {run.folder} can answer yet: run 'make train RECIPE={recipe.given}' first")
    token = make_key(TOKEN_FILE)
    log.info("the playground starts")
    with ExitStack() as ending:
        scratch = ending.enter_context(own_folder("truetune-playground"))
        files = str(scratch / "files")  # the page may serve whatever lies there, so the key lies beside
        os.environ |= {"GRADIO_TEMP_DIR": files, "HF_HUB_OFFLINE": "1"}
        run.folder.mkdir(parents=True, exist_ok=True)
        pool = ending.enter_context(ModelPool(recipe.serve.context, run.path("playground.log"), scratch / "key"))
        serve(recipe, pool, token, port)


def serve(recipe: Recipe, pool: ModelPool, token: str, port: int) -> None:
    """The page behind its token, on loopback; a container that publishes it on loopback sets GRADIO_SERVER_NAME."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from serve.comparing.page import CSS, page, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TokenAuth, token=token, port=port)
    gradio.mount_gradio_app(
        app,
        page(recipe, pool),
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


class TokenAuth:
    """ASGI middleware: `?token=` becomes a cookie that other sites cannot send and scripts cannot read.

    Loopback alone keeps no other user of the machine out, and the page can do what its owner can: load models, write
    files. The token is no API key, since it stands in the browser's history.
    """

    def __init__(self, app: "ASGIApp", token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.cookie = f"truetune-playground-{port}"  # a browser's cookies know no ports

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "http" and scope["path"] == "/health":
            return await JSONResponse({"status": "ok"})(scope, receive, send)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["type"] == "http" and self._is_right(given):
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
            return await response(scope, receive, send)
        if scope["type"] == "http" and self._is_right(HTTPConnection(scope).cookies.get(self.cookie, "")):
            return await self.app(scope, receive, _with_policy(send))
        if scope["type"] == "http":
            return await HTMLResponse(SHUT, 401)(scope, receive, send)
        await send({"type": "websocket.close", "code": 1008})

    def _is_right(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _with_policy(send: "Send") -> Any:
    async def sending(message: "Message") -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
            ]
        await send(message)

    return sending


if __name__ == "__main__":
    with boundary():
        playground(recipe_of_arguments("serve.playground", DOES))
