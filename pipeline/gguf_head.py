"""What a GGUF file says of itself, read without its weights: the values by key, and the tensors by name.

gguf's own reader takes seconds, as it makes an array of each word of the vocabulary. A file from elsewhere may be cut
or made to harm: no length in it is believed beyond the file's end. The format: ggml/docs/gguf.md.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.error import UserError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, STRING, ARRAY, U64 = 4, 8, 9, 10
LEAST_BYTES = {"key-value pairs": 13, "tensors": 24}  # of one: an empty name and the smallest value, or no length
MOST = 1_000_000  # of either; the largest models have hundreds of pairs and tens of thousands of tensors
MOST_HEAD_BYTES = 1 << 28  # the largest vocabularies take a twentieth


@dataclass(frozen=True)
class Head:
    """`values` are numbers, texts, lists of numbers, and lists of bytes, as a vocabulary's words.

    `tensors` have by name the lengths of their dimensions and the number of their ggml type.
    """

    values: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]


def read_head(path: Path, until: str | None = None) -> Head:
    """The head of a GGUF file; only as far as the first key that ends with `until`, if that is given.

    Raises:
        UserError: the file cannot be read, is no GGUF, or ends within its head.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _head(_Cursor(content), until)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): fetch it or make it again") from None


class _Cursor:
    """Takes one value after the other from a file's content."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            raise ValueError(f"it ends within the {size} bytes from byte {self.at} on")
        if self.at + size > MOST_HEAD_BYTES:
            raise ValueError(f"its head goes on after {MOST_HEAD_BYTES:,} bytes")
        self.at += size
        return self.content[self.at - size : self.at]

    def numbers(self, kind: int, count: int = 1) -> tuple[Any, ...]:
        if kind not in NUMBERS:
            raise ValueError(f"{kind} is not the type of a value")
        size = count * struct.calcsize(f"<{NUMBERS[kind]}")
        return struct.unpack(f"<{count}{NUMBERS[kind]}", self.take(size))

    def text(self) -> bytes:
        return self.take(self.numbers(U64)[0])

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text().decode()
        if kind != ARRAY:
            return self.numbers(kind)[0]
        of, count = *self.numbers(U32), *self.numbers(U64)
        return [self.text() for _ in range(count)] if of == STRING else list(self.numbers(of, count))


def _head(cursor: _Cursor, until: str | None) -> Head:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    (version,), (tensors, keys) = cursor.numbers(U32), cursor.numbers(U64, 2)
    if version < 2:
        raise ValueError(f"version {version} is outdated")
    for count, (what, least) in zip((keys, tensors), LEAST_BYTES.items(), strict=True):
        if count > min(MOST, len(cursor.content) // least):
            raise ValueError(f"it announces {count:,} {what}, which its size cannot hold")
    head = Head({}, {})
    for _ in range(keys):
        key = cursor.text().decode()
        head.values[key] = cursor.value(*cursor.numbers(U32))
        if until and key.endswith(until):
            return head
    for _ in range(tensors):
        name, dimensions = cursor.text().decode(), cursor.numbers(U32)[0]
        head.tensors[name] = cursor.numbers(U64, dimensions), cursor.numbers(U32)[0]
        cursor.take(8)  # where it lies
    return head
