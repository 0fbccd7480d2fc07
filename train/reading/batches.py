"""Parquet and Arrow files a batch of rows at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipe import UserError

ROWS_A_BATCH = 1000
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
                whole = pyarrow.parquet.ParquetFile(file)
                found = whole.iter_batches(ROWS_A_BATCH, columns=_without_pictures(whole.schema_arrow))
            elif magic == b"ARROW1":
                reader = pyarrow.ipc.open_file(file)
                found = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                found = iter(pyarrow.ipc.open_stream(file))
            yield from small(found)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path}: the Parquet or Arrow file is damaged or cut off ({reason}): get it again") from None


def small(found: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches cut to ROWS_A_BATCH rows, each with the number of its first row."""
    row = 1
    for batch in found:
        for at in range(0, batch.num_rows, ROWS_A_BATCH):
            piece = batch.slice(at, ROWS_A_BATCH)
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


def _without_pictures(schema: Any) -> list[str]:
    """Columns of text, numbers and lists: pictures and sound are not learned."""
    return [column.name for column in schema if "binary" not in str(column.type)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
