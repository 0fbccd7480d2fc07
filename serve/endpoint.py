"""Where the API answers: its port, its health and the model behind it, asked without proxies or retries."""

import http.client
import json
import os
import socket
from typing import Any

from recipe.error import UserError

HOST = "127.0.0.1"
ERRORS = (OSError, http.client.HTTPException, ValueError)


def url_of(port: int) -> str:
    """The server's address; clients of the OpenAI API add `/v1`."""
    return f"http://{HOST}:{port}"


def port_of_environment(default: int) -> int:
    """`PORT` of the environment, else the recipe's port."""
    text = os.environ.get("PORT") or str(default)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise UserError(f"PORT={text!r} is not a port: give a whole number from 1 to 65535")
    return int(text)


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


def ask(
    port: int, path: str, key: str = "", body: dict[str, Any] | None = None, timeout: float = 10
) -> tuple[int, Any]:
    """HTTP status and JSON of one request.

    Raises:
        OSError, HTTPException, ValueError: (ERRORS) nothing answered, or not in JSON.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def is_healthy(port: int, timeout: float = 10) -> bool:
    """Whether a model is loaded there and the server answers."""
    try:
        status, answer = ask(port, "/health", timeout=timeout)
    except ERRORS:
        return False
    return status == 200 and answer == {"status": "ok"}


def served_model(port: int, key: str) -> dict[str, Any]:
    """What `/v1/models` says of the model there: `id` is its name, `meta.n_ctx` each conversation's tokens.

    Raises:
        UserError: the server does not take the key, or is not one of ours.
    """
    try:
        status, answer = ask(port, "/v1/models", key)
        if status == 401:
            raise UserError(f"{url_of(port)} refuses the key: stop that server and start it with 'make serve'")
        model: dict[str, Any] = answer["data"][0]
        return {"id": model["id"], "meta": model["meta"]}
    except (*ERRORS, LookupError, TypeError) as error:
        raise UserError(f"{url_of(port)} is no model's server ({error!r}): stop it or set another PORT") from None
