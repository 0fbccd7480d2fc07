"""What a worker does with a chunk of a source: rows are read, cleaned, and signed for comparison with all others."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline import Recipe
from pipeline.recipe import Clean
from pipeline.rows import row_batch
from train.cleaning import contamination
from train.cleaning.clean import clean
from train.cleaning.quality import require_known
from train.reading.chunks import Chunk
from train.reading.formats import Detected, rows
from train.reading.row import Problem, Rejected, Rejection, Row
from train.reading.sources import Source, copies


@dataclass(frozen=True)
class Settings:
    """What every worker needs to know; cheap to send."""

    clean: Clean
    held_out: contamination.Questions
    seed: int


@dataclass(frozen=True)
class Work:
    """A chunk of the source of that number."""

    number: int
    source: Source
    detected: Detected
    chunk: Chunk


@dataclass
class Prepared:
    """What became of a chunk.

    `batch` has the rows that were kept (pipeline.rows); as long are `signatures` (train.cleaning.duplicates) and
    `copies`, how often each row is taken; `rejected` are lines of JSON.
    """

    number: int
    bytes: int
    batch: Any
    signatures: Any
    copies: Any
    rejected: list[str]
    problems: list[Problem]
    read: int
    by_step: Counter[str]
    by_reason: Counter[str]
    changed: Counter[str]
    normalized: Counter[str]
    named: set[str]


def settings(recipe: Recipe, questions: list[Row]) -> Settings:
    """The recipe's, with its held-out questions made ready to be looked for.

    Raises:
        UserError: a language that cannot be told.
    """
    knobs = recipe.data.clean
    if knobs.languages:  # its model takes longer to load than a small set to clean
        require_known(knobs.languages)
    held_out = contamination.questions(questions if knobs.contamination else [], knobs.similarity)
    return Settings(knobs, held_out, recipe.seed)


def prepared(settings: Settings, work: Work) -> Prepared:
    """The rows of a chunk, each cleaned or rejected by itself: no row's lot depends on another's here."""
    import numpy as np

    from train.cleaning.duplicates import signatures

    found = rows(work.detected, work.chunk)
    kept, rejected, changed = [], list(found.rejected), Counter[str]()
    for row in found.rows:
        try:
            value, steps = clean(row.value, settings.clean)
            if settings.held_out.places:
                contamination.check(value, settings.held_out)
        except Rejection as rejection:
            rejected.append(Rejected(row.value, row.place, rejection))
        else:
            changed.update(steps)
            kept.append(Row(value, row.place))
    values, places = [row.value for row in kept], [row.place for row in kept]
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    content = work.chunk.content
    return Prepared(
        number=work.number,
        bytes=len(content) if isinstance(content, bytes) else sum(map(len, texts)),
        batch=row_batch(texts, places),
        signatures=signatures(values, settings.seed),
        copies=np.array([copies(work.source, value, settings.seed) for value in values], np.int64),
        rejected=[line_of(row.place, row.rejection, as_json(row.value)) for row in rejected],
        problems=found.problems,
        read=len(found.rows),
        by_step=Counter(row.rejection.step for row in rejected),
        by_reason=Counter(row.rejection.reason for row in found.rejected),
        changed=changed,
        normalized=found.changes,
        named=found.named,
    )


def line_of(place: str, rejection: Rejection, row: str) -> str:
    """A line of rejected.jsonl; `row` is JSON already."""
    told = json.dumps({"source": place, "reason": rejection.reason, "step": rejection.step}, ensure_ascii=False)
    return f'{told[:-1]}, "row": {row}}}\n'


def as_json(value: Any) -> str:
    """A row as it was read, which may hold what JSON has no form for, such as the dates of a table."""
    return json.dumps(value, ensure_ascii=False, default=str)
