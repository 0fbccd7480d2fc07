"""The gateway in front of an engine: who may ask, how much at once, and how many may wait for their turn.

llama.cpp by itself queues without end, and tokenizes 10 MB before it refuses them. A question waits here, where it
costs nothing and its client may leave, until one of the engine's slots is free. What is asked and answered keeps to
OpenAI's API: `serve.gateway.exchange` says how. Nobody is listened to who sends half a request and waits.
"""

import asyncio
import json
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.gateway.auth import ApiKeyAuth
from serve.gateway.exchange import (
    CHAT,
    COMPLETIONS,
    TEMPLATE,
    Model,
    Refusal,
    answerable,
    event,
    joined,
    legacy_logprobs,
    refusal,
    total,
    unknown_model,
)

if TYPE_CHECKING:
    import httpx
    from starlette.types import Receive, Scope, Send

FACTS = frozenset({"/health", "/v1/models", "/props", "/metrics"})
MODELS = "/v1/models/"
QUESTIONS = frozenset(
    {CHAT, COMPLETIONS, TEMPLATE, "/tokenize", "/detokenize"}
)  # the last ones for proof and playground
PAGE = frozenset({"/v1/chat/completions/control", "/v1/stream", "/v1/streams/lookup"})  # of llama.cpp's own page
ENDED = "The engine ended while it answered: ask again"
JSON, EVENTS = b"application/json", b"text/event-stream"
ROOM_BYTES = 64 * 1024  # for what is no prompt: settings, schemas, the names of JSON's fields
ESCAPED = 6  # JSON writes a byte with so many at most, as \u001f
HEAD_SECONDS = 10
IDLE_SECONDS = 75
STALLED_SECONDS = 60  # a client that neither sends nor reads for so long is gone
PASSED = (b"authorization", b"content-type", b"accept", b"accept-encoding", b"if-none-match")
# Of one connection, or about the origins that llama.cpp knows.
DROPPED = (b"connection", b"keep-alive", b"transfer-encoding", b"access-control-allow-origin", b"vary")


@dataclass(frozen=True)
class Bounds:
    """What is let in: `slots` questions are answered at once, `queue` more wait.

    `context` tokens of at most `longest_token` bytes are the longest text that a conversation can hold.
    """

    slots: int
    queue: int
    context: int
    longest_token: int

    @property
    def text_bytes(self) -> int:
        return ROOM_BYTES + self.context * self.longest_token


