"""Tables as records: separated values and plain texts with their lines, Parquet and Arrow files a batch at a time."""

import csv
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline import UserError
from pipeline.rows import BYTES_A_BATCH, ROWS_A_BATCH
from pipeline.rows import pieces as slices
from train.reading.row import KNOWN, MEDIA, Problem

DELIMITERS = ",\t;|"
LONGEST_CELL = 1 << 26
PIECE_CHARACTERS = 1 << 16  # of a text, cut between paragraphs
csv.field_size_limit(LONGEST_CELL)


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


log = logging.getLogger("truetune")
READ_BYTES = 1 << 20
TOOLS = ("tools", "functions")


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
