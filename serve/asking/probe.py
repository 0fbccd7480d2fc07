"""The reference's probes asked of a server: the tokens of the prompt, the greedy answer, whether it stops, and whether
it is the same when asked again; then answers that are drawn, and one without a limit."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pipeline.proof import Comparison, first_difference, same_share
from pipeline.reference import CONTINUATION_TOKENS, Probe
from serve.asking.endpoint import ask, connected

LONG_TOKENS = 272  # servers' own limits are 16, 128 or 256 tokens, if they have one
WHOLE_VOCABULARY = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}
PROBABILITIES = {"logprobs": True, "top_logprobs": 20}  # the most that OpenAI's API tells


class Engine(Protocol):
    """A server that answers under a name, and what only servers of its kind tell."""

    @property
    def port(self) -> int | str:
        """Its port on this machine, or its URL."""

    @property
    def key(self) -> str:
        """What it wants from who asks."""

    @property
    def name(self) -> str:
        """The model's there."""

    new: ClassVar[dict[str, Any]]  # what a request says so that nothing of its prompt is taken from the cache

    def request(self, probe: Probe) -> dict[str, Any]:
        """The probe as a client of this server asks it."""

    def prompt_problem(self, probe: Probe) -> str:
        """How the prompt that the server makes of the messages differs from training's, or nothing."""

    def prompt_tokens(self, probe: Probe, switches: dict[str, Any]) -> int:
        """How many tokens the prompt has when the template is given these switches."""

    def text(self, tokens: list[int]) -> str:
        """The server's text of tokens."""

    def token(self, entry: dict[str, Any]) -> int:
        """The id of a token as the server tells it."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's server, which shows the text and the tokens of a prompt."""

    port: int | str
    key: str
    name: str
    new: ClassVar[dict[str, Any]] = {"cache_prompt": False}

    def request(self, probe: Probe) -> dict[str, Any]:
        return asked(probe) | PROBABILITIES

    def token(self, entry: dict[str, Any]) -> int:
        return int(entry["id"])

    def prompt_problem(self, probe: Probe) -> str:
        status, prompt = self.prompt(probe)
        if status != 200:
            return f"chat template: probe '{probe.name}' is refused: {prompt}"
        if self.is_as_trained(prompt, probe):
            return other_tokens(probe, self.tokens(prompt))
        for thinking in (True, False):
            if self.is_as_trained(self.prompt(probe, {"enable_thinking": not thinking})[1], probe):
                how = "on" if thinking else "off"
                return f"chat template: probe '{probe.name}': the server switches thinking {how} (enable_thinking)"
        bos = self.bos
        return other_text(probe, bos + prompt if probe.prompt.startswith(bos) else prompt)

    def is_as_trained(self, prompt: str, probe: Probe) -> bool:
        """The server takes off a BOS that the template writes, and puts it on again with the tokens."""
        return probe.prompt in (prompt, self.bos + prompt)

    @property
    def bos(self) -> str:
        """The text of the token that it puts before all others, if it does."""
        return self.text(self.tokens("")[:1])

    def prompt_tokens(self, probe: Probe, switches: dict[str, Any]) -> int:
        return len(self.tokens(self.prompt(probe, switches)[1]))

    def prompt(self, probe: Probe, switches: dict[str, Any] | None = None) -> tuple[int, str]:
        """The status, and the rendered text or the refusal."""
        body = asked(probe) | ({"chat_template_kwargs": switches} if switches else {})
        status, made = ask(self.port, "/apply-template", self.key, body, 60)
        return status, str(made["prompt"]) if status == 200 else refusal(made)

    def tokens(self, text: str) -> list[int]:
        """The server's tokens of a rendered prompt, with what it adds by itself."""
        body = {"content": text, "add_special": True, "parse_special": True}
        _, made = ask(self.port, "/tokenize", self.key, body, 60)
        return list(made.get("tokens", []))

    def text(self, tokens: list[int]) -> str:
        _, made = ask(self.port, "/detokenize", self.key, {"tokens": tokens}, 60)
        return str(made.get("content", ""))


