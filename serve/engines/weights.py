"""A model folder, with or without its adapter, behind OpenAI's API:  python -m serve.engines.weights SETTINGS

For the playground only: seconds after training, before anything is merged or converted. It is a process of its own,
so that its memory goes with it; it speaks of the prompt as llama.cpp's server does, `/apply-template`, `/tokenize`.
"""

import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.asking.endpoint import HOST
from serve.asking.key import read_key

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


@dataclass(frozen=True)
class Settings:
    """What is loaded and where it answers: `folder` as the model `name`, and with `adapter` on it as `adapter`."""

    folder: str
    name: str
    adapter: str
    port: int
    key_file: str


class Speaker:
    """The loaded model, which gives one answer at a time; float32, on a GPU bfloat16."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.name, self.turn = settings.name, threading.Lock()
        self.tokenizer = AutoTokenizer.from_pretrained(settings.folder)
        self.model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=dtype).eval()
        self.known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.stops = self.model.generation_config.eos_token_id
        if settings.adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, settings.adapter).eval()
        self.names = [settings.name, *(["adapter"] if settings.adapter else [])]
        if on_gpu:
            self.model.to("cuda")

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The template's text, as training rendered it."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def tokens(self, text: str) -> list[dict[str, Any]]:
        """Ids and texts of a prompt's tokens; a token that ends within a character has an empty text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces, shown = [], 0
        for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            pieces.append({"id": id, "piece": text[max(start, shown) : end]})
            shown = max(shown, end)
        return pieces

    def answer(self, asked: dict[str, Any], ids: list[int], cancelled: threading.Event) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed answer as OpenAI's API has them, ended early by `cancelled`."""
        import torch
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        done: dict[str, Any] = {}

        def speak() -> None:
            try:
                bare = asked["model"] != "adapter" and "adapter" in self.names
                with self.turn, torch.inference_mode(), self.model.disable_adapter() if bare else nullcontext():
                    done["ids"] = self._generate(asked, ids, streamer, cancelled)
            except Exception as error:
                done["error"] = f"{type(error).__name__}: {error}"
            finally:
                streamer.end()

        speaking = threading.Thread(target=speak)
        speaking.start()
        for piece in streamer:
            if piece:
                yield {"choices": [{"index": 0, "delta": {"content": piece}}]}
        speaking.join()
        if "error" in done:
            yield {"error": {"message": done["error"], "type": "server_error"}}
            return
        reason = "stop" if done["ids"] and done["ids"][-1] in _listed(self.stops) else "length"
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(done["ids"])}
        yield {"choices": [], "usage": usage | {"total_tokens": sum(usage.values())}}

    def _generate(self, asked: dict[str, Any], ids: list[int], streamer: Any, cancelled: threading.Event) -> list[int]:
        import torch
        from transformers import StoppingCriteriaList

        def stop(made: Any, _scores: Any, **_: Any) -> Any:
            return torch.full((made.shape[0],), cancelled.is_set(), device=made.device, dtype=torch.bool)

        if asked.get("seed") is not None:
            torch.manual_seed(asked["seed"])
        batch, heat = torch.tensor([ids], device=self.model.device), asked.get("temperature", 1.0)
        sampling = {"temperature": heat, "top_p": asked.get("top_p", 1.0), "top_k": asked.get("top_k", 0)}
        made = self.model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=min(asked.get("max_tokens") or sys.maxsize, self.known - len(ids)),
            eos_token_id=self.stops,
            repetition_penalty=1.0,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            **({"do_sample": True, **sampling} if heat > 0 else {"do_sample": False}),
        )
        return list(made[0, len(ids) :].tolist())


def app(speaker: Speaker, key: str) -> "Starlette":
    """The routes, all but `/health` behind the key."""
    from jinja2 import TemplateError
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    def refused(status: int, message: str, **more: Any) -> "Response":
        return JSONResponse({"error": {"code": status, "message": message, **more}}, status)

    def route(path: str, answer: Any, method: str) -> Route:
        async def guarded(request: "Request") -> "Response":
            if request.headers.get("authorization") != f"Bearer {key}":
                return refused(401, "Invalid API Key")
            try:
                found = answer(await request.json() if method == "POST" else {})
            except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
                return refused(400, f"{type(error).__name__}: {error}")
            return found if isinstance(found, StreamingResponse | JSONResponse) else JSONResponse(found)

        return Route(path, guarded, methods=[method])

    def complete(asked: dict[str, Any]) -> "Response":
        if asked["model"] not in speaker.names:
            return refused(404, f"no model {asked['model']!r}: there are {', '.join(speaker.names)}")
        ids = [token["id"] for token in speaker.tokens(speaker.prompt(asked["messages"]))]
        if len(ids) >= speaker.known:
            sizes = {"n_prompt_tokens": len(ids), "n_ctx": speaker.known}
            return refused(400, "the prompt is too long", type="exceed_context_size_error", **sizes)
        cancelled = threading.Event()

        async def events() -> AsyncIterator[str]:
            try:
                async for part in iterate_in_threadpool(speaker.answer(asked, ids, cancelled)):
                    chunk = {"model": asked["model"], "object": "chat.completion.chunk", **part}
                    yield f"data: {json.dumps(chunk)}\n\n"
                yield "data: [DONE]\n\n"
            finally:  # also when the one who asked has gone
                cancelled.set()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(_: "Request") -> "Response":
        return JSONResponse({"status": "ok"})

    models = {"object": "list", "data": [{"id": name, "meta": {"n_ctx": speaker.known}} for name in speaker.names]}
    return Starlette(
        routes=[
            Route("/health", health),
            route("/v1/models", lambda _: models, "GET"),
            route("/apply-template", lambda asked: {"prompt": speaker.prompt(asked["messages"])}, "POST"),
            route("/tokenize", lambda asked: {"tokens": speaker.tokens(asked["content"])}, "POST"),
            route("/v1/chat/completions", complete, "POST"),
        ]
    )


def _listed(stops: Any) -> list[int]:
    return stops if isinstance(stops, list) else [stops]


if __name__ == "__main__":
    import uvicorn

    settings = Settings(**json.loads(sys.argv[1]))
    served = app(Speaker(settings), read_key(Path(settings.key_file)))
    uvicorn.run(served, host=HOST, port=settings.port, log_level="warning", access_log=False)
