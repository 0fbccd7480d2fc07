"""A file of any kind, packed or not, as a stream of chunks, cheap to send to a worker: never the whole file in memory.

What a file is, its content decides; the name's ending only tells a table from a text.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline import UserError
from pipeline.files import JSONS, TEXTS
from train.reading.records import (
    DECODER,
    DELIMITERS,
    batches,
    names_columns,
    pieces,
    table,
    values,
    without_nulls_of_tools,
)
from train.reading.row import Problem

BYTES_A_CHUNK, CHARACTERS_A_CHUNK, ROWS_A_CHUNK = 1 << 20, 1 << 20, 1000
LONGEST_LINE_BYTES = 1 << 26
START_BYTES = 1 << 16
COLUMNAR = (".parquet", ".arrow", ".feather")
NOT_UTF8 = "not UTF-8 at byte {}: save the file as UTF-8"
NO_DATA = {
    b"pk\x03\x04": "is a ZIP archive or a spreadsheet: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "is a document of an Office program: save it as CSV, or as text",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"rar!": "is a RAR archive: unpack it",
    b"%pdf-": "is a PDF: save its text as .txt",
    b"sqlite format 3": "is an SQLite database: export the table as CSV",
    b"version https://git-lfs": "is only Git LFS's note of the file: get the file itself with 'git lfs pull'",
    b"<!doctype": "is a web page: download the file itself",
    b"<html": "is a web page: download the file itself",
}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
FAULTS = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what unpacking raises
PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records of a source that follow each other.

    `content` is lines of JSON, the first of number `first`; or an Arrow batch, likewise; or a list of (number of line
    or row, record or Problem).
    """

    source: str
    first: int
    content: Any


def records(chunk: Chunk) -> Iterator[tuple[str, Any]]:
    """(place, record) of each, or (place, Problem) of one that is broken."""
    if isinstance(chunk.content, bytes):
        for number, line in enumerate(chunk.content.split(b"\n"), chunk.first):
            if line and not line.isspace():
                place = f"{chunk.source}:{number}"
                yield place, _parsed(line, place)
    elif isinstance(chunk.content, list):
        for number, record in chunk.content:
            yield f"{chunk.source}:{number}", record
    else:
        for number, record in enumerate(chunk.content.to_pylist(), chunk.first):
            yield f"{chunk.source}:{number}", without_nulls_of_tools(record)


def file_chunks(path: Path) -> Iterator[Chunk]:
    """The chunks of a file.

    Raises:
        UserError: the file cannot be read, or not further than where it is damaged, with file and line.
    """
    reached = Chunk(str(path), 0, None)
    try:
        for reached in _chunks(path):
            yield reached
    except FileNotFoundError:
        what = "is a link to a file that is missing" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: {what}: correct the path in the recipe's `data` section") from None
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct the path or the permissions") from None
    except UnicodeDecodeError:
        raise UserError(_not_utf8(path)) from None
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        where = f"{path}:{_line_after(reached)}" if reached.content else str(path)
        raise UserError(f"{where}: its compressed data is damaged or cut off ({error}): get the file again") from None