@dataclass(frozen=True)
class OpenAi:
    """Any other server of OpenAI's API, which shows nothing of a prompt but its length.

    `vocabulary` is the trained model's own; `tells` is whether the server tells probabilities.
    """

    port: int | str
    key: str
    name: str
    vocabulary: Any
    tells: bool
    new: ClassVar[dict[str, Any]] = {}

    def request(self, probe: Probe) -> dict[str, Any]:
        return asked(probe) | (PROBABILITIES if self.tells else {})

    def prompt_problem(self, probe: Probe) -> str:
        return ""

    def prompt_tokens(self, probe: Probe, switches: dict[str, Any]) -> int:
        return 0

    def text(self, tokens: list[int]) -> str:
        return str(self.vocabulary.decode(tokens))

    def token(self, entry: dict[str, Any]) -> int:
        return self.ids.get(entry["token"], -1)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token's text; of several with one text the first."""
        count = self.vocabulary.get_vocab_size()
        texts = self.vocabulary.decode_batch([[token] for token in range(count)], skip_special_tokens=False)
        return {text: token for token, text in reversed(list(enumerate(texts)))}


@dataclass(frozen=True)
class Vllm:
    """vLLM's server, which shows the tokens of a prompt only."""

    port: int | str
    key: str
    name: str
    new: ClassVar[dict[str, Any]] = {}

    def request(self, probe: Probe) -> dict[str, Any]:
        # It takes tools without a parser for their calls only if none is to be called; the prompt is the same.
        told = PROBABILITIES | {"return_tokens_as_token_ids": True}
        return asked(probe) | told | ({"tool_choice": "none"} if probe.tools else {})

    def token(self, entry: dict[str, Any]) -> int:
        return int(entry["token"].removeprefix("token_id:"))

    def prompt_problem(self, probe: Probe) -> str:
        body = asked(probe) | {"model": self.name}
        status, made = ask(self.port, "/tokenize", self.key, body, 60)
        if status != 200:
            return f"chat template: probe '{probe.name}' is refused: {refusal(made)}"
        tokens = list(made["tokens"])
        if tokens != probe.ids and (text := self.text(tokens)) != self.text(probe.ids):
            return other_text(probe, text)
        return other_tokens(probe, tokens)

    def prompt_tokens(self, probe: Probe, switches: dict[str, Any]) -> int:
        body = asked(probe) | {"model": self.name, "chat_template_kwargs": switches}
        status, made = ask(self.port, "/tokenize", self.key, body, 60)
        return len(made["tokens"]) if status == 200 else 0

    def text(self, tokens: list[int]) -> str:
        _, made = ask(self.port, "/detokenize", self.key, {"model": self.name, "tokens": tokens}, 60)
        return str(made.get("prompt", ""))


