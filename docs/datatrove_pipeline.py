"""The cleaning steps of `make data` as a datatrove pipeline, for data that no single disk holds; see docs/datatrove.md.

    python -m docs.datatrove_pipeline RECIPE FOLDER [TASKS]

reads the recipe's sources and writes below FOLDER (a path, or any URL that fsspec writes to) the rows that `make data`
keeps, before it splits them, as `kept/*.jsonl.gz`, and what it drops as `rejected/*.jsonl.gz`.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from pipeline import Recipe, UserError, load
from pipeline.command import boundary
from train.cleaning.clean import Settings, Work, prepared, settings
from train.data import read_questions
from train.reading.formats import detect, whole_chunks
from train.reading.row import Problem, Row
from train.reading.sources import Source, sources

FIRST = 65_535  # datatrove keeps the document of the highest priority, which is at most this


class Sources(PipelineStep):
    """Reads, cleans and checks each row of some sources alone: task n of m takes every m-th source from the n-th on."""

    type, name = "READER", "Truetune sources"

    def __init__(self, recipe: str, rejected: JsonlWriter) -> None:
        super().__init__()
        self.recipe, self.rejected = recipe, rejected

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        recipe = load(self.recipe)
        given = settings(recipe, questions(recipe))
        with self.rejected as rejected:
            for number, source in list(enumerate(sources(recipe.data)))[rank::world_size]:
                for place, text in self._rows(number, source, given, rejected, rank):
                    self.stat_update("forwarded")
                    yield Document(text, place, metadata={"source_number": number})

    def _rows(
        self, number: int, source: Source, given: Settings, rejected: Any, rank: int
    ) -> Iterator[tuple[str, str]]:
        """(place, row as JSON) of each row that is kept."""
        detected = detect(source)
        for chunk in whole_chunks(source, detected.format):
            piece = prepared(given, Work(number, source, detected, chunk))
            if piece.problems:
                raise UserError(*map(str, piece.problems))
            for line in piece.rejected:
                told = json.loads(line)
                self.stat_update("dropped", f"dropped_{told['step']}")
                rejected.write(Document(line, told["source"]), rank)
            yield from zip(piece.batch["source"].to_pylist(), piece.batch["row"].to_pylist(), strict=True)


def questions(recipe: Recipe) -> list[Row]:
    """The held-out questions, which no row may have in it.

    Raises:
        UserError: they cannot be read.
    """
    problems: list[Problem | str] = []
    found = read_questions(recipe.data.heldout, problems) if recipe.data.heldout else []
    if problems:
        raise UserError(*map(str, problems))
    return found


def content(document: Document) -> bytes:
    """What equal rows have in common: the row with its keys sorted, as train/cleaning/duplicates.py compares it."""
    return json.dumps(json.loads(document.text), sort_keys=True).encode()


def priority(document: Document) -> int:
    """Of equal rows that of the first source is kept, and of one source the first."""
    return max(1, FIRST - int(document.metadata["source_number"]))


def as_written(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    """The row itself, as a source of `make data` has it, or the line of a rejected one."""
    written: dict[str, Any] = json.loads(document.text)
    return written


def as_repeated(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    """The line of a row that equals another."""
    told = {"source": document.id, "reason": "repeats another row", "step": "duplicates"}
    return told | {"row": json.loads(document.text)}


def pipeline(recipe: str, folder: str, tasks: int = 1) -> LocalPipelineExecutor:
    """The last of four jobs, each of which waits for the one before; `run()` runs them all."""
    config = ExactDedupConfig(content_getter=content, document_priority=priority)
    rejected = JsonlWriter(f"{folder}/rejected", output_filename="alone-${rank}.jsonl", adapter=as_written)
    repeated = JsonlWriter(f"{folder}/rejected", output_filename="repeated-${rank}.jsonl", adapter=as_repeated)

    def job(name: str, steps: list[Any], many: int, depends: Any = None) -> LocalPipelineExecutor:
        return LocalPipelineExecutor(steps, many, logging_dir=f"{folder}/logs/{name}", depends=depends)

    clean = job("clean", [Sources(recipe, rejected), JsonlWriter(f"{folder}/cleaned")], tasks)
    sign = job(
        "sign", [JsonlReader(f"{folder}/cleaned"), ExactDedupSignature(f"{folder}/signatures", config)], tasks, clean
    )
    find = job("find", [ExactFindDedups(f"{folder}/signatures", f"{folder}/duplicates", config)], 1, sign)
    return job(
        "keep",
        [
            JsonlReader(f"{folder}/cleaned"),
            ExactDedupFilter(f"{folder}/duplicates", config, repeated),
            JsonlWriter(f"{folder}/kept", adapter=as_written),
        ],
        tasks,
        find,
    )


if __name__ == "__main__":
    with boundary():
        name, folder, *many = sys.argv[1:]
        pipeline(name, folder, int(many[0]) if many else 1).run()
