"""How long a conversation a GGUF can have: the context that it was trained with, and the bytes of its longest token."""

from pathlib import Path

from pipeline.error import UserError
from pipeline.gguf_head import read_head

WORDS = "tokenizer.ggml.tokens"
SPACE = "\u2581".encode()  # how sentencepiece writes one


def trained_context(path: Path) -> int | None:
    """`<architecture>.context_length` of a GGUF; None when it does not say.

    Raises:
        UserError: the file is no GGUF, or ends within its metadata.
    """
    key = ".context_length"
    values = read_head(path, until=key).values
    return next((value for name, value in values.items() if name.endswith(key) and isinstance(value, int)), None)


def longest_token(path: Path) -> int:
    """The most bytes of text that one of its tokens stands for; byte-level BPE's are counted twice at most.

    Raises:
        UserError: the file is no GGUF, ends within its metadata, or has no vocabulary.
    """
    words = read_head(path, until=WORDS).values.get(WORDS)
    if not isinstance(words, list) or not all(isinstance(word, bytes) for word in words):
        raise UserError(f"{path} has no vocabulary: make it again with 'make gguf'")
    return max((len(word.replace(SPACE, b" ")) for word in words), default=0)
