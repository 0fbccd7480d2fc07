"""A file of any kind as a stream of chunks, cheap to send to a worker: never the whole file in memory.

What a file is, its content decides; the name's ending only tells a table from a text.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from recipe import UserError
from train.batches import batches, without_nulls_of_tools
from train.jsonstream import DECODER, values
from train.row import Problem

BYTES_A_CHUNK, ROWS_A_CHUNK = 1 << 20, 1000
LONGEST_LINE_BYTES = 1 << 26
PIECE_CHARACTERS = 4000  # of a text file: about a thousand tokens, cut between paragraphs
START_BYTES = 1 << 16
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
TEXTS = (".txt", ".md", ".text", ".raw", ".tokens")
JSONS = (".jsonl", ".ndjson", ".json")
DELIMITERS = ",\t;|"
BLANK_LINES = re.compile(r"\n[ \t]*\n")
UNPACKING = (EOFError, zlib.error, lzma.LZMAError, OSError)
csv.field_size_limit(LONGEST_LINE_BYTES)


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
    except UNPACKING as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        where = f"{path}:{reached.first}" if reached.first > 1 else str(path)
        raise UserError(f"{where}: its compressed data is damaged or cut off ({error}): get the file again") from None


def _chunks(path: Path) -> Iterator[Chunk]:
    name = str(path)
    with _opened(path) as file:
        start = file.read(START_BYTES)
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        for first, batch in batches(path):
            yield Chunk(name, first, batch)
        return
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}:1: UTF-16, not UTF-8: save the file as UTF-8")
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{name}: is a ZIP archive or a spreadsheet: unpack it, or save it as CSV")
    if b"\0" in start:
        line = start[: start.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{name}:{line}: has a zero byte: the file is damaged, or no text and no Parquet or Arrow file")
    if not start.removeprefix(b"\xef\xbb\xbf").strip() and len(start) < START_BYTES:
        raise UserError(f"{name}: is empty: write one conversation a line")
    kind = _kind(path, start)
    with _opened(path) as file:
        if kind == "lines":
            yield from _lines(file, name)
            return
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        found = {"json": values, "table": _table, "text": _pieces}[kind](text, name)
        yield from _grouped(found, name)


def _opened(path: Path) -> Any:
    """The file's bytes, unpacked."""
    with path.open("rb") as file:
        magic = file.read(6)
    packing = next((name for mark, name in PACKED.items() if magic.startswith(mark)), None)
    if packing == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open, None: open}[packing](path, "rb")


def _kind(path: Path, start: bytes) -> str:
    """`lines` of JSON, `json` of any other shape, `table` or `text`."""
    endings = [ending.lower() for ending in path.suffixes]
    whole = len(start) < START_BYTES
    lines = [line for line in start.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    complete = lines if whole else lines[:-1]
    is_json = any(isinstance(_parsed(line, ""), dict) for line in complete[:3])
    opening = lines[0].lstrip()[:1] if lines else b""
    if is_json and opening != b"[":
        return "lines"
    if any(ending in TEXTS for ending in endings):
        return "text"
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
    found, fault = iter(found), None
    while fault is None:
        group: list[tuple[int, Any]] = []
        try:
            group.extend(islice(found, ROWS_A_CHUNK))
        except UserError as error:
            fault = error
        except UnicodeDecodeError:
            line = group[-1][0] if group else 1
            fault = UserError(f"{name}:{line}: not UTF-8 on or after this line: save the file as UTF-8")
        if not group and fault is None:
            return
        if group:
            yield Chunk(name, group[0][0], group)
    raise fault


def _table(file: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line, {column: cell}) of a table's rows; an empty cell is None."""
    header = file.readline()
    delimiter = max(DELIMITERS, key=header.count)
    columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter))]
    if len(set(columns)) < len(columns) or "" in columns:
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
        if len(cells) == len(columns):
            yield line, {column: cell or None for column, cell in zip(columns, cells, strict=True)}
        elif cells:
            told = (
                f"{len(cells)} cells where the first line names {len(columns)}: quote cells that contain {delimiter!r}"
            )
            yield line, Problem(f"{name}:{line}", told)


def _pieces(file: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line, {"text": ...}) of a text file, cut between paragraphs where it is long."""
    piece, line, at = "", 1, 1
    for text in file:
        text = text.replace("\r\n", "\n")
        if len(piece) + len(text) > PIECE_CHARACTERS and (
            BLANK_LINES.search(piece[-2:]) or len(piece) > PIECE_CHARACTERS
        ):
            yield line, {"text": piece.strip("\n")}
            piece, line = "", at
        piece += text
        at += 1
    if piece.strip():
        yield line, {"text": piece.strip("\n")}


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode("utf-8-sig").strip()
        record, end = DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return record
    except UnicodeDecodeError as error:
        return Problem(place, f"not UTF-8 at byte {error.start + 1}: save the file as UTF-8")
    except json.JSONDecodeError as error:
        if b"\0" in line:
            return Problem(place, f"has a zero byte at {line.index(0) + 1}: the file is damaged here, get it again")
        return Problem(place, f"not JSON at column {error.colno} ({error.msg}): write one JSON object a line")
    except RecursionError:
        return Problem(place, "nested too deeply: a row is an object of a few levels")
    except ValueError as error:
        return Problem(place, str(error))
