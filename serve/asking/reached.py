"""A server of somebody's: found by what it tells of itself, and asked as its kind is asked."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pipeline.error import UserError
from serve.asking.endpoint import ERRORS, ask
from serve.asking.probe import PROBABILITIES, Engine, LlamaCpp, OpenAi, Vllm
from serve.engines.ollama.server import OllamaServer, server_url

CONTEXT = 4096  # of a server that tells none
OLLAMA = "ollama:"
BYTES = "the template's bytes"
UNSEEN = {
    "llamacpp": [],
    "vllm": [BYTES],
    "openai": [BYTES, "token ids"],
    "ollama": ["token ids", "probabilities"],
}


@dataclass(frozen=True)
class Reached:
    """`kind` is one of UNSEEN; `context` in tokens; `tells` is whether it tells probabilities."""

    kind: str
    root: str
    key: str
    model: str
    context: int
    tells: bool

    @property
    def unseen(self) -> list[str]:
        """What of the model it does not show."""
        return UNSEEN[self.kind] + (["probabilities"] if self.kind == "openai" and not self.tells else [])


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://", OLLAMA))


def reach(name: str) -> Reached:
    """The server of `ollama:model`, or of an address of OpenAI's API, with `#model` where it serves several.

    Raises:
        UserError: nothing answers there, it refuses the key, or it has no such model.
    """
    if name.startswith(OLLAMA):
        return reach_ollama(name.removeprefix(OLLAMA))
    address, _, wanted = name.partition("#")
    root, key = address.rstrip("/").removesuffix("/v1"), os.environ.get("OPENAI_API_KEY", "")
    try:
        status, listed = ask(root, "/v1/models", key)
        refuse_key(name, status)
        models = {str(each["id"]): each for each in listed["data"]} if status == 200 else {}
        if not models or (wanted and wanted not in models):
            raise UserError(f"{name} has no model {wanted!r}: it lists {', '.join(models) or 'none'} (HTTP {status}): "
                            "give the address of an API of OpenAI's")  # fmt: skip
        if len(models) > 1 and not wanted:
            raise UserError(f"{name} serves {', '.join(models)}: name one, as {address}#{next(iter(models))}")
        model = models[wanted or next(iter(models))]
        context = int((model.get("meta") or {}).get("n_ctx") or model.get("max_model_len") or CONTEXT)
        found = Reached("openai", root, key, str(model["id"]), context, True)
        for kind, path in (("llamacpp", "/props"), ("vllm", "/version")):
            if answers(name, root, path, key):
                return replace(found, kind=kind)
        return replace(found, tells=tells(name, found))
    except (*ERRORS, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: no API of OpenAI's answers there ({error}): start it, or correct the address"
        ) from None


def answers(name: str, root: str, path: str, key: str) -> bool:
    """Whether it has such a page in JSON."""
    try:
        status, _ = ask(root, path, key)
    except ValueError:  # a page, not JSON
        return False
    refuse_key(name, status)
    return status == 200


def refuse_key(name: str, status: int) -> None:
    """
    Raises:
        UserError: the status says that the key is not right.
    """
    if status in (401, 403):
        variable = "OLLAMA_API_KEY" if name.startswith(OLLAMA) else "OPENAI_API_KEY"
        raise UserError(f"{name} refuses the key, or wants one (HTTP {status}): set {variable} to its key")


def tells(name: str, found: Reached) -> bool:
    """Whether it tells probabilities with an answer."""
    body = {"model": found.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    status, made = ask(found.root, "/v1/chat/completions", found.key, body | PROBABILITIES, timeout=600)
    refuse_key(name, status)
    return status == 200 and bool((made["choices"][0].get("logprobs") or {}).get("content"))


def reach_ollama(model: str) -> Reached:
    """The model of that name in the Ollama at OLLAMA_HOST."""
    url, wanted = server_url(), model if ":" in model else f"{model}:latest"
    with OllamaServer(url) as server:
        server.version()
        models = server.digests()
    if wanted not in models:
        raise UserError(f"{url} has no model {wanted}, but {', '.join(sorted(models)) or 'none'}: see 'ollama list'")
    found = Reached("ollama", url, os.environ.get("OLLAMA_API_KEY", ""), wanted, CONTEXT, True)
    with suppress(*ERRORS, LookupError, TypeError):
        return replace(found, tells=tells(f"{OLLAMA}{model}", found))
    return replace(found, tells=False)


def engine_of(found: Reached, vocabulary: Any) -> Engine:
    """How it is asked; `vocabulary` is the tokenizer of the reference."""
    if found.kind == "openai":
        return OpenAi(found.root, found.key, found.model, vocabulary, found.tells)
    kind = LlamaCpp if found.kind == "llamacpp" else Vllm
    return kind(found.root, found.key, found.model)
