"""The official client against what is served: connected once its model is proved, and its answers as they arrive."""

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.error import UserError
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import HOST, is_healthy, port_of_environment, read_key, served_model, url_of

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

LIST_SECONDS = 3.0


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
