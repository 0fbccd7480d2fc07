"""The words of a GGUF, without its weights: chat template, special tokens, and tokens as llama.cpp writes them."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.gguf_head import read_head

_quiet: list[Any] = []  # a callback that Python freed while llama.cpp holds it would crash


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
