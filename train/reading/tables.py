"""Tables of separated values and plain texts as records with their lines."""

import csv
from collections.abc import Iterator
from typing import IO, Any

from pipeline import UserError
from train.reading.columns import KNOWN
from train.reading.row import Problem

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
