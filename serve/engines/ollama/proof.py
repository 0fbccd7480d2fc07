"""What Ollama makes of the reference's probes: the rendered prompt's bytes, the tokens' number, the greedy answers."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.error import UserError
from pipeline.gguf_head import read_head
from pipeline.proof import Comparison, same_share
from pipeline.reference import CONTINUATION_TOKENS, Probe
from serve.asking.judgement import Own, judge, plain, spoken
from serve.asking.probe import Answer, other_text
from serve.engines.ollama.server import OllamaServer

_quiet: list[Any] = []  # a callback that Python freed while llama.cpp holds it would crash


class Words(Protocol):
    """The text of tokens, and whether `bos` may stand before every prompt without the server's showing it."""

    @property
    def bos(self) -> str: ...

    @property
    def adds_bos(self) -> bool: ...

    def text(self, tokens: list[int]) -> str: ...


def prove_prompts(
    comparison: Comparison, server: OllamaServer, name: str, vocabulary: Words, probes: list[Probe]
) -> None:
    """Whether the server renders every probe's messages as training did, byte by byte.

    Ollama writes the definitions of tools anew, with their keys in another order: the measure `tools` tells what comes
    of it, which is no fault of the model.
    """
    for probe in probes:
        try:
            rendered = server.rendered(name, probe.messages, probe.tools)
        except UserError as error:
            if not probe.tools:
                raise
            comparison.measures["tools"] = str(error)
            continue
        # llama.cpp writes the BOS itself where the file says so; the tokens are counted with the answers.
        if probe.prompt in (rendered, vocabulary.bos + rendered if vocabulary.adds_bos else rendered):
            continue
        if not probe.tools:
            comparison.problems.append(other_text(probe, rendered))
            return
        comparison.measures["tools"] = other_text(probe, rendered)


def prove_answers(
    comparison: Comparison,
    server: OllamaServer,
    name: str,
    vocabulary: Words,
    probes: list[Probe],
    own: Own,
    context: int,
    tell: Callable[[int], None],
) -> None:
    """Ask all probes that fit the context: each prompt's number of tokens, the answer, and that it stops.

    The answers must be those of the GGUF itself, read directly: Ollama tells no probabilities.
    """
    probes = [probe for probe in probes if not probe.tools]
    fitting = [probe for probe in probes if len(probe.ids) + CONTINUATION_TOKENS <= context]
    comparison.measures |= {"probes": len(fitting), "too_long": len(probes) - len(fitting)}
    if not fitting:
        comparison.problems.append(f"context: none of {len(probes)} probes fits serve.context {context}")
        return
    stopped, shares, found = 0, [], []
    for number, probe in enumerate(fitting):
        text, reason, tokens = server.answer(name, probe.messages)
        served = again = Answer(200, text, reason, tokens)
        if plain(text) != spoken(own.answers[probe.name], vocabulary.text):
            again = Answer(200, *server.answer(name, probe.messages))
        found.append((probe, served, again))
        if tokens != len(probe.ids):
            comparison.problems.append(
                f"token ids: probe '{probe.name}' has {tokens} when chatting, trained with {len(probe.ids)}"
            )
            return
        stopped += probe.stopped and reason == "stop"
        wanted = vocabulary.text(probe.continuation[:-1] if probe.stopped else probe.continuation)
        shares.append(same_share(plain(text), plain(wanted)))
        tell(number + 1)
    ending = sum(probe.stopped for probe in fitting)
    comparison.measures |= {
        "greedy_agreement": shares.count(1) / len(shares),
        "greedy_share": sum(shares) / len(shares),
        "stops": not ending or stopped > 0,
    }
    if ending and not stopped:
        comparison.problems.append(f"stop token: the trained model ends {ending} answers by itself, Ollama's none")
    else:
        judge(comparison, found, own, vocabulary.text)


def replaced_template(statuses: list[str]) -> str:
    """Which of its own templates the server took instead of the file's, by what it reported when it made the model."""
    return next((line.rpartition(" ")[2] for line in statuses if line.startswith("using autodetected template")), "")


def refused(tag: str, problem: str, statuses: list[str], version: str, compiled: bool) -> UserError:
    """The line of a failed proof: what fixes it depends on who rendered."""
    own = replaced_template(statuses)
    if compiled or not problem.startswith("chat template"):
        fix = "update Ollama, or serve with ENGINE=llamacpp"
    elif own:
        fix = f"it took its own template {own!r} instead of the model's: start Ollama with OLLAMA_GO_TEMPLATE=0"
    else:
        fix = f"Ollama {version} does not render the model's own template: use 0.30 or newer, with OLLAMA_GO_TEMPLATE=0"
    return UserError(f"{tag} is not the model that was trained and was removed again: {problem}: {fix}")


@dataclass(frozen=True)
class Vocabulary:
    """`adds_bos`: whether llama.cpp writes `bos` before every prompt by itself; `licence` as the header names it."""

    template: str
    bos: str
    eos: str
    adds_bos: bool
    licence: str | None
    model: Any

    def text(self, tokens: list[int]) -> str:
        """The tokens as a server writes an answer: those that steer, such as the end of a turn, have no text."""
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        import llama_cpp

        buffer = ctypes.create_string_buffer(64)
        size = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, 64, 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, -size, 0, False)
        return bytes(buffer.raw[:size])


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        UserError: llama.cpp cannot read the file, or it has no chat template.
    """
    import llama_cpp
    from llama_cpp._internals import LlamaModel

    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(_quiet[0], None)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    try:
        model = LlamaModel(path_model=str(path), params=parameters)
    except ValueError:
        raise UserError(f"llama.cpp cannot read {path}: delete it and run 'make gguf' again") from None
    facts = read_head(path).values
    template = facts.get("tokenizer.chat_template")
    if not template:
        raise UserError(f"{path} has no chat template: name one in the recipe's key 'chat_template'")
    bos, eos = (llama_cpp.llama_vocab_bos(model.vocab), llama_cpp.llama_vocab_eos(model.vocab))
    return Vocabulary(
        template=str(template),
        bos=_text(model.vocab, bos),
        eos=_text(model.vocab, eos),
        adds_bos=bool(llama_cpp.llama_vocab_get_add_bos(model.vocab)),
        licence=facts.get("general.license"),
        model=model,
    )


def _text(vocabulary: Any, token: int) -> str:
    import llama_cpp

    return "" if token < 0 else llama_cpp.llama_vocab_get_text(vocabulary, token).decode("utf-8", "replace")
