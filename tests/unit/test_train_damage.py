"""Files of every format and packing, damaged at random: rows or problems with their place, nothing uncounted.

Each number of DAMAGED_FILES is a file of its own, so that a fault names what makes it again.
DAMAGED_FILES=100000 .venv/bin/python -m pytest tests/unit/test_train_damage.py runs for hours.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_train_exports import SHAPES as EXPORTS
from test_train_formats import SHAPES

from pipeline import load
from pipeline.rows import batches
from train.cleaning.clean import settings
from train.data import Intake, take_in
from train.reading.chunks import opened
from train.reading.row import Problem, told
from train.reading.sources import Source

FILES = int(os.environ.get("DAMAGED_FILES", "200"))
RECORDS = [
    *(record for _, record, _ in (*SHAPES.values(), *EXPORTS.values())),
    {"message_id": "1", "parent_id": None, "text": "ping", "role": "prompter"},
    {"message_id": "2", "parent_id": "1", "text": "pong", "role": "assistant", "rank": 0},
    {"instruction": "x", "instances": [{"input": "ping", "output": "pong"}] * 2},
    {"title": "t", "paragraphs": [{"context": "x", "qas": [{"question": "ping", "answers": [{"text": "pong"}]}]}]},
]
# Values in the place of others: of a wrong type, empty, or broken.
INSTEAD = ["null", "7", "[]", "{}", '[["a"]]', "[null]", '{"a": 1}', '"\\ud83d"', "1e999", "NaN", "true", '""', "[7]"]
OTHER = ["caf\u00e9".encode("latin-1"), "caf\u00e9".encode("utf-16"), b"\xef\xbb\xbf", b"\0", b"\0" * 9]
SIGNS = [b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\r", b"\\", b"\t", b":"]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(records: list[Any]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(records[0])
    for record in records:
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in record.values()])
    return file.getvalue().encode()


def arrow(records: list[Any], write: Callable[[Any, Any], None]) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    try:
        write(pyarrow.Table.from_pylist(records), buffer)
    except pyarrow.ArrowException:  # of mixed types, or an empty object: no such file is there
        return lines(records)
    return bytes(buffer.getvalue())


def stream(made: Any, buffer: Any) -> None:
    with pyarrow.ipc.new_stream(buffer, made.schema) as writer:
        writer.write_table(made)


def zstd(content: bytes) -> bytes:
    with pyarrow.BufferOutputStream() as buffer:
        with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
            file.write(content)
        return bytes(buffer.getvalue())


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": lines,
    ".json": lambda records: json.dumps(records, indent=1).encode(),
    ".around.json": lambda records: json.dumps({"version": 1, "data": records}).encode(),
    ".csv": table,
    ".parquet": lambda records: arrow(records, pyarrow.parquet.write_table),
    ".arrow": lambda records: arrow(records, stream),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
DAMAGES: list[Callable[[bytes, int, random.Random], bytes]] = [
    lambda content, at, chance: content,
    lambda content, at, chance: content[:at],
    lambda content, at, chance: content[at:] + content[:at],
    lambda content, at, chance: content[:at] + content[at + chance.choice([1, 3, 40]) :],
    lambda content, at, chance: content[:at] + content[chance.randrange(at + 1) :],
    lambda content, at, chance: content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
    lambda content, at, chance: content[:at] + chance.randbytes(chance.choice([1, 4, 40])) + content[at:],
    lambda content, at, chance: content[:at] + chance.choice(OTHER + SIGNS) + content[at:],
    lambda content, at, chance: content.replace(*chance.choice([(b'"ping"', b'"pong"'), (b'"pong"', b'"ping"')])),
    lambda content, at, chance: content.replace(
        chance.choice([b'"ping"', b'"pong"', b'"user"', b'"assistant"', b"null", b'"1"']),
        chance.choice(INSTEAD).encode(),
        chance.choice([1, -1]),
    ),
    lambda content, at, chance: content.replace(b"[", chance.choice([b"{", b"[null, ", b'["x", ']), 1),
]


def damaged(number: int) -> tuple[str, bytes, bool]:
    """(name, content, whether every line of it is a record) of that file."""
    chance = random.Random(number)
    record, kind, packing = chance.choice(RECORDS), chance.choice(list(KINDS)), chance.choice(list(PACKINGS))
    kind = kind if isinstance(record, dict) else ".jsonl"
    content = KINDS[kind]([record] * chance.choice([1, 2, 30]))
    pack, packed_first = PACKINGS[packing], chance.random() < 0.3
    half = chance.randrange(len(content))
    content = pack(content[:half]) + pack(content[half:]) if packed_first else content  # two streams
    for _ in range(chance.choice([1, 1, 2, 3])):
        content = chance.choice(DAMAGES)(content or b"\n", chance.randrange(len(content) or 1), chance)
    return f"file{kind}{packing}", content if packed_first else pack(content), kind == ".jsonl" and "messages" in record


def test_damaged_files_are_rows_or_problems_and_nothing_is_lost_uncounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("base_model: random\ndata: {train: x.jsonl}\n")
    given = settings(load("r.yaml"), [])
    for number in range(FILES):
        name, content, by_line = damaged(number)
        Path(name).write_bytes(content)
        intake = Intake([Source(name)])
        try:
            take_in(intake, given, tmp_path)
        except Exception as error:
            raise AssertionError(f"file {number}, {name}: {error!r}") from error
        kept = sum(batch.num_rows for batch in batches(tmp_path, "every"))
        rejected = len(Path("rejected.jsonl").read_bytes().splitlines())
        assert kept + rejected == intake.read[0] + sum(intake.by_reason.get(0, {}).values()), number
        problems = told(intake.problems)
        assert kept or rejected or problems, number
        assert all(problem.startswith((f"{name}:", "and ")) for problem in problems), (number, problems)
        for problem in intake.problems:
            assert not isinstance(problem, Problem) or problem.place.rpartition(":")[2].isdigit(), (number, problem)
        if by_line and not problems:
            with opened(Path(name)) as file:
                assert kept + rejected == sum(not line.isspace() for line in file), number
        Path(name).unlink()