class Gateway:
    """ASGI application in front of the engine that answers on the Unix socket `engine`.

    `origins` are the pages of a browser that may ask; `page` lets everybody see llama.cpp's own, which asks for the
    key itself; `absent` are parameters of which this engine takes none.
    """

    def __init__(
        self,
        engine: Path,
        key: str,
        bounds: Bounds,
        origins: tuple[str, ...] = (),
        page: bool = False,
        absent: frozenset[str] = frozenset(),
    ) -> None:
        import httpx

        # Few and short, since llama.cpp keeps a thread for each connection, and ends one that idles for 5 s.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=bounds.slots, keepalive_expiry=2)
        self.engine = httpx.AsyncHTTPTransport(uds=str(engine), limits=limits, verify=False)
        self.key = key
        self.guarded = ApiKeyAuth(self.answer, key, origins)
        self.bounds = bounds
        self.page = page
        self.absent = absent
        self.asked = 0  # questions under way or waiting
        self.turn = asyncio.Semaphore(bounds.slots)
        self.known: Model | None = None

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await (self.answer if self.is_of_page(scope) else self.guarded)(scope, receive, send)

    def is_of_page(self, scope: "Scope") -> bool:
        path, method = scope["path"], scope["method"]
        is_fact = path in FACTS or path.startswith(MODELS)
        return self.page and (path in PAGE or (method == "GET" and not is_fact))

    async def answer(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer whoever has got so far, or refuse."""
        path, method = scope["path"], scope["method"]
        try:
            if path in FACTS and method in ("GET", "HEAD"):
                await self.pass_on(scope, b"", path.encode(), send)
            elif path.startswith(MODELS) and method == "GET":
                await reply(send, JSON, json.dumps(await self.model_object(path.removeprefix(MODELS))).encode())
            elif path in QUESTIONS and method == "POST":
                asked = self.parsed(await self.body(receive, scope))
                await while_connected(receive, self.in_turn(path, asked, send))
            elif self.is_of_page(scope):
                target, body = scope["raw_path"] + b"?" + scope["query_string"], await self.body(receive, scope)
                await while_connected(receive, self.pass_on(scope, body, target, send))
            else:
                raise Refusal(404, f"There is no {method} {path} here: ask {CHAT} or {COMPLETIONS}")
        except Refusal as refused:
            await reply(send, JSON, refused.body, refused.status)

    async def model(self) -> Model:
        """What the engine tells of its model, asked once."""
        if self.known is None:
            listed, properties = await self.fact("/v1/models"), await self.fact("/props")
            meta = listed["data"][0].get("meta") or {}
            self.known = Model(
                names=tuple(model["id"] for model in listed["data"]),
                context=self.bounds.context,
                vocabulary=meta["n_vocab"],
                has_tools=properties["chat_template_caps"]["supports_tools"],
                has_calls=properties["chat_template_caps"]["supports_tool_calls"],
                has_developer="developer" in properties["chat_template"],
                most_choices=self.bounds.slots + self.bounds.queue,
                absent=self.absent,
            )
        return self.known

    async def model_object(self, name: str) -> dict[str, Any]:
        """What `/v1/models` lists of one model."""
        found = [model for model in (await self.fact("/v1/models"))["data"] if model["id"] == name]
        if not found:
            raise unknown_model(name, await self.model())
        return dict(found[0])

    async def body(self, receive: "Receive", scope: "Scope") -> bytes:
        """The whole body, which is never larger than what could be answered."""
        most, content = self.bounds.text_bytes * ESCAPED, bytearray()
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and int(stated) > most:
            raise self.too_long(int(stated) // ESCAPED)
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    content += message.get("body", b"")
                    if len(content) > most:
                        raise self.too_long(len(content) // ESCAPED)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refusal(408, f"The request did not arrive within {STALLED_SECONDS} s") from None
        return bytes(content)

    def parsed(self, body: bytes) -> dict[str, Any]:
        """The request, which the context might hold.

        Raises:
            Refusal: it is no JSON, or longer than the context.
        """
        try:
            asked = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"The request is no JSON: {error}") from None
        if not isinstance(asked, dict):
            raise Refusal(400, "The request is no JSON object")
        text = len(json.dumps(asked, ensure_ascii=False).encode(errors="surrogatepass"))
        if text > self.bounds.text_bytes:
            raise self.too_long(text)
        return asked

    def too_long(self, text_bytes: int) -> Refusal:
        context, longest = self.bounds.context, self.bounds.longest_token
        tokens = max((text_bytes - ROOM_BYTES) // longest, context + 1)
        says = f"The request has at least {tokens} tokens, a conversation may have {context}"
        code = {"type": "exceed_context_size_error", "code": "context_length_exceeded"}
        return Refusal(413, says, **code, n_prompt_tokens=tokens, n_ctx=context)

    async def in_turn(self, path: str, asked: dict[str, Any], send: "Send") -> None:
        """Wait for slots, then ask; each answer that is wanted takes one."""
        try:
            questions = answerable(path, asked, await self.model())
        except RecursionError:
            raise Refusal(400, "The request is nested too deep") from None
        count, most = len(questions), (await self.model()).most_choices
        if count > most:
            raise Refusal(400, f"{count} questions in one, {most} may be asked at once")
        if self.asked + count > most:
            raise Refusal(503, f"{self.asked} questions are waiting or being answered: come back later")
        self.asked += count
        try:
            if path not in (CHAT, COMPLETIONS):
                await reply(send, JSON, json.dumps(await self.whole(path, questions[0])).encode())
            elif asked.get("stream"):
                await self.stream(path, questions, asked, send)
            else:
                answers = await together([self.whole(path, question) for question in questions])
                made = joined(answers, count // (asked.get("n") or 1))
                await reply(send, JSON, json.dumps(made, ensure_ascii=False).encode())
        finally:
            self.asked -= count

    async def whole(self, path: str, question: dict[str, Any]) -> Any:
        """The engine's whole answer to one question."""
        import httpx

        async with self.turn, aclosing(await self.ask(path, question)) as response:
            try:
                made = json.loads(await response.aread())
            except httpx.HTTPError:
                raise Refusal(503, ENDED) from None
        if "error" in made:
            raise refusal(500, made)
        return made

    async def stream(self, path: str, questions: list[dict[str, Any]], asked: dict[str, Any], send: "Send") -> None:
        """The engine's answers as they come; those to several questions alternate, with one count of tokens at the end.

        Without its end a stream counts as cut off: the engine died, or its client has stopped reading.
        """
        import httpx

        begun = False
        usages: list[dict[str, Any]] = []
        last: dict[str, Any] = {}
        try:
            async with aclosing(self.chunks(path, questions)) as chunks:
                async for chunk in chunks:
                    if chunk.get("usage"):
                        usages.append(chunk.pop("usage"))
                        last = chunk
                    if not begun:
                        headers = [(b"content-type", EVENTS), (b"cache-control", b"no-cache")]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        begun = True
                    if chunk.get("choices") or "choices" not in chunk:
                        await piece(send, event(chunk))
            if last:
                prompts = len(questions) // (asked.get("n") or 1)
                await piece(send, event(last | {"choices": [], "usage": total(usages, prompts)}))
            await piece(send, b"data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b""})
        except (Refusal, httpx.HTTPError, TimeoutError) as error:
            if not begun:
                raise error if isinstance(error, Refusal) else Refusal(503, ENDED) from None
            if isinstance(error, Refusal):
                await piece(send, b"data: " + error.body + b"\n\n")
                await send({"type": "http.response.body", "body": b""})

    async def chunks(self, path: str, questions: list[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of the answers to all questions, as they come."""
        ready: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue(maxsize=1)

        async def follow(index: int, question: dict[str, Any]) -> None:
            try:
                async with aclosing(self.chunks_of_one(path, question)) as chunks:
                    async for chunk in chunks:
                        await ready.put(_numbered(chunk, index))
                await ready.put(None)
            except Exception as error:
                await ready.put(error)

        following = [asyncio.create_task(follow(*each)) for each in enumerate(questions)]
        try:
            identity: dict[str, Any] = {}
            waiting = len(following)
            while waiting:
                chunk = await ready.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                if chunk is None:
                    waiting -= 1
                    continue
                identity = identity or {"id": chunk["id"]} if "id" in chunk else identity
                yield chunk | identity
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def chunks_of_one(self, path: str, question: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        offset = 0
        async with self.turn, aclosing(await self.ask(path, question)) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    yield {"error": json.loads(refusal(500, chunk).body)["error"]}
                    return
                for choice in chunk.get("choices", ()):
                    legacy_logprobs(choice, offset)
                    offset += len(choice.get("text") or "")
                yield chunk

    async def ask(self, path: str, question: dict[str, Any]) -> "httpx.Response":
        """The engine's answer to one question, of which the head has come.

        Raises:
            Refusal: it has none.
        """
        import httpx

        # Written anew, so that the engine reads what was checked: of two equal names only the last, say.
        response = await self.request("POST", path.encode(), json.dumps(question).encode())
        if response.status_code == 200:
            return response
        try:
            content = await response.aread()
        except httpx.HTTPError:
            raise Refusal(503, ENDED) from None
        finally:
            await response.aclose()
        try:
            made = json.loads(content)
        except ValueError:
            made = content.decode(errors="replace")
        raise refusal(response.status_code, made)

    async def fact(self, path: str) -> dict[str, Any]:
        """What the engine tells of itself."""
        async with aclosing(await self.request("GET", path.encode())) as response:
            content = await response.aread()
        if response.status_code != 200:
            raise Refusal(503, "The engine is starting: come back later")
        return dict(json.loads(content))

    async def request(
        self, method: str, target: bytes, body: bytes = b"", headers: list[tuple[bytes, bytes]] | None = None
    ) -> "httpx.Response":
        """Ask the engine; the head of what it answers.

        Raises:
            Refusal: it does not answer.
        """
        import httpx

        own = [(b"authorization", f"Bearer {self.key}".encode()), (b"content-type", JSON)]
        request = httpx.Request(
            method,
            httpx.URL("http://engine").copy_with(raw_path=target),
            headers=[(b"host", b"engine"), *(own if headers is None else headers)],
            content=body or None,
            extensions={"timeout": {"connect": 5, "read": None, "write": None, "pool": None}},
        )
        try:
            response = await self.engine.handle_async_request(request)
        except httpx.HTTPError:
            raise Refusal(503, "The engine does not answer: come back later") from None
        response.request = request
        return response

    async def pass_on(self, scope: "Scope", body: bytes, target: bytes, send: "Send") -> None:
        """Ask the engine as its client does, and give the answer as it comes."""
        import httpx

        headers = [(name, value) for name, value in scope["headers"] if name in PASSED]
        response = await self.request(scope["method"], target, body, headers)
        kept = [(name, value) for name, value in response.headers.raw if name.lower() not in DROPPED]
        async with aclosing(response):
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            with suppress(httpx.HTTPError, TimeoutError):
                async for part in response.stream:  # type: ignore[union-attr]
                    await piece(send, part)
                await send({"type": "http.response.body", "body": b""})


async def reply(send: "Send", content_type: bytes, body: bytes, status: int = 200) -> None:
    """A whole answer."""
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def piece(send: "Send", body: bytes) -> None:
    """A part of an answer.

    Raises:
        TimeoutError: its client does not read.
    """
    async with asyncio.timeout(STALLED_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def together(answers: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All answers, in their order; the first failure ends the others."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(receive: "Receive", answering: Any) -> None:
    """Answer until it is done or its client has left, which closes the connection to the engine and frees the slot."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.create_task(answering), asyncio.create_task(left())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not answer.done():
            answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer


def _numbered(chunk: dict[str, Any], index: int) -> dict[str, Any]:
    for choice in chunk.get("choices", ()):
        choice["index"] = index
    return chunk


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class Connection(H11Protocol):
    """Each head has `HEAD_SECONDS`, for which uvicorn would wait for ever, and so has what follows an early answer.

    Until it answers, a body's time is the application's matter.
    """

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        is_half_sent = self.conn.their_state is h11.SEND_BODY  # answered before its body was there: 401, 408, 413
        super().on_response_complete()
        if is_half_sent:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.deadline:
            self.deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if self.deadline and not is_waiting:
            self.deadline.cancel()
            self.deadline = None
        elif is_waiting and not self.deadline:
            self.deadline = self.loop.call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def listen(application: Any, name: str, host: str, port: int) -> int:
    """Serve `name` until a signal; the exit code, 1 where it cannot listen."""
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        http=Connection,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    serving = threading.Thread(target=uvicorn.Server(config).run, daemon=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serving.start()
        sys.stdout.write(f"serving {name} on {host}:{port}\n")
        sys.stdout.flush()
        serving.join()
    except KeyboardInterrupt:
        return 0
    return 1
