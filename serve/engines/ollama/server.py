"""An Ollama server, which is not ours: asked over its HTTP API, every failure one line with its fix."""

import ipaddress
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.reference import CONTINUATION_TOKENS, Message

DEFAULT_PORT = 11434
OLDEST = (0, 17, 1)  # before it, a crafted GGUF reads the server's memory: CVE-2026-7482
CONNECT_SECONDS = 5
ANSWER_SECONDS = 600  # a large model is validated and loaded without a word
BUSY_PAUSES_SECONDS = (1, 2, 4, 8)
LISTED_SECONDS = 10
CHUNK_BYTES = 1 << 20
GREEDY = {"temperature": 0, "seed": 0, "repeat_penalty": 1.0, "num_predict": CONTINUATION_TOKENS}


def server_url(text: str | None = None) -> str:
    """`OLLAMA_HOST` as the official client reads it: host, host:port, URL, [IPv6]; an address to listen on is this
    machine's own.

    Raises:
        UserError: it is no address.
    """
    given = os.environ.get("OLLAMA_HOST", "") if text is None else text
    scheme, found, rest = given.strip().partition("://")
    scheme, rest = (scheme, rest) if found else ("http", given.strip())
    try:
        parts = urllib.parse.urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "127.0.0.1", parts.port
        if scheme not in ("http", "https") or re.search(r"[\s\\@]", rest):
            raise ValueError("not http or https")
    except ValueError as error:
        raise UserError(f"OLLAMA_HOST={given!r} is no address ({error}): give host:port or http://host:port") from None
    port = port or ({"http": 80, "https": 443}[scheme] if found else DEFAULT_PORT)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    path = parts.path.strip("/")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" + (f"/{path}" if path else "")


