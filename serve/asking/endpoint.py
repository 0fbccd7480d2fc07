"""Where the API answers, with which key, and the model behind it, asked without proxies or retries.

The key is one line in a file that only its owner can read, made on the first start.
"""

import http.client
import json
import logging
import os
import re
import secrets
import socket
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipeline.error import UserError
from pipeline.recipe import Recipe, Serve

HOST = "127.0.0.1"
ERRORS = (OSError, http.client.HTTPException, ValueError)
KEY_FILE = Path(".secrets/api-key")

log = logging.getLogger("truetune")


def url_of(port: int) -> str:
    """The server's address; clients of the OpenAI API add `/v1`."""
    return f"http://{HOST}:{port}"


def port_of_environment(default: int, variable: str = "PORT") -> int:
    """`PORT` (or another variable) of the environment, else the recipe's port."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise UserError(f"{variable}={text!r} is not a port: give a whole number from 1 to 65535")
    return int(text)


def choice_of_environment(default: str, variable: str, choices: tuple[str, ...]) -> Any:
    """`ENGINE` or `UI` of the environment, else what the recipe says."""
    text = os.environ.get(variable) or default
    if text not in choices:
        raise UserError(f"{variable}={text!r} is unknown: choose one of {', '.join(choices)}")
    return text


def with_environment(recipe: Recipe) -> Recipe:
    """The recipe as `PORT`, `UI_PORT`, `ENGINE` and `UI` of the environment want it served.

    Raises:
        UserError: one of them is no such thing, or they do not go together.
    """
    choices = {key: get_args(kind) for key, kind in get_type_hints(Serve).items()}
    serve = replace(
        recipe.serve,
        port=port_of_environment(recipe.serve.port),
        ui_port=port_of_environment(recipe.serve.ui_port, "UI_PORT"),
        engine=choice_of_environment(recipe.serve.engine, "ENGINE", choices["engine"]),
        ui=choice_of_environment(recipe.serve.ui, "UI", choices["ui"]),
    )
    if serve.ui == "builtin" and serve.engine != "llamacpp":
        raise UserError(f"UI=builtin is llama.cpp's own page, {serve.engine} has none: choose UI=openwebui or UI=none")
    if serve.ui == "openwebui" and serve.port == serve.ui_port:
        raise UserError(f"port {serve.port} is to be the engine's and the chat window's: change one, as UI_PORT=3000")
    return replace(recipe, serve=serve)


def port_problem(port: int) -> str:
    """Why no server can listen on `port`; empty if one can."""
    with socket.socket() as probe:
        # As the engine binds: a connection that lingers after the last server does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "is reserved by the system"
        except OSError:
            return "is in use"
    return ""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def connected(where: int | str, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a port of this machine, or to a URL; and what comes before the path there."""
    if isinstance(where, int):
        return http.client.HTTPConnection(HOST, where, timeout=timeout), ""
    parts = urllib.parse.urlsplit(where)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or HOST, parts.port, timeout=timeout), parts.path.rstrip("/")


def ask(
    where: int | str, path: str, key: str = "", body: dict[str, Any] | None = None, timeout: float = 10
) -> tuple[int, Any]:
    """HTTP status and JSON of one request to a port of this machine or a URL, None for an answer without content.

    Raises:
        OSError, HTTPException, ValueError: (ERRORS) nothing answered, or not in JSON.
    """
    connection, before = connected(where, timeout)
    try:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request("POST" if body else "GET", before + path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content else None
    finally:
        connection.close()


def is_healthy(port: int, timeout: float = 10) -> bool:
    """Whether a model is loaded there and the server answers."""
    try:
        status, answer = ask(port, "/health", timeout=timeout)
    except ERRORS:
        return False
    return status == 200 and answer in ({"status": "ok"}, None)  # llama.cpp's and vLLM's


def served_model(port: int, key: str, name: str = "") -> dict[str, Any]:
    """What `/v1/models` says of the model of that name there, else of the first: `id` is its name.

    `meta.n_ctx` is the number of each conversation's tokens; vLLM calls it otherwise, and knows none of an adapter.

    Raises:
        UserError: the server does not take the key, or is not one of ours.
    """
    try:
        status, answer = ask(port, "/v1/models", key)
        if status == 401:
            raise UserError(f"{url_of(port)} refuses the key: stop that server and start it with 'make serve'")
        models: list[dict[str, Any]] = answer["data"]
        model = next((model for model in models if model["id"] == name), models[0])
        return {"id": model["id"], "meta": model.get("meta") or {"n_ctx": model["max_model_len"]}}
    except (*ERRORS, LookupError, TypeError) as error:
        raise UserError(f"{url_of(port)} is no model's server ({error!r}): stop it or set another PORT") from None


def make_key(path: Path = KEY_FILE) -> str:
    """The key in `path`, made there if there is none; the file's mode becomes 0600, its folder's 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _create(path)
    for place, mode in ((path.parent, 0o700), (path, 0o600)):
        if place.stat().st_mode & 0o777 != mode:
            try:
                place.chmod(mode)
            except OSError as error:  # a secret that a container mounts read-only
                log.warning("%s is open to others and stays so: %s", place, error.strerror)
            else:
                log.warning("%s was open to others: its mode is now %o", place, mode)
    return read_key(path)


def read_key(path: Path = KEY_FILE) -> str:
    """The key in `path`.

    Raises:
        UserError: there is no file, or it does not hold one key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: 'make serve' makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, 'make serve' makes a new one") from None
    if not re.fullmatch(r"[!-~]+", key):
        found = "is empty" if not key else "is not one line of plain characters"
        raise UserError(f"{path} {found}: delete it, 'make serve' makes a new one")
    return key


def _create(path: Path) -> None:
    """A finished key or none: written beside, then linked, so that two starts at once agree on one key."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
