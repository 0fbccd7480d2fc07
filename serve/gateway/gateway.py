"""The gateway in front of llama.cpp's server: who may ask, how much at once, and how many may wait for their turn.

llama.cpp by itself queues without end, takes a negative length for none, and tokenizes 10 MB before it refuses them.
A question waits here, where it costs nothing and its client may leave, until one of llama.cpp's slots is free.
"""

import asyncio
import json
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.gateway.guard import Guard

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

FACTS = frozenset({"/health", "/v1/models", "/props", "/metrics"})
QUESTIONS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"}
    | {"/apply-template", "/tokenize", "/detokenize"}  # what `make prove` and the playground ask
)
PAGE = frozenset({"/v1/chat/completions/control", "/v1/stream", "/v1/streams/lookup"})  # of llama.cpp's own page
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
ROOM_BYTES = 64 * 1024  # for what is no prompt: settings, schemas, the names of JSON's fields
ESCAPED = 6  # JSON writes a byte with so many at most, as \u001f
STALLED_SECONDS = 60  # a client that neither sends nor reads for so long is gone
PASSED = (b"authorization", b"content-type", b"accept", b"accept-encoding", b"if-none-match")
HOP = (b"connection", b"keep-alive", b"transfer-encoding")


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


class Refusal(Exception):
    """A request that does not reach the engine."""

    def __init__(self, status: int, message: str, **details: object) -> None:
        super().__init__(message)
        self.status = status
        self.details = details

    @property
    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return json.dumps({"error": {"message": str(self), "type": kind, "code": self.status} | self.details}).encode()


class Gateway:
    """ASGI application in front of llama.cpp's server on the Unix socket `engine`.

    `page` lets everybody see llama.cpp's own page, which asks for the key itself.
    """

    def __init__(self, engine: Path, key: str, bounds: Bounds, page: bool = False) -> None:
        import httpx

        # Few and short, since llama.cpp keeps a thread for each connection, and ends one that idles for 5 s.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=bounds.slots, keepalive_expiry=2)
        self.engine = httpx.AsyncHTTPTransport(uds=str(engine), limits=limits, verify=False)
        self.guarded = Guard(self.answer, key)
        self.bounds = bounds
        self.page = page
        self.asked = 0  # questions under way or waiting
        self.turn = asyncio.Semaphore(bounds.slots)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await (self.answer if self.is_of_page(scope) else self.guarded)(scope, receive, send)

    def is_of_page(self, scope: "Scope") -> bool:
        path, method = scope["path"], scope["method"]
        return self.page and (path in PAGE or (method == "GET" and path not in FACTS))

    async def answer(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer whoever has got so far, or refuse."""
        try:
            if scope["path"] in FACTS and scope["method"] in ("GET", "HEAD"):
                await self.pass_on(scope, b"", scope["path"].encode(), send)
            elif scope["path"] in QUESTIONS and scope["method"] == "POST":
                question = self.checked(await self.body(receive, scope))
                await while_connected(receive, self.in_turn(question, scope, send))
            elif self.is_of_page(scope):
                target, body = scope["raw_path"] + b"?" + scope["query_string"], await self.body(receive, scope)
                await while_connected(receive, self.pass_on(scope, body, target, send))
            else:
                raise Refusal(404, "There is nothing here")
        except Refusal as refusal:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": refusal.body})

    async def body(self, receive: "Receive", scope: "Scope") -> bytes:
        """The whole body, which is never larger than what could be answered."""
        most, content = self.bounds.text_bytes * ESCAPED, bytearray()
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > most:
            raise self.too_long(int(told) // ESCAPED)
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    content += message.get("body", b"")
                    if len(content) > most:
                        raise self.too_long(len(content) // ESCAPED)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refusal(408, f"The question did not arrive within {STALLED_SECONDS} s") from None
        return bytes(content)

    def checked(self, body: bytes) -> dict[str, Any]:
        """The question, if it is one that llama.cpp can answer.

        Raises:
            Refusal: it is no JSON, wants a negative length, or is longer than the context.
        """
        try:
            question = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"The question is no JSON: {error}") from None
        if not isinstance(question, dict):
            raise Refusal(400, "The question is no JSON object")
        for name in LENGTHS:
            length = question.get(name)
            if isinstance(length, int | float) and length < 0:
                raise Refusal(400, f"{name} is {length}: give a length from 0 on, or none for as much as there is room")
        text = len(json.dumps(question, ensure_ascii=False).encode(errors="surrogatepass"))
        if text > self.bounds.text_bytes:
            raise self.too_long(text)
        return question

    def too_long(self, text_bytes: int) -> Refusal:
        context, longest = self.bounds.context, self.bounds.longest_token
        tokens = max((text_bytes - ROOM_BYTES) // longest, context + 1)
        says = f"The question has at least {tokens} tokens, a conversation may have {context}"
        return Refusal(413, says, type="exceed_context_size_error", n_prompt_tokens=tokens, n_ctx=context)

    async def in_turn(self, question: dict[str, Any], scope: "Scope", send: "Send") -> None:
        """Wait for a slot, then ask."""
        count, most = questions(question), self.bounds.slots + self.bounds.queue
        if count > most:
            raise Refusal(400, f"{count} questions in one, {most} may be asked at once")
        if self.asked + count > most:
            raise Refusal(503, f"{self.asked} questions are waiting or being answered: come back later")
        self.asked += count
        try:
            async with self.turn:
                # Written anew, so that llama.cpp reads what was checked: of two equal names only the last, say.
                await self.pass_on(scope, json.dumps(question).encode(), scope["path"].encode(), send)
        finally:
            self.asked -= count

    async def pass_on(self, scope: "Scope", body: bytes, path: bytes, send: "Send") -> None:
        """Ask the engine, and give its answer as it comes."""
        import httpx

        headers = [(name, value) for name, value in scope["headers"] if name in PASSED]
        wait = {"connect": 5, "read": None, "write": None, "pool": None}
        request = httpx.Request(
            scope["method"],
            httpx.URL("http://engine").copy_with(raw_path=path),
            headers=[(b"host", b"engine"), *headers],
            content=body or None,
            extensions={"timeout": wait},
        )
        try:
            response = await self.engine.handle_async_request(request)
        except httpx.HTTPError:
            raise Refusal(503, "The engine does not answer: come back later") from None
        kept = [(name, value) for name, value in response.headers.raw if name.lower() not in HOP]
        async with aclosing(response):
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            # Without its end, the answer counts as cut off: the engine died, or its client has stopped reading.
            with suppress(httpx.HTTPError, TimeoutError):
                async for piece in response.stream:  # type: ignore[union-attr]
                    async with asyncio.timeout(STALLED_SECONDS):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})


def questions(asked: dict[str, Any]) -> int:
    """How many answers it wants: one, or one for each of a list of prompts, a prompt being a text or its tokens."""
    prompts = asked.get("prompt", asked.get("input"))
    several = isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list)
    return len(prompts) if several else 1


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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
