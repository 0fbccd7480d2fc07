"""What a GGUF says of its model, read from its head in milliseconds: the trained context, and the longest token."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from recipe.error import UserError

# GGUF's value types that have a fixed size (ggml/docs/gguf.md); 8 is a string, 9 an array.
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
SPACE = "\u2581"  # how sentencepiece writes one


def trained_context(path: Path) -> int | None:
    """`<architecture>.context_length` of a GGUF; None when it does not say.

    Raises:
        UserError: the file is no GGUF, or ends within its metadata.
    """
    return _find(path, b".context_length", lambda file, kind: int(_take(file, FORMATS[kind])[0]))


def longest_token(path: Path) -> int:
    """The most bytes of text that one of its tokens stands for; byte-level BPE's are counted twice at most.

    Raises:
        UserError: the file is no GGUF, ends within its metadata, or has no vocabulary.
    """
    longest = _find(path, b"tokenizer.ggml.tokens", _longest)
    if longest is None:
        raise UserError(f"{path} has no vocabulary: make it again with 'make gguf'")
    return longest


def _longest(file: BinaryIO, _kind: int) -> int:
    _, count = _take(file, "<IQ")
    return max(len(_string(file).replace(SPACE.encode(), b" ")) for _ in range(count))


def _find(path: Path, end: bytes, read: Callable[[BinaryIO, int], int]) -> int | None:
    """What `read` makes of the first value whose key ends so, from the file and the value's type."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with 'GGUF'")
            _version, _tensors, keys = _take(file, "<IQQ")
            for _ in range(keys):
                key = _string(file)
                (kind,) = _take(file, "<I")
                if key.endswith(end):
                    return read(file, kind)
                _skip(file, kind)
    except (struct.error, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): make it again with 'make gguf'") from None
    return None


def _take(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> bytes:
    return file.read(_take(file, "<Q")[0])


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == STRING:
        file.seek(_take(file, "<Q")[0], 1)
    elif kind == ARRAY:
        of, count = _take(file, "<IQ")
        if of in FORMATS:
            file.seek(struct.calcsize(FORMATS[of]) * count, 1)
        else:
            for _ in range(count):
                _skip(file, of)
    else:
        file.seek(struct.calcsize(FORMATS[kind]), 1)
