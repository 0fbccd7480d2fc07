"""Read, check and split the conversations:  python -m train.data RECIPE

What may be read, and in which formats: train/reading. The sources stream through workers on all cores, which clean
and sign each row alone (train/cleaning/clean.py), into a file of all rows; by the signatures, all that has to be in
memory, it is decided which rows repeat others and which are held back (train/cleaning/duplicates.py).
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fingerprint, fresh_folder, put_in_place, remove
from pipeline.machine import cores
from pipeline.methods import METHODS
from pipeline.progress import progress
from pipeline.rows import RowWriter, batches, rows
from train.cleaning.clean import Prepared, Settings, Work, line_of, prepared, settings
from train.pool import in_order
from train.reading.chunks import records
from train.reading.formats import Detected, detect, whole_chunks
from train.reading.row import Problem, Rejection, Row, told
from train.reading.sources import Source, chunks, sources
from train.reading.turns import text, turns

log = logging.getLogger("truetune")
PROBLEMS_KEPT = 10_000
PARTS = ("train", "validation")


@dataclass
class Intake:
    """What the workers found, chunk by chunk: the rows lie in `every.arrow`, their signatures in `signatures.bin`."""

    sources: list[Source]
    problems: list[Problem | str] = field(default_factory=list)
    detected: dict[int, Detected] = field(default_factory=dict)
    read: Counter[int] = field(default_factory=Counter)
    by_reason: dict[int, Counter[str]] = field(default_factory=dict)
    normalized: dict[int, Counter[str]] = field(default_factory=dict)
    by_step: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first_rejected: dict[int, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)  # columns of data.columns that were there


def data(recipe: Recipe, run: Run) -> Made:
    """Write `data/` with `train.arrow`, `validation.arrow` (pipeline.rows), `heldout.jsonl` and `rejected.jsonl`.

    Raises:
        UserError: every problem of every file, each with file and line.
    """
    intake, of_questions = Intake(sources(recipe.data)), list[Problem | str]()
    questions = read_questions(recipe.data.heldout, of_questions) if recipe.data.heldout else []
    folder = fresh_folder(run.path(".data.tmp"))
    try:
        take_in(intake, settings(recipe, questions), folder)
        if problems := intake.problems + of_questions:
            raise UserError(*told(problems))
        counts = divide(intake, recipe, folder)
        if METHODS[recipe.train.method].rows == "judged":
            require_both_labels(folder)
        write_questions(folder / "heldout.jsonl", questions)
        put_in_place(folder, run.path("data"))
    finally:
        remove(folder)
    read = sum(intake.read.values())
    log.info("data: %d rows, %s changed, %s rejected", read, _counted(intake.changed), _counted(intake.by_step))
    files = [*(source.name for source in intake.sources if not source.hub), recipe.data.heldout]
    return Made(
        outputs=[run.path("data")],
        metrics=counts
        | {
            "heldout": len(questions),
            "changed": dict(intake.changed),
            "rejected": dict(intake.by_step),
            "sources": [_told_of(intake, number) for number in range(len(intake.sources))],
        },
        inputs={name: fingerprint(Path(name)) for name in files if name},
    )


def take_in(intake: Intake, given: Settings, folder: Path) -> None:
    """Read, clean and sign the rows of all sources on all cores; what is wrong is told in `intake.problems`."""
    sizes = [0 if source.hub else Path(source.name).stat().st_size for source in intake.sources]
    done, read, start = Counter[int](), 0, time.monotonic()
    with ExitStack() as stack:
        tell = stack.enter_context(progress("data", sum(sizes), "MB", 1e-6))
        every = stack.enter_context(RowWriter(folder / "every.arrow"))
        signatures, copies = (stack.enter_context((folder / name).open("wb")) for name in ("signatures", "copies"))
        rejected = stack.enter_context(
            (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        )
        for piece in in_order(prepared, _works(intake), given, cores()):
            every.write(piece.batch)
            signatures.write(piece.signatures.tobytes())
            copies.write(piece.copies.tobytes())
            rejected.writelines(piece.rejected)
            _count(intake, piece)
            step = min(piece.bytes, sizes[piece.number] - done[piece.number])  # of a packed file more than its size
            done[piece.number] += step
            read += piece.read
            tell(done.total(), f"{read:,} rows", f"{read / (time.monotonic() - start):,.0f} rows/s")
            if len(intake.problems) > PROBLEMS_KEPT:
                break
    for number in range(len(intake.sources)):
        if number in intake.first_rejected and not intake.read[number]:
            intake.problems.append(_nothing_learned(intake, number))
    for column in sorted({name for source in intake.sources for _, name in source.columns} - intake.named):
        if intake.detected:
            there = ", ".join(dict.fromkeys(name for found in intake.detected.values() for name in found.columns))
            intake.problems.append(f"data.columns: no row has a column {column!r}: the columns are {there}")


def divide(intake: Intake, recipe: Recipe, folder: Path) -> dict[str, int]:
    """Write the rows that are kept to their part's file, the repeated ones to `rejected.jsonl`; how many each has.

    Raises:
        UserError: there is nothing to train on.
    """
    import numpy as np

    from train.cleaning.duplicates import SIGNATURE, sides

    first, held = sides(np.fromfile(folder / "signatures", SIGNATURE), recipe.data)
    times = np.fromfile(folder / "copies", np.int64)
    repeated = first != np.arange(len(first))
    wanted = set(first[repeated].tolist())  # the rows that others repeat, of which the place is told
    places: dict[int, str] = {}
    at = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(RowWriter(folder / f"{part}.arrow")) for part in PARTS]
        rejected = stack.enter_context(
            (folder / "rejected.jsonl").open("a", encoding="utf-8", errors="backslashreplace")
        )
        for batch in batches(folder, "every"):
            here = slice(at, at + batch.num_rows)
            places |= {at + row: batch["source"][row].as_py() for row in range(batch.num_rows) if at + row in wanted}
            kept, back = ~repeated[here], held[here]
            writers[0].write(batch.take(np.repeat(np.flatnonzero(kept & ~back), times[here][kept & ~back])))
            writers[1].write(batch.take(np.flatnonzero(kept & back)))
            for row in np.flatnonzero(repeated[here]).tolist():
                why = Rejection(f"repeats {places[int(first[at + row])]}", "duplicates")
                rejected.write(line_of(batch["source"][row].as_py(), why, batch["row"][row].as_py()))
            at += batch.num_rows
    if repeated.any():
        intake.by_step["duplicates"] += int(repeated.sum())
    if not (~repeated & ~held).any():
        raise UserError(_nothing_left(intake, recipe.data.validation))
    counts = {part: writer.count for part, writer in zip(PARTS, writers, strict=True)}
    if not counts["train"]:
        raise UserError("data.weights leave no row to train on: give at least one source a weight of 1")
    for name in ("every.arrow", "signatures", "copies"):
        remove(folder / name)
    return counts


def require_both_labels(folder: Path) -> None:
    """Raise UserError if all answers to train on are good ones, or all bad ones."""
    first: dict[str, Any] | None = None
    for row in rows(folder, "train"):
        first = first or row
        if row["label"] is not first["label"]:
            return
    if first:
        kind, other = ("good", "bad") if first["label"] else ("bad", "good")
        raise UserError(
            f"{first['source']}: its answer is labelled as a {kind} one, and so are all others: kto learns to tell "
            f"good from bad, add {other} ones"
        )


def write_questions(path: Path, questions: list[Row]) -> None:
    lines = [json.dumps(row.value | {"source": row.place}, ensure_ascii=False) + "\n" for row in questions]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _works(intake: Intake) -> Iterator[Work]:
    """The chunks of all sources; one that cannot be read on is told, and the next one is read."""
    for number, source in enumerate(intake.sources):
        try:
            detected = detect(source)
            intake.detected[number] = detected
            for chunk in whole_chunks(source, detected.format):
                yield Work(number, source, detected, chunk)
        except UserError as error:
            intake.problems += error.problems


def _count(intake: Intake, piece: Prepared) -> None:
    intake.problems += piece.problems
    intake.read[piece.number] += piece.read
    intake.by_reason.setdefault(piece.number, Counter()).update(piece.by_reason)
    intake.normalized.setdefault(piece.number, Counter()).update(piece.normalized)
    intake.by_step += piece.by_step
    intake.named |= piece.named
    intake.changed += piece.changed
    if piece.rejected:
        intake.first_rejected.setdefault(piece.number, piece.rejected[0])


def _told_of(intake: Intake, number: int) -> dict[str, Any]:
    """What the receipt tells of a source, which is shown as well."""
    source, detected = intake.sources[number], intake.detected[number]
    reasons, count = intake.by_reason.get(number, Counter()), intake.read[number]
    changes = +intake.normalized.get(number, Counter())
    columns = f" ({', '.join(detected.columns)})" if detected.columns else ""
    told = "".join(f", {times} x {what}" for what, times in changes.most_common())
    what = f"{detected.format.name}{columns}, {count} rows, {reasons.total()} left out{told}"
    log.info("data: %s: %s", source.name, what)
    return {
        "source": source.name,
        "format": detected.format.name,
        "columns": detected.columns,
        "weight": source.weight,
        "rows": count,
        "rejected": dict(reasons),
        "changes": dict(changes),
    }


def _nothing_learned(intake: Intake, number: int) -> Problem:
    """The first row of a source whose rows are all left out, and why the others are."""
    row, reasons = json.loads(intake.first_rejected[number]), intake.by_reason[number]
    others = [f"{count:,} x {reason}" for reason, count in reasons.most_common(3) if reason != row["reason"]]
    also = f" (also {'; '.join(others)})" if others else ""
    which = f"none of this file's rows ({reasons.total():,}) can be learned{also}"
    return Problem(row["source"], f"{row['reason']}; {which}: correct them, or take it out of data.train")


def _nothing_left(intake: Intake, share: float) -> str:
    rows = sum(intake.read.values())
    what = f"{rows} conversation(s) leave nothing to train on"
    if intake.by_step.total() >= rows and intake.first_rejected:
        row = json.loads(next(iter(intake.first_rejected.values())))
        shown = f"{row['source']}, {row['step']}: {row['reason']}"
        return f"{what}, since all are rejected ({shown}): correct the rows or the recipe's data.clean"
    return f"{what} after the split (data.validation={share}): add conversations or set data.validation=0"


def _counted(steps: Counter[str]) -> str:
    """`5 (duplicates 4, length 1)`."""
    each = ", ".join(f"{step} {count}" for step, count in steps.most_common())
    return f"{steps.total()} ({each})" if each else "0"


def read_questions(name: str, problems: list[Problem | str]) -> list[Row]:
    """The held-out questions of a file; what is wrong is appended to `problems`."""
    found: list[Row] = []
    try:
        for chunk in chunks(Source(name)):
            for place, record in records(chunk):
                try:
                    if isinstance(record, Problem):
                        problems.append(record)
                    else:
                        found.append(Row(checked_question(record), place))
                except (ValueError, Rejection) as error:
                    problems.append(Problem(place, str(error)))
    except UserError as error:
        problems += error.problems
    return found


def checked_question(row: Any) -> dict[str, Any]:
    """The checked messages of a held-out row, which end with a question, its reference answer and key facts.

    Raises:
        ValueError: what is wrong with the row.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise ValueError('not a question: a held-out row is {"messages": [{"role": ..., "content": ...}, ...], ...}')
    messages = turns(row["messages"], Counter())
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with role {messages[-1]['role']!r}: a held-out row ends with the user's question")
    facts = row.get("facts")
    if not isinstance(facts, list) or not facts or not all(isinstance(fact, str) and fact.strip() for fact in facts):
        raise ValueError("'facts' must be a list of strings that a right answer contains, like [\"make serve\"]")
    answer = text(row.get("answer"), "'answer'")
    return {"messages": messages, "answer": answer, "facts": [text(fact, "'facts'") for fact in facts]}


if __name__ == "__main__":
    command("data", data)