def is_loopback(url: str) -> bool:
    """Whether the server is on this machine, where no proxy may stand between."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class OllamaServer:
    """One server. Methods raise UserError: it is absent, too old, busy, full, or gone while it worked."""

    def __init__(self, url: str) -> None:
        import httpx
        import ollama

        self.url = url
        key = os.environ.get("OLLAMA_API_KEY")
        ways: dict[str, Any] = {
            "timeout": httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            "trust_env": not is_loopback(url),
        }
        self.client = ollama.Client(host=url, **ways)
        # For what the official client does not serve: version, blobs, and rendering without an answer.
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"} if key else {}, **ways)

    def __enter__(self) -> "OllamaServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.http.close()

    def version(self) -> str:
        """The server's version, refused if it is older than OLDEST; a build of one's own says 0.0.0."""
        with self._reported("tell its version"):
            found = str(self.http.get("/api/version").raise_for_status().json()["version"])
        numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", found)
        if numbers is None:
            raise UserError(f"{self.url} is no Ollama (version {found!r}): set OLLAMA_HOST to one")
        parts = tuple(int(number) for number in numbers.groups())
        if (0, 0, 0) < parts < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UserError(
                f"{self.url} is Ollama {found}, which leaks memory to whoever sends it a file (CVE-2026-7482): "
                f"update it to {oldest} or newer"
            )
        return found

    def digests(self) -> dict[str, str]:
        """Name with tag → digest of every model that the server lists."""
        with self._reported("list its models"):
            return {str(model.model): str(model.digest) for model in self.client.list().models}

    def has_blob(self, digest: str) -> bool:
        """Whether these bytes are there already."""
        with self._reported("look for a file"):
            status = self.http.head(f"/api/blobs/{digest}").status_code
            if status not in (200, 404):
                raise ValueError(f"HTTP {status}")
            return status == 200

    def upload(self, path: Path, digest: str, tell: Callable[[int], None]) -> None:
        """Send a file; the server takes it only if it has this digest. `tell` gets the bytes sent so far."""

        def chunks() -> Iterator[bytes]:
            sent = 0
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                    sent += len(chunk)
                    tell(sent)

        with self._reported(f"take {path.name}"):
            size = {"Content-Length": str(path.stat().st_size)}
            self.http.post(f"/api/blobs/{digest}", content=chunks(), headers=size).raise_for_status()

    def create(self, request: dict[str, Any], tell: Callable[[str], None]) -> list[str]:
        """Make a model of an uploaded file; the statuses of its steps."""
        statuses: list[str] = []
        with self._reported(f"create {request['model']}"):
            for step in self.client.create(**request, stream=True):
                if step.status:
                    tell(step.status)
                    if step.status not in statuses:
                        statuses.append(step.status)
            if statuses[-1:] != ["success"]:
                raise ConnectionError(f"it stopped after {statuses[-1] if statuses else 'nothing'!r}")
        return statuses

    def await_listed(self, name: str) -> str:
        """The digest of a model that was just made, once the server lists it."""
        deadline = time.monotonic() + LISTED_SECONDS
        while time.monotonic() < deadline:
            if digest := self.digests().get(name):
                return digest
            time.sleep(0.2)
        raise UserError(f"{self.url} made {name} but does not list it: see its log, restart it and run again")

    def load(self, name: str) -> None:
        """Bring the model into memory."""
        with self._reported(f"load {name}"):
            self._patiently(lambda: self.client.generate(model=name))

    def rendered(self, name: str, messages: list[Message], tools: list[dict[str, Any]]) -> str:
        """The prompt that the server makes of the messages, whole."""
        body = {"model": name, "messages": messages, "stream": False, "truncate": False, "_debug_render_only": True}
        body |= {"tools": tools} if tools else {}
        with self._reported(f"render a prompt of {name}"):
            made = self._patiently(lambda: self.http.post("/api/chat", json=body).raise_for_status())
            return str(made.json()["_debug_info"]["rendered_template"])

    def answer(self, name: str, messages: list[Message]) -> tuple[str, str, int]:
        """(text, why it ended, tokens of the prompt) of the greedy answer."""
        body = {"model": name, "messages": messages, "stream": False, "truncate": False, "shift": False}
        with self._reported(f"answer as {name}"):
            made = self._patiently(lambda: self.http.post("/api/chat", json=body | {"options": GREEDY}))
            answer = made.raise_for_status().json()
            text = (answer["message"].get("thinking") or "") + answer["message"]["content"]
            return text, answer["done_reason"], answer.get("prompt_eval_count", 0)

    def copy(self, source: str, target: str) -> None:
        """Let another tag name the same model."""
        with self._reported(f"tag {target}"):
            self.client.copy(source, target)

    def delete(self, name: str) -> None:
        """Remove a tag."""
        with self._reported(f"remove {name}"):
            self.client.delete(name)

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """Ask again while the server is busy; the last refusal is its answer."""
        import httpx
        import ollama

        for pause in BUSY_PAUSES_SECONDS:
            try:
                answer = ask()
                if not isinstance(answer, httpx.Response) or answer.status_code != 503:
                    return answer
            except ollama.ResponseError as error:
                if error.status_code != 503:
                    raise
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    raise
            time.sleep(pause)
        return ask()

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        import httpx
        import ollama

        try:
            yield
        except ollama.ResponseError as error:
            raise UserError(refusal(self.url, doing, error.status_code, error.error)) from None
        except httpx.HTTPStatusError as error:
            raise UserError(refusal(self.url, doing, error.response.status_code, _words(error.response))) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UserError(absent(self.url, str(error))) from None
        except httpx.TimeoutException:
            raise UserError(
                f"{self.url} was silent for {ANSWER_SECONDS} s when asked to {doing}: see its log, then run again"
            ) from None
        except ConnectionError as error:
            # The official client's word for a server that is not there.
            gone = "Failed to connect" in str(error)
            raise UserError(absent(self.url, "refused") if gone else died(self.url, doing, error)) from None
        except httpx.HTTPError as error:
            raise UserError(died(self.url, doing, error)) from None
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.url} cannot {doing}, it gives no answer of Ollama ({error!r}): set OLLAMA_HOST to an Ollama"
            ) from None


def absent(url: str, reason: str) -> str:
    """What to say of a server that does not answer."""
    return (
        f"no Ollama answers at {url} ({reason or 'no answer'}): start it with 'ollama serve', or set OLLAMA_HOST to one"
    )


def died(url: str, doing: str, error: Exception) -> str:
    """What to say of a server that went away."""
    return (
        f"{url} was asked to {doing} and broke off ({str(error) or type(error).__name__}): see its log, start it again "
        "if it ended, then run the same command again"
    )


def refusal(url: str, doing: str, status: int, text: str) -> str:
    """What to say of a refusal, by what the server says; errors within a stream have no status of their own."""
    shown = " ".join(text.split())[:300] or f"HTTP {status}"
    if "no space left" in shown.lower() or status == 507:
        return f"the disk of {url} is full ({shown}): free some space there, then run the same command again"
    if "digest mismatch" in shown.lower():
        return f"{url} received other bytes than were sent ({shown}): run the same command again"
    if "failed to validate GGUF" in shown:  # its llama-quantize copies the file, and tells no reason
        return (
            f"{url} cannot {doing}: {shown}: it needs the file's size of free disk once more; its log says what failed"
        )
    if status == 503:
        return f"{url} is busy ({shown}): wait until it has answered others, then run the same command again"
    if status in (401, 403):
        return f"{url} refuses to {doing} ({shown}): set OLLAMA_API_KEY to its key"
    return f"{url} cannot {doing}: {shown}: see its log, then run the same command again"


def _words(response: Any) -> str:
    """The error's text, whether Ollama or a proxy before it wrote it."""
    try:
        response.read()
        return str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        return str(response.text)
