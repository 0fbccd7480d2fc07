"""Where the API answers, with which key, and the model behind it, asked by HTTP or OpenAI's own client.

No proxy is asked on the way. The key is one line in a file that only its owner can read, made on the first start.
"""

import http.client
import json
import logging
import os
import re
import secrets
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pipeline.error import UserError
from pipeline.recipe import Recipe, Serve
from pipeline.run import Run

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

HOST = "127.0.0.1"
ERRORS = (OSError, http.client.HTTPException, ValueError)
KEY_FILE = Path(".secrets/api-key")
LIST_SECONDS = 3.0

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


class Answer:
    """One answer as it arrives, and how fast it did."""

    def __init__(
        self, client: "OpenAI", model: str, messages: "list[ChatCompletionMessageParam]", **sampling: Any
    ) -> None:
        self.text = ""
        self.tokens = 0
        self.finish_reason = ""
        self.asked_at = time.monotonic()
        self.first_at = self.last_at = 0.0
        self._stream = client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **sampling
        )

    def __iter__(self) -> Iterator[str]:
        """The answer's pieces; an empty one is a token that is not shown, as a model's thinking."""
        with self._stream as chunks:
            for chunk in chunks:
                self.tokens = chunk.usage.completion_tokens if chunk.usage else self.tokens
                delta = chunk.choices[0].delta if chunk.choices else None
                self.finish_reason = (chunk.choices[0].finish_reason if delta else None) or self.finish_reason
                thought = (delta.model_extra or {}).get("reasoning_content") if delta else None
                if not delta or not (delta.content or thought):
                    continue
                self.last_at = time.monotonic()
                self.first_at = self.first_at or self.last_at
                piece = delta.content or ""
                self.text += piece
                yield piece

    def speed(self) -> str:
        """Tokens a second after the first token, and how long that one took; nothing if the answer was stopped."""
        if self.tokens < 2 or self.last_at <= self.first_at:
            return ""
        rate = (self.tokens - 1) / (self.last_at - self.first_at)
        return f"{self.tokens} tokens, {rate:.1f} a second, the first after {self.first_at - self.asked_at:.2f} s"


def connect(recipe: Recipe) -> "tuple[OpenAI, str]":
    """The official client, and the served model's name, once it is proved to be the recipe's.

    Raises:
        UserError: nothing answers, it refuses the key, or it is another model.
    """
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment must never see what is asked of this machine, nor the key.
    http = DefaultHttpxClient(trust_env=False)
    run = Run.of(recipe)
    if (receipt := run.find_receipt("serve")) is None:
        raise UserError(
            f"{run.folder} is not served yet: run 'make serve RECIPE={recipe.given}' in another terminal and wait for "
            "its address"
        )
    served = receipt.metrics
    if served.get("engine") == "ollama":  # not our server: what it holds was proved when it was registered
        key = os.environ.get("OLLAMA_API_KEY") or "none"
        return OpenAI(base_url=served["url"], api_key=key, http_client=http), served["model"]
    port = port_of_environment(served["port"])
    if not is_healthy(port):
        start = f"run 'make serve RECIPE={recipe.given}' in another terminal first"
        raise UserError(f"nothing answers on {url_of(port)}: {start}")
    key = read_key()
    name = served_model(port, key, recipe.name)["id"]
    if name != recipe.name:
        raise UserError(
            f"{url_of(port)} serves {name!r}, not {recipe.name!r}: stop it or set the PORT of {recipe.name!r}"
        )
    return OpenAI(base_url=f"{url_of(port)}/v1", api_key=key, http_client=http), name


def failures() -> tuple[type[Exception], ...]:
    """What the client raises, before an answer and within one."""
    import httpx2
    from openai import OpenAIError

    return (OpenAIError, httpx2.HTTPError)


def reason(error: Exception) -> str:
    """One line that a person can act on."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("type") == "exceed_context_size_error":
        asked, context = body["n_prompt_tokens"], body["n_ctx"]
        return f"{asked} tokens, but serve.context is {context}: ask less, or begin a new conversation"
    return f"the server gave no whole answer ({error}): ask again, 'make serve' tells more"


def models_of(url: str, key: str) -> list[str]:
    """The models that an endpoint lists; none when it does not answer or refuses the key."""
    import httpx2
    from openai import OpenAIError

    try:
        with client_of(url, key) as client:
            return [model.id for model in client.models.list(timeout=LIST_SECONDS)]
    except (OpenAIError, httpx2.HTTPError, ValueError):
        return []


def client_of(url: str, key: str):  # type: ignore[no-untyped-def]
    """The official client of an endpoint, which never hides a failure behind retries."""
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment must never see what is asked of this machine.
    direct = DefaultHttpxClient(trust_env=f"//{HOST}:" not in url)
    return OpenAI(base_url=url, api_key=key, http_client=direct, max_retries=0)
