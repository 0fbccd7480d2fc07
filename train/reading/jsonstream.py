"""JSON of any size and any shape as (line, record), a piece of the file in memory at a time.

An array's items; objects that follow each other, written on one line or on many; lists of turns; and the one list of
objects in an object, which alone is read whole.
"""

import io
import json
from collections.abc import Iterator
from typing import IO, Any

from pipeline import UserError
from train.reading.row import KNOWN

CHARACTERS = 1 << 20
TURN_KEYS = (
    ("role", "content"), ("role", "tool_calls"), ("role", "parts"), ("from", "value"), ("sender", "text"),
    ("speaker", "utterance"),
)  # fmt: skip
TALKS = ("messages", "conversations", "conversation", "dialogue", "dialog")
LONGEST_TOKEN = 16  # how near the end of what is read a fault may be only for want of the rest, as in "-Infini"


class TwiceError(ValueError):
    """A key that stands twice in an object, so that one of its values would be lost."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of its pairs, for `object_pairs_hook`."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TwiceError(f"the key {twice!r} stands twice in one object: keep one")
    return made


# Control characters in a text are for cleaning to judge. NaN and Infinity, which JSON has not, count as nothing.
DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=lambda _: None, strict=False)


def values(file: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line, record) of each record in the file.

    Raises:
        UserError: where it is not JSON, with file and line.
    """
    scanner = _Scanner(file, name)
    first = True
    while opening := scanner.peek():
        if opening == "[":
            yield from _array(scanner)
        else:
            line, start = scanner.line, scanner.at
            record = scanner.value()
            key = _only_list(record) if first else None
            text = scanner.buffer[start - scanner.dropped : scanner.at - scanner.dropped] if key else ""
            yield from _inner(text, line, name, key) if key and not scanner.peek() else [(line, record)]
        first = False


def _array(scanner: "_Scanner") -> Iterator[tuple[int, Any]]:
    """The items of an array, or the array itself if it is one conversation."""
    line = scanner.line
    scanner.expect("[")
    turns: list[Any] = []
    while scanner.peek() != "]":
        here = scanner.line
        item = scanner.value()
        if turns or _is_turn(item):
            turns.append(item)
        else:
            yield here, item
        if scanner.peek() != "]":
            scanner.expect(",")
    scanner.expect("]")
    if turns:
        yield line, turns


def _only_list(record: Any) -> str | None:
    """The key of the one list of objects, if these are records and not a part of one."""
    lists = [key for key, value in record.items() if _has_objects(value)] if isinstance(record, dict) else []
    if len(lists) != 1 or _is_turn(record[lists[0]][0]) or KNOWN & record.keys() - set(lists):
        return None
    exchange = lists[0] in TALKS and all(isinstance(said, str | None) for said in record[lists[0]][0].values())
    return None if exchange else lists[0]


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and any(who in item and what in item for who, what in TURN_KEYS)


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _inner(text: str, line: int, name: str, wanted: str) -> Iterator[tuple[int, Any]]:
    """The items of that list, read again for their lines."""
    scanner = _Scanner(io.StringIO(text), name, line)
    scanner.expect("{")
    while True:
        scanner.peek()
        key = scanner.value()
        scanner.expect(":")
        scanner.peek()
        if key == wanted:
            yield from _array(scanner)
            return
        scanner.value()
        scanner.expect(",")


class _Scanner:
    """Reads JSON values one by one from a text; `at` counts characters from the start, `line` lines from 1."""

    def __init__(self, file: IO[str], name: str, line: int = 1) -> None:
        self.file, self.name, self.line = file, name, line
        self.buffer, self.at, self.dropped, self.ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            start = at = self.at - self.dropped
            while at < len(self.buffer) and self.buffer[at] in " \t\r\n":
                at += 1
            self.line += self.buffer.count("\n", start, at)
            self.at = at + self.dropped
            if at < len(self.buffer):
                return self.buffer[at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Step over that character."""
        found = self.peek()
        if found != character:
            raise self._error(f"{character!r} is missing here" if found else "", self.line)
        self.at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            start = self.at - self.dropped
            try:
                value, end = DECODER.raw_decode(self.buffer, start)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - LONGEST_TOKEN
                if unfinished and not self.ended:
                    self._more()
                    continue
                cut_off = self.ended and (
                    error.msg.startswith("Unterminated") or error.pos >= len(self.buffer.rstrip())
                )
                line = self.line + self.buffer.count("\n", start, error.pos)
                raise self._error("" if cut_off else error.msg, line) from None
            except RecursionError:
                raise UserError(f"{self.name}:{self.line}: nested too deeply") from None
            except ValueError as error:
                raise UserError(f"{self.name}:{self.line}: {str(error).partition(';')[0]}") from None
            if end == len(self.buffer) and self.buffer[end - 1] not in '}]"' and self._more():
                continue  # a number may go on
            self.line += self.buffer.count("\n", start, end)
            self.at = end + self.dropped
            return value

    def _more(self) -> bool:
        """Read as much again as is not yet used, at least a piece; what is used is dropped."""
        if self.ended:
            return False
        rest = self.buffer[self.at - self.dropped :]
        piece = self.file.read(max(CHARACTERS, len(rest)))
        self.buffer, self.dropped, self.ended = rest + piece, self.at, not piece
        return bool(piece)

    def _error(self, message: str, line: int) -> UserError:
        if not message:
            return UserError(f"{self.name}:{line}: the file ends before its JSON does: it was cut off, get it again")
        return UserError(f"{self.name}:{line}: not JSON ({message}): fix it, or write one JSON object a line")