def asked(probe: Probe) -> dict[str, Any]:
    """The probe as a request of OpenAI's API, which writes the arguments of a tool's call as JSON text."""
    messages = json.loads(json.dumps(probe.messages))
    for call in (call for message in messages for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {"messages": messages} | ({"tools": probe.tools} if probe.tools else {})


def other_number(probe: Probe, found: int, engine: Engine) -> str:
    """Why the chat's prompt has another number of tokens than it is rendered with, as far as the number tells."""
    what = f"token ids: probe '{probe.name}' has {found} when chatting, trained with {len(probe.ids)}"
    for thinking in (True, False):
        if engine.prompt_tokens(probe, {"enable_thinking": thinking}) == found:
            return f"{what}: thinking is switched {'on' if thinking else 'off'} (enable_thinking)"
    if found > len(probe.ids):
        return f"{what}: something is added on the way, as a system prompt or a date"
    return f"{what}: something is taken away or cut on the way"


def other_text(probe: Probe, prompt: str) -> str:
    """Where the rendered text differs."""
    at = first_difference(list(prompt.encode()), list(probe.prompt.encode())) or 0
    found, wanted = prompt.encode()[at : at + 20], probe.prompt.encode()[at : at + 20]
    return f"chat template: probe '{probe.name}', byte {at}: {found!r}, trained with {wanted!r}"


def other_tokens(probe: Probe, tokens: list[int]) -> str:
    """Where the tokens differ, or nothing."""
    at = first_difference(tokens, probe.ids)
    if at is None:
        return ""
    if tokens[1:] == probe.ids:  # also where it stands there twice
        return f"token ids: probe '{probe.name}', position 0: {tokens[:1]} is added before all that it was trained with"
    found, wanted = tokens[at : at + 1], probe.ids[at : at + 1]
    return f"token ids: probe '{probe.name}', position {at}: {found}, trained with {wanted}"


@dataclass(frozen=True)
class Told:
    """One token of an answer: its id, its log-probability (nats), and those of the most likely ones in its place."""

    token: int
    score: float
    top: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """An answer: the status, the text or the refusal, why it ended, its tokens where the server tells them.

    `length` is their number, also of those of which nothing is told; 0 if it is unknown.
    """

    status: int
    text: str
    reason: str = ""
    prompt_tokens: int = 0
    tokens: tuple[Told, ...] = ()
    length: int = 0


def ask_probes(
    comparison: Comparison, engine: Engine, probes: list[Probe], context: int, slots: int
) -> list[tuple[Probe, Answer, Answer]]:
    """Ask all probes that fit the context; of one that does not, the engine must say so instead of cutting it.

    Returns the answers to new prompts and to the same ones again, nothing if a prompt is not as in training.
    """
    fitting = [probe for probe in probes if len(probe.ids) + CONTINUATION_TOKENS <= context]
    comparison.measures |= {"probes": len(fitting), "too_long": len(probes) - len(fitting)}
    if not fitting:
        comparison.problems.append(f"context: none of {len(probes)} probes fits serve.context {context}")
    stopped, shares = 0, []
    cold, cached = [], []
    for probe in probes:
        if problem := engine.prompt_problem(probe):
            comparison.problems.append(problem)
            return []
        found = answer(engine, probe, context, engine.new)
        if len(probe.ids) >= context:
            if found.status == 200 and found.prompt_tokens < len(probe.ids):
                comparison.problems.append(
                    f"context: probe '{probe.name}' has {len(probe.ids)} tokens, more than {context}, "
                    f"and was cut to {found.prompt_tokens} without a word"
                )
                return []
        elif found.status != 200:
            comparison.problems.append(f"probe '{probe.name}' is refused: {found.text}")
            return []
        elif found.prompt_tokens != len(probe.ids):
            comparison.problems.append(other_number(probe, found.prompt_tokens, engine))
            return []
        elif probe in fitting:
            stopped += probe.stopped and found.reason == "stop"
            shares.append(same_share(found.text, expected_text(engine, probe)))
            cold.append(found)
            cached.append(answer(engine, probe, context))
    ending = sum(probe.stopped for probe in fitting)
    if ending and not stopped:
        comparison.problems.append(
            f"stop token: the trained model ends {ending} answers by itself, the served one none"
        )
    if slots > 1:
        with ThreadPoolExecutor(slots) as others:
            beside = list(others.map(lambda probe: answer(engine, probe, context), fitting))
        comparison.measures |= changes("beside", cold, beside)
    comparison.measures |= changes("again", cold, cached)
    comparison.measures |= {
        "greedy_agreement": shares.count(1) / max(len(shares), 1),
        "greedy_share": sum(shares) / max(len(shares), 1),
        "stops": not ending or stopped > 0,
    }
    return list(zip(fitting, cold, cached, strict=True))


def drawn(engine: Engine, probes: list[Probe], context: int, slots: int, seed: int) -> list[Told]:
    """Tokens of answers that are drawn at temperature 1 from the whole vocabulary."""
    with ThreadPoolExecutor(slots) as others:
        seeded = [(probe, WHOLE_VOCABULARY | {"seed": number}) for number, probe in enumerate(probes, seed)]
        answers = list(others.map(lambda each: answer(engine, each[0], context, each[1]), seeded))
    return [token for found in answers for token in found.tokens]


def limit(engine: Engine, probe: Probe, context: int) -> int:
    """After how many tokens an answer is cut that asks for no limit; 0 if it still goes on after LONG_TOKENS.

    Raises:
        OSError, HTTPException, ValueError: (endpoint.ERRORS) nothing answered, or not in JSON.
    """
    most = min(LONG_TOKENS, context - len(probe.ids) - 1)
    body = engine.request(probe) | {"model": engine.name, "temperature": 0, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {engine.key}"}
    connection, before = connected(engine.port, timeout=600)
    try:
        connection.request("POST", f"{before}/v1/chat/completions", json.dumps(body), headers)
        count = 0
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line.removeprefix(b"data: ")).get("choices", ()):
                if choice.get("finish_reason") == "length":
                    return count
                delta = choice["delta"]
                count += bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))
            if count > most:
                break
        return 0
    finally:
        connection.close()


