"""A server of somebody's: found by what it tells of itself, asked as its kind is asked, and held to another one.

Of two servers of which no file is at hand, what the one answers is what the other is held to. A token is then known by
its text, as OpenAI's API tells it.
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pipeline.error import UserError
from pipeline.progress import progress
from pipeline.proof import Comparison
from pipeline.recipe import Prove
from pipeline.reference import OwnAnswer, Probe
from serve.asking.endpoint import ERRORS, ask
from serve.asking.judgement import Own, compare_probabilities, judge, plain
from serve.asking.probe import PROBABILITIES, Answer, Engine, LlamaCpp, OpenAi, Vllm, answer, ask_probes
from serve.engines.ollama.server import OllamaServer, server_url

CONTEXT = 4096  # of a server that tells none
LEAST_AGREEMENT = 0.6  # of answers without probabilities, by a file that is not at hand and may be quantized
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


@dataclass(frozen=True)
class ByText(OpenAi):
    """A server whose tokens are numbered by their texts, in a `vocabulary` that grows and that two of them share."""

    vocabulary: dict[str, int]

    def token(self, entry: dict[str, Any]) -> int:
        return self.number(str(entry["token"]))

    def number(self, text: str) -> int:
        return self.vocabulary.setdefault(text, len(self.vocabulary))

    def text(self, tokens: list[int]) -> str:
        texts = list(self.vocabulary)
        return "".join(texts[token] for token in tokens)


def compare_servers(comparison: Comparison, first: Reached, second: Reached, probes: list[Probe]) -> None:
    """Hold the answers of the second to those of the first.

    Raises:
        UserError: the first one answers nothing.
    """
    vocabulary: dict[str, int] = {}
    one, other = (ByText(each.root, each.key, each.model, vocabulary, each.tells) for each in (first, second))
    shown = LlamaCpp(first.root, first.key, first.model) if first.kind == second.kind == "llamacpp" else None
    asked, own = [], {}
    with progress("prove: the first server", len(probes)) as tell:
        for done, probe in enumerate(probes, 1):
            said = answer(one, probe, first.context)
            if said.status == 200:
                asked.append(as_told(probe, said, one, shown))
                own[probe.name] = own_of(probe.name, said, one)
            tell(done)
    if not asked:
        raise UserError(f"{first.root} answers none of {len(probes)} prompts ({said.text}): see its log")
    unseen = [] if shown else [BYTES, "token ids"]
    unseen += [] if first.tells and second.tells else ["probabilities"]
    comparison.measures |= {"type": "", "not_compared": unseen}
    if shown:
        there = LlamaCpp(second.root, second.key, second.model)
        comparison.problems += list(filter(None, map(there.prompt_problem, asked)))[:1]
    if comparison.problems:
        return
    found = ask_probes(comparison, other, asked, min(first.context, second.context), slots=1)
    if comparison.problems:
        return
    judge(comparison, found, Own(own, {}, Prove.quantized_max_kl, LEAST_AGREEMENT), other.text)
    compare_probabilities(comparison, found, own)
    same, count = comparison.measures["greedy_agreement"], comparison.measures["probes"]
    if not comparison.problems and "divergence_mean" not in comparison.measures and same < LEAST_AGREEMENT:
        comparison.problems.append(f"answers: {round((1 - same) * count)} of {count} are others")


def as_told(probe: Probe, said: Answer, engine: ByText, shown: LlamaCpp | None) -> Probe:
    """The probe with what the server made of it: the answer as one word, and of the prompt as much as it shows."""
    prompt = shown.prompt(probe)[1] if shown else ""
    ids = shown.tokens(prompt) if shown else [0] * said.prompt_tokens
    stopped = said.reason == "stop"
    words = [engine.number(said.text), *([engine.number("")] if stopped else [])]
    return replace(probe, prompt=prompt, ids=ids, continuation=words, stopped=stopped)


def own_of(name: str, said: Answer, engine: ByText) -> OwnAnswer:
    """What it answered, token by token where it tells them."""
    if not said.tokens:
        return OwnAnswer("first", name, [engine.number(said.text)], False, [])
    tokens, top = [], []
    for told in said.tokens:
        others = math.log(max(1 - math.exp(told.score), 1e-9))  # where it tells no single one of them
        scores = (told.top or {-1: others}) | {told.token: told.score}
        tokens.append(told.token)
        top.append(sorted(scores.items(), key=lambda each: -each[1]))
    ended = said.reason == "stop" and plain(engine.text(tokens[:-1])) == plain(said.text)
    return OwnAnswer("first", name, tokens, ended, top)
