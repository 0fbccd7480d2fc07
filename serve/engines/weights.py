"""A model folder, with or without its adapter, behind the gateway:  python -m serve.engines.weights SETTINGS

Seconds after training, before anything is merged or converted. It is a process of its own, so that its memory goes
with it; to the gateway it answers as llama.cpp's server does, and gives one answer at a time.
"""

import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.error import UserError
from pipeline.files import own_folder
from pipeline.model import ends_of, load, with_adapter
from pipeline.rows import rendered
from serve.asking.endpoint import HOST, read_key
from serve.gateway.exchange import CHAT, COMPLETIONS, TEMPLATE
from serve.gateway.gateway import Bounds, Gateway, listen

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

QUEUE = 16
LONGEST_CONTEXT = 1 << 20  # of a model that names none
# Of OpenAI's parameters, what `transformers` has only for whole answers, or not at all.
ABSENT = frozenset(
    ("tools", "response_format", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty")
)


@dataclass(frozen=True)
class Settings:
    """What is loaded and where it answers: `folder` as the model `name`, and with `adapter` on it as `adapter`."""

    folder: str
    name: str
    adapter: str
    port: int
    key_file: str


class Generator:
    """The loaded model, which gives one answer at a time; bfloat16 on a GPU."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoTokenizer

        self.name, self.turn = settings.name, threading.Lock()
        self.tokenizer = AutoTokenizer.from_pretrained(settings.folder)
        self.model = load(Path(settings.folder), "bfloat16" if torch.cuda.is_available() else "float32")
        config = self.model.config.get_text_config()
        self.known = getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
        self.vocabulary = int(config.vocab_size)
        self.longest_token = max(len(token.encode()) for token in self.tokenizer.get_vocab())
        self.ends = ends_of(self.model)
        if settings.adapter:
            self.model = with_adapter(self.model, Path(settings.adapter))
        self.names = [settings.name, *(["adapter"] if settings.adapter else [])]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The template's text, as training rendered it."""
        return rendered(self.tokenizer, messages, prompt=True)

    def tokens(self, text: str) -> list[dict[str, Any]]:
        """Ids and texts of a prompt's tokens; a token that ends within a character has an empty text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces, shown = [], 0
        for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            pieces.append({"id": id, "piece": text[max(start, shown) : end]})
            shown = max(shown, end)
        return pieces

    def answer(self, asked: dict[str, Any], ids: list[int], cancelled: threading.Event) -> Iterator["Piece"]:
        """The answer to a prompt's tokens as it comes, ended early by `cancelled` or before a text of `stop`.

        Raises:
            RuntimeError: it broke off.
        """
        import torch
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        done: dict[str, Any] = {}

        def generate() -> None:
            try:
                bare = asked.get("model") != "adapter" and "adapter" in self.names
                with self.turn, torch.inference_mode(), self.model.disable_adapter() if bare else nullcontext():
                    done["ids"] = self._generate(asked, ids, streamer, cancelled)
            except Exception as error:
                done["error"] = error
            finally:
                streamer.end()

        generating = threading.Thread(target=generate)
        generating.start()
        is_stopped = False
        for text, is_stopped in until_stop(streamer, asked.get("stop", [])):
            if text:
                yield Piece(text)
            if is_stopped:
                cancelled.set()
        generating.join()
        if "error" in done:
            raise RuntimeError(f"{type(done['error']).__name__}: {done['error']}") from done["error"]
        ended = is_stopped or (done["ids"] and done["ids"][-1] in self.ends)
        yield Piece("", "stop" if ended else "length", len(done["ids"]))

    def _generate(self, asked: dict[str, Any], ids: list[int], streamer: Any, cancelled: threading.Event) -> list[int]:
        import torch
        from transformers import StoppingCriteriaList

        def stop(made: Any, _scores: Any, **_: Any) -> Any:
            return torch.full((made.shape[0],), cancelled.is_set(), device=made.device, dtype=torch.bool)

        if asked.get("seed") is not None:
            torch.manual_seed(asked["seed"])
        batch, temperature = torch.tensor([ids], device=self.model.device), asked.get("temperature", 1.0)
        length = asked.get("max_completion_tokens") or asked.get("max_tokens") or self.known
        sampling = {"temperature": temperature, "top_p": asked.get("top_p", 1.0), "top_k": asked.get("top_k", 0)}
        made = self.model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=min(length, self.known - len(ids)),
            eos_token_id=self.ends,
            repetition_penalty=1.0,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            **({"do_sample": True, **sampling} if temperature > 0 else {"do_sample": False}),
        )
        return list(made[0, len(ids) :].tolist())


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has no text, and says why the answer ended and how many tokens it has."""

    text: str
    reason: str | None = None
    tokens: int = 0


def until_stop(texts: Iterator[str], stops: list[str]) -> Iterator[tuple[str, bool]]:
    """The texts as far as the first of `stops`, and whether it came; what could begin one is held back."""
    held, longest = "", max(map(len, stops), default=1)
    for text in texts:
        held += text
        if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
            yield held[: min(found)], True
            return
        ready = max(0, len(held) - longest + 1)
        yield held[:ready], False
        held = held[ready:]
    yield held, False


def engine(generator: Generator) -> "Starlette":
    """What the gateway asks of an engine."""
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    def refused(message: str, **more: Any) -> "Response":
        return JSONResponse({"error": {"message": message, **more}}, 400)

    def facts(path: str, found: dict[str, Any]) -> Route:
        return Route(path, lambda _: JSONResponse(found))

    def route(path: str, answer: Any) -> Route:
        async def answered(request: "Request") -> "Response":
            try:
                made: Response = await answer(await request.json())
                return made
            except (UserError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                return refused(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

        return Route(path, answered, methods=["POST"])

    async def template(asked: dict[str, Any]) -> "Response":
        return JSONResponse({"prompt": generator.prompt(asked["messages"])})

    async def tokenize(asked: dict[str, Any]) -> "Response":
        return JSONResponse({"tokens": generator.tokens(asked["content"])})

    async def complete(asked: dict[str, Any], is_chat: bool) -> "Response":
        prompt = generator.prompt(asked["messages"]) if is_chat else asked["prompt"]
        ids = [token["id"] for token in generator.tokens(prompt)] if isinstance(prompt, str) else prompt
        if not ids or len(ids) >= generator.known:
            sizes = {"n_prompt_tokens": len(ids), "n_ctx": generator.known}
            says = f"the prompt has {len(ids)} tokens: give from 1 to {generator.known - 1}"
            return refused(says, type="exceed_context_size_error", **sizes)
        cancelled = threading.Event()
        kind = "chat.completion" if is_chat else "text_completion"
        head = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": asked.get("model", generator.name),
            "object": f"{kind}.chunk" if is_chat and asked.get("stream") else kind,
        }

        def part(content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return head | {"choices": [{"index": 0, "finish_reason": reason, "logprobs": None, **content}]}

        def usage(last: Piece) -> dict[str, Any]:
            total = len(ids) + last.tokens
            return {"usage": {"prompt_tokens": len(ids), "completion_tokens": last.tokens, "total_tokens": total}}

        async def streamed() -> AsyncIterator[dict[str, Any]]:
            if is_chat:
                yield part({"delta": {"role": "assistant", "content": ""}})
            async for piece in iterate_in_threadpool(generator.answer(asked, ids, cancelled)):
                content = {"content": piece.text} if piece.text else {}
                yield part({"delta": content} if is_chat else {"text": piece.text}, piece.reason)
                if piece.reason and (asked.get("stream_options") or {}).get("include_usage"):
                    yield head | {"choices": []} | usage(piece)

        async def whole() -> AsyncIterator[dict[str, Any]]:
            *pieces, last = [piece async for piece in iterate_in_threadpool(generator.answer(asked, ids, cancelled))]
            text = "".join(piece.text for piece in pieces)
            content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            yield part(content, last.reason) | usage(last)

        async def written() -> AsyncIterator[str]:
            layout = "data: {}\n\n" if asked.get("stream") else "{}"
            try:
                async for made in streamed() if asked.get("stream") else whole():
                    yield layout.format(json.dumps(made))
            except RuntimeError as error:
                yield layout.format(json.dumps({"error": {"message": str(error)}}))
            finally:  # also when the one who asked has gone
                cancelled.set()

        return StreamingResponse(
            written(), media_type="text/event-stream" if asked.get("stream") else "application/json"
        )

    meta = {"n_ctx": generator.known, "n_vocab": generator.vocabulary}
    started_at = int(time.time())
    models = [
        {"id": name, "object": "model", "created": started_at, "owned_by": "truetune", "meta": meta}
        for name in generator.names
    ]
    caps = {"supports_tools": False, "supports_tool_calls": False}
    properties = {"chat_template": str(generator.tokenizer.chat_template), "chat_template_caps": caps}
    return Starlette(
        routes=[
            facts("/health", {"status": "ok"}),
            facts("/v1/models", {"object": "list", "data": models}),
            facts("/props", properties),
            route(TEMPLATE, template),
            route("/tokenize", tokenize),
            route(CHAT, lambda asked: complete(asked, is_chat=True)),
            route(COMPLETIONS, lambda asked: complete(asked, is_chat=False)),
        ]
    )


def application(generator: Generator, socket: Path, key: str) -> "tuple[Starlette, Gateway]":
    """The engine, which is to listen on the socket, and the gateway to it."""
    bounds = Bounds(1, QUEUE, generator.known, generator.longest_token)
    return engine(generator), Gateway(socket, key, bounds, absent=ABSENT)


def serve(settings: Settings) -> int:
    """Load, then answer behind the gateway until a signal; the exit code."""
    import uvicorn

    with own_folder("truetune-weights") as folder:
        socket = folder / "engine.sock"
        inner, gateway = application(Generator(settings), socket, read_key(Path(settings.key_file)))
        config = uvicorn.Config(inner, uds=str(socket), lifespan="off", log_level="warning", access_log=False)
        threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
        return listen(gateway, settings.name, HOST, settings.port)


if __name__ == "__main__":
    os._exit(serve(Settings(**json.loads(sys.argv[1]))))  # an answer under way is not waited for
