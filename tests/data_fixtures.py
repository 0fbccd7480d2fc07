"""What several tests of data share: rows of a file without the stage, and the stage on rows."""

import json
from pathlib import Path
from typing import Any

from pipeline import Made, Run, UserError, load
from pipeline.rows import rows
from train.data import data
from train.reading.formats import Detected, Read, detect, whole_chunks
from train.reading.formats import rows as rows_of
from train.reading.row import Problem, Row
from train.reading.sources import Source


def read(path: Path | str) -> list[Row]:
    """The rows of a file of any format, in which nothing is wrong."""
    found, problems = read_what_is_right(path)
    assert problems == []
    return found


def read_what_is_right(path: Path | str) -> tuple[list[Row], list[Problem | str]]:
    """(the rows of a file, what is wrong with others of it)."""
    source, found, problems = Source(str(path)), list[Row](), list[Problem | str]()
    try:
        detected = detect(source)
        for chunk in whole_chunks(source, detected.format):
            result = rows_of(detected, chunk)
            found += result.rows
            problems += result.problems
    except UserError as error:
        problems += error.problems
    return found, problems


def found_in(name: str, *records: Any) -> tuple[Detected, Read]:
    """A file, of these records if any are given, detected and read whole."""
    path = Path(name)
    if records:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(name)
    detected, read = detect(source), Read()
    for chunk in whole_chunks(source, detected.format):
        more = rows_of(detected, chunk)
        read.rows += more.rows
        read.rejected += more.rejected
        read.problems += more.problems
        read.changes += more.changes
    return detected, read


def made(lines: list[str], **more: object) -> tuple[Made, dict[str, list[dict[str, Any]]]]:
    """What the stage says, and what it writes by part, of these lines and keys of the recipe's `data`."""
    Path("talks.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    Path("r.yaml").write_text(json.dumps({"data": {"train": "talks.jsonl", **more}}))
    folder = Path("runs/r/data")
    result = data(load("r.yaml"), Run("r"))
    parts = {part: list(rows(folder, part)) for part in ("train", "validation")}
    lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return result, parts | {"rejected": [json.loads(line) for line in lines]}