def _chunks(path: Path) -> Iterator[Chunk]:
    name = str(path)
    with opened(path) as file:
        start = file.read(START_BYTES)
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        for first, batch in batches(path):
            yield Chunk(name, first, batch)
        return
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}:1: UTF-16, not UTF-8: save the file as UTF-8")
    for mark, what in NO_DATA.items():
        if start.lstrip().lower().startswith(mark):
            raise UserError(f"{name}: {what}")
    if start[257:262] == b"ustar":
        raise UserError(f"{name}: is a tar archive: unpack it")
    if b"\0" in start:
        line = start[: start.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{name}:{line}: has a zero byte: the file is damaged, or no text and no Parquet or Arrow file")
    if not start.removeprefix(b"\xef\xbb\xbf").strip() and len(start) < START_BYTES:
        raise UserError(f"{name}: is empty: write one conversation a line")
    kind = _kind(path, start)
    if kind == "table" and path.suffix.lower() in COLUMNAR:
        raise UserError(f"{name}: is text, no Parquet or Arrow file: save it as one, or name it by what it is, as .csv")
    with opened(path) as file:
        if kind == "lines":
            yield from _lines(file, name)
            return
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        found = {"json": values, "table": table, "text": pieces}[kind](text, name)
        yield from _grouped(found, name)


def _line_after(chunk: Chunk) -> int:
    """The line that follows a chunk."""
    lines = chunk.content.count(b"\n") if isinstance(chunk.content, bytes) else chunk.content[-1][0] - chunk.first + 1
    return int(chunk.first + lines)


def _not_utf8(path: Path) -> str:
    """The problem of a file that does not decode, with its first such line."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}:{number}: {NOT_UTF8.format(error.start + 1)}"
    return f"{path}: {NOT_UTF8.format('?')}"


def _kind(path: Path, start: bytes) -> str:
    """`lines` of JSON, `json` of any other shape, `table` or `text`."""
    endings = [ending.lower() for ending in path.suffixes]
    whole = len(start) < START_BYTES
    lines = [line for line in start.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    complete = lines if whole else lines[:-1]
    is_json = any(isinstance(_parsed(line, ""), dict) for line in complete[:3])
    opening = lines[0].lstrip()[:1] if lines else b""
    if is_json and opening != b"[":
        return "json" if whole and len(lines) == 1 else "lines"
    if any(ending in TEXTS for ending in endings):
        return "table" if lines and names_columns(lines[0].decode(errors="replace")) else "text"
    if opening in (b"{", b"["):
        one_line = opening == b"{" and not complete
        broken = opening == b"{" and complete and complete[0].rstrip()[-1:] not in b"{[,:" and len(complete) > 1
        return "lines" if broken or (one_line and ".json" not in endings) else "json"
    if any(ending in JSONS for ending in endings):
        looks_like_a_table = any(mark in lines[0].decode(errors="replace") for mark in DELIMITERS)
        return "table" if looks_like_a_table and b"{" not in start else "lines"
    return "table"


def _lines(file: IO[bytes], name: str) -> Iterator[Chunk]:
    first = 1
    while block := file.read(BYTES_A_CHUNK):
        if not block.endswith(b"\n"):
            block += (rest := file.readline(LONGEST_LINE_BYTES))
            if len(rest) == LONGEST_LINE_BYTES:
                line = first + block.count(b"\n")
                raise UserError(f"{name}:{line}: longer than {LONGEST_LINE_BYTES >> 20} MiB: write one row a line")
        yield Chunk(name, first, block)
        first += block.count(b"\n")


def _grouped(found: Iterable[tuple[int, Any]], name: str) -> Iterator[Chunk]:
    """Records in chunks; those before a fault are handed on before it is raised."""
    found = iter(found)
    fault: Exception | None = None
    while fault is None:
        group: list[tuple[int, Any]] = []
        length = 0
        try:
            while len(group) < ROWS_A_CHUNK and length < CHARACTERS_A_CHUNK and (record := next(found, None)):
                group.append(record)
                length += _characters(record[1])
        except (UserError, UnicodeDecodeError, *FAULTS) as error:
            fault = error
        if not group and fault is None:
            return
        if group:
            yield Chunk(name, group[0][0], group)
    raise fault


def _characters(record: Any) -> int:
    waiting, length = [record], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            length += len(value)
    return length


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode("utf-8-sig").strip()
        record, end = DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return record
    except UnicodeDecodeError as error:
        return Problem(place, NOT_UTF8.format(error.start + 1))
    except json.JSONDecodeError as error:
        if b"\0" in line:
            return Problem(place, f"has a zero byte at {line.index(0) + 1}: the file is damaged here, get it again")
        return Problem(place, f"not JSON at column {error.colno} ({error.msg}): write one JSON object a line")
    except RecursionError:
        return Problem(place, "nested too deeply: a row is an object of a few levels")
    except ValueError as error:
        return Problem(place, str(error).partition(";")[0])


def opened(path: Path) -> Any:
    """The file's bytes as a binary file, of which reading raises one of FAULTS where they are damaged or cut off."""
    with path.open("rb") as file:
        magic = file.read(6)
    packing = next((name for mark, name in MAGIC.items() if magic.startswith(mark)), None)
    if packing == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if packing == "gzip":
        return gzip.open(path, "rb")
    if packing:
        return io.BufferedReader(Streams(path.open("rb"), bz2.BZ2Decompressor if packing == "bzip2" else xz_stream))
    return path.open("rb")


class Streams(io.RawIOBase):
    """Packed streams one after another, as parallel packers write them.

    Python's own readers of bzip2 and xz take a damaged stream after the first one for the end of the file.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], Any]) -> None:
        self.file, self.begin = file, begin
        self.stream, self.packed = begin(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.stream.eof:
                self.packed = (self.stream.unused_data or self.file.read(PIECE_BYTES)).lstrip(b"\0")  # xz pads
                if not self.packed:
                    return 0
                self.stream = self.begin()
            elif not self.packed and self.stream.needs_input and not (packed := self.file.read(PIECE_BYTES)):
                raise EOFError("it ends before its end mark")
            elif not self.packed and self.stream.needs_input:
                self.packed = packed
            data = self.stream.decompress(self.packed, len(buffer))
            self.packed = b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def xz_stream() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)
