"""The records of a file as (line or number, record), a piece of it in memory at a time: JSON, tables and plain text.

JSON is of any size and shape: an array's items; objects that follow each other, written on one line or on many; lists
of turns; and the one list of objects in an object, which alone is read whole. Tables are separated values with their
lines, and Parquet and Arrow files a batch at a time.
"""

import csv
import functools
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline import UserError
from pipeline.rows import BYTES_A_BATCH, ROWS_A_BATCH
from pipeline.rows import pieces as slices
from train.reading.row import KNOWN, MEDIA, Problem

CHARACTERS = 1 << 20
TURN_KEYS = (
    ("role", "content"), ("role", "tool_calls"), ("role", "parts"), ("from", "value"), ("sender", "text"),
    ("speaker", "utterance"),
)  # fmt: skip
TALKS = ("messages", "conversations", "conversation", "dialogue", "dialog")
LONGEST_TOKEN = 16  # how near the end of what is read a fault may be only for want of the rest, as in "-Infini"
DELIMITERS = ",\t;|"
LONGEST_CELL = 1 << 26
PIECE_CHARACTERS = 1 << 16  # of a text, cut between paragraphs
READ_BYTES = 1 << 20
TOOLS = ("tools", "functions")
csv.field_size_limit(LONGEST_CELL)

log = logging.getLogger("truetune")


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


def names_columns(line: str) -> bool:
    """Whether it can only be the first line of a table."""
    return len(KNOWN.intersection(map(str.lower, _header(line)[1]))) > 1


def table(file: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line, {column: cell}) of a table's rows; an empty cell is None, a first column without a name pandas' index."""
    header = file.readline()
    delimiter, columns = _header(header)
    if len(set(columns)) < len(columns) or "" in columns[1:] or columns == [""]:
        raise UserError(f"{name}:1: the first line of a table names its columns, each once: {header.strip()[:80]}")
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 2
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{name}:{line}: not a table's row ({error}): close the quotes, double those inside"
            ) from None
        if cells is None:
            return
        if [cell.strip() for cell in cells] == columns:
            yield (
                line,
                Problem(f"{name}:{line}", "repeats the first line, as where tables were put together: remove it"),
            )
        elif len(cells) == len(columns):
            yield line, {column: cell or None for column, cell in zip(columns, cells, strict=True) if column}
        elif cells:
            told = (
                f"{len(cells)} cells where the first line names {len(columns)}: quote cells that contain {delimiter!r}"
            )
            yield line, Problem(f"{name}:{line}", told)


def pieces(file: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line, {"text": ...}) of a text file; a long one is cut, between paragraphs where these are not long too."""
    piece, line, at = "", 1, 1
    while text := file.readline(PIECE_CHARACTERS):
        full = len(piece) + len(text) > PIECE_CHARACTERS
        if full and (piece.endswith("\n\n") or len(piece) >= PIECE_CHARACTERS):
            yield line, {"text": piece.strip("\n")}
            piece, line = "", at
        piece += text.replace("\r\n", "\n")
        at += text.endswith("\n")
    if piece.strip():
        yield line, {"text": piece.strip("\n")}


def _header(line: str) -> tuple[str, list[str]]:
    """(delimiter, names of the columns) of a table's first line."""
    delimiter = max(DELIMITERS, key=line.count)
    cells = next(csv.reader([line.strip("\r\n\ufeff").partition("\r")[0]], delimiter=delimiter), [])
    return delimiter, [cell.strip() for cell in cells]


def batches(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the first row, record batch) of a Parquet file, or of an Arrow file or stream.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.OSFile(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PAR1"):
                whole = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES)
                found = whole.iter_batches(_rows_that_fit(whole))
            elif magic == b"ARROW1":
                reader = pyarrow.ipc.open_file(file)
                found = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                found = iter(pyarrow.ipc.open_stream(file))
            yield from small(map(_whole, found), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path}: the Parquet or Arrow file is damaged or cut off ({reason}): get it again") from None


def small(found: Iterable[Any], name: str) -> Iterator[tuple[int, Any]]:
    """The batches cut to what can be held in memory, each with the number of its first row.

    Raises:
        UserError: a column that would be learned holds bytes that are no text.
    """
    row, unread = 1, set[str]()
    for batch in (_as_text(_without_media(batch), name, unread) for batch in found):
        for piece in slices(batch):
            if piece.num_rows < batch.num_rows:  # sent to a worker, a slice takes the whole batch along
                piece = piece.take(list(range(piece.num_rows)))
            yield row, piece
            row += piece.num_rows


def without_nulls_of_tools(record: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every object the keys of all others, as null: in a tool's schema and arguments they never stood."""
    cleaned = dict(record)
    for name, value in record.items():
        if name in TOOLS:
            cleaned[name] = _without_nulls(value)
        elif isinstance(value, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in value):
            cleaned[name] = [turn | {"tool_calls": _without_nulls(turn.get("tool_calls"))} for turn in value]
    return cleaned


def _whole(batch: Any) -> Any:
    """The batch, if its lengths and texts hold; Arrow follows a damaged length out of memory otherwise."""
    batch.validate(full=True)
    return batch


def _rows_that_fit(whole: Any) -> int:
    """Rows of a Parquet file to be read at a time, by the file's own count of its bytes before compression."""
    groups = [whole.metadata.row_group(index) for index in range(whole.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return int(min(ROWS_A_BATCH, max(1, BYTES_A_BATCH // max(1, largest))))


def _as_text(batch: Any, name: str, unread: set[str]) -> Any:
    """The batch with bytes that are UTF-8 as text, as databases export it, and without columns of other bytes."""
    import pyarrow

    for column in [column for column in batch.schema if "binary" in str(column.type)]:
        place = batch.schema.get_field_index(column.name)
        try:
            if column.name in unread:
                raise pyarrow.ArrowInvalid
            values = batch.column(place).cast(_text_type(column.type))
            values.validate(full=True)  # a cast of bytes inside of lists does not look at them
            batch = batch.set_column(place, column.name, values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
            if column.name.strip().lower() in KNOWN:
                raise UserError(
                    f"{name}: the column {column.name!r} holds bytes that are not UTF-8 text: save it as text, or "
                    "rename it if it is not to be read"
                ) from None
            unread.add(column.name)
            _tell_unread(name, column.name)
            batch = batch.remove_column(place)
    return batch


@functools.cache
def _tell_unread(name: str, column: str) -> None:
    log.warning("data: %s: the column %r holds bytes that are no text: not read", name, column)


def _text_type(given: Any) -> Any:
    """The type with text in place of bytes, at any depth."""
    import pyarrow

    if pyarrow.types.is_struct(given):
        return pyarrow.struct([field.with_type(_text_type(field.type)) for field in given])
    if pyarrow.types.is_list(given) or pyarrow.types.is_large_list(given) or pyarrow.types.is_fixed_size_list(given):
        return pyarrow.large_list(_text_type(given.value_type))
    return pyarrow.large_string() if "binary" in str(given) else given


def _without_media(batch: Any) -> Any:
    """The batch with only whether a row has them in place of pictures, films and sounds."""
    import pyarrow.compute

    for place, column in enumerate(batch.schema):
        if column.name in MEDIA and "binary" in str(column.type):
            values = batch.column(place)
            is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
            there = (
                pyarrow.compute.greater(pyarrow.compute.list_value_length(values), 0) if is_list else values.is_valid()
            )
            batch = batch.set_column(place, column.name, there)
    return batch


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