def changes(how: str, answers: list[Answer], again: list[Answer]) -> dict[str, float]:
    """`changed_<how>`, the answers whose text is another, and `moved_<how>`, the most that a log-probability moves.

    The log-probabilities (nats) of an answer whose text is another are those of other tokens, and are not compared.
    """
    pairs = list(zip(answers, again, strict=True))
    alike = [(one, other) for one, other in pairs if (one.status, one.text) == (other.status, other.text)]
    moves = [
        abs(mine.score - its.score) for one, other in alike for mine, its in zip(one.tokens, other.tokens, strict=False)
    ]
    return {f"changed_{how}": len(pairs) - len(alike), f"moved_{how}": max(moves, default=0.0)}


def answer(engine: Engine, probe: Probe, context: int, more: dict[str, Any] | None = None) -> Answer:
    """The greedy answer, asked as any client asks, with `more` in the request."""
    room = max(1, min(CONTINUATION_TOKENS, context - len(probe.ids)))
    wanted = {"temperature": 0, "max_tokens": room}
    body = engine.request(probe) | {"model": engine.name} | wanted | (more or {})
    status, made = ask(engine.port, "/v1/chat/completions", engine.key, body, timeout=600)
    if status != 200:
        return Answer(status, refusal(made))
    choice = made["choices"][0]
    message, usage = choice["message"], made["usage"]
    text = (message.get("reasoning_content") or message.get("reasoning") or "") + (message.get("content") or "")
    tokens = tuple(told(engine, entry) for entry in (choice.get("logprobs") or {}).get("content") or [])
    return Answer(status, text, choice["finish_reason"], usage["prompt_tokens"], tokens, usage["completion_tokens"])


def told(engine: Engine, entry: dict[str, Any]) -> Told:
    """From what OpenAI's API says of a token; of a place where two tokens have one text, nothing can be known."""
    top = {engine.token(other): float(other["logprob"]) for other in entry["top_logprobs"]}
    return Told(engine.token(entry), float(entry["logprob"]), top if len(top) == len(entry["top_logprobs"]) else {})


def refusal(made: dict[str, Any]) -> str:
    """What the server says is wrong."""
    error = made.get("error", made)
    return str(error.get("message", error) if isinstance(error, dict) else error).splitlines()[0]


def expected_text(engine: Engine, probe: Probe) -> str:
    """The reference's answer as text, without the token that ends the turn."""
    return engine.text(probe.continuation[:-1] if probe.stopped else probe.continuation)
