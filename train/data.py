"""Read, check and split the conversations:  python -m train.data RECIPE

What may be read, and in which formats: train/sources.py and train/formats.py.
A held-out file has questions: `{"messages": [...], "answer": "...", "facts": ["key string", "one|or another"]}`.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe import Made, Recipe, Run, UserError, command
from recipe.files import fingerprint, fresh_folder, put_in_place
from recipe.rows import RowWriter
from train import contamination, language
from train.chunks import records
from train.clean import clean
from train.formats import Read, detect, rows, whole_chunks
from train.row import Problem, Rejected, Rejection, Row
from train.sources import Source, chunks, copies, sources
from train.turns import text, turns

log = logging.getLogger("truetune")
PROBLEMS_SHOWN, ALIKE_SHOWN = 20, 3


def data(recipe: Recipe, run: Run) -> Made:
    """Write `data/train.arrow`, `data/validation.arrow` (recipe.rows), `data/heldout.jsonl` and `data/rejected.jsonl`.

    Raises:
        UserError: every problem of every file, each with file and line.
    """
    problems: list[Problem | str] = []
    reads = {source: read(source, problems) for source in sources(recipe.data)}
    questions = read_questions(recipe.data.heldout, problems) if recipe.data.heldout else []
    if problems:
        raise UserError(*told(problems))
    found = [(source, row) for source, (result, _) in reads.items() for row in result.rows]
    kept = prepared([row for _, row in found], questions, recipe)
    weights = {row.place: source for source, row in found}
    train = [row for row in kept.train for _ in range(copies(weights[row.place], row.value, recipe.seed))]
    if not train:
        raise UserError("data.weights leave no row to train on: give at least one source a weight of 1")

    parts = {"train": train, "validation": kept.validation, "heldout": questions}
    rejected = [lost for result, _ in reads.values() for lost in result.rejected] + kept.rejected
    folder = fresh_folder(run.path(".data.tmp"))
    for name in ("train", "validation"):
        with RowWriter(folder / f"{name}.arrow") as writer:
            for row in parts[name]:
                writer.add(json.dumps(row.value, ensure_ascii=False), row.place)
    _write_lines(folder / "heldout.jsonl", [row.value | {"source": row.place} for row in questions])
    _write_lines(
        folder / "rejected.jsonl",
        [{"source": r.place, "reason": r.rejection.reason, "step": r.rejection.step, "row": r.value} for r in rejected],
    )
    put_in_place(folder, run.path("data"))

    by_step = Counter(row.rejection.step for row in rejected)
    log.info("data: %d rows, %s changed, %s rejected", len(found), _counted(kept.changed), _counted(by_step))
    files = [*(source.name for source in reads if not source.hub), recipe.data.heldout]
    return Made(
        outputs=[run.path("data")],
        metrics={name: len(part) for name, part in parts.items()}
        | {
            "changed": dict(kept.changed),
            "rejected": dict(by_step),
            "sources": [told for _, told in reads.values()],
        },
        inputs={name: fingerprint(Path(name)) for name in files if name},
    )


@dataclass
class Prepared:
    """The cleaned rows of both parts, those that were rejected, and how many rows each step changed."""

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)


def prepared(rows: list[Row], questions: list[Row], recipe: Recipe) -> Prepared:
    """The rows cleaned, each kept once, and split.

    Raises:
        UserError: there is nothing to train on.
    """
    from train.duplicates import signatures
    from train.split import sides

    settings, result, kept = recipe.data.clean, Prepared(), []
    language.require_known(settings.languages)
    held_out = contamination.questions(questions if settings.contamination else [], settings.similarity)
    for row in rows:
        try:
            value, steps = clean(row.value, settings)
            contamination.check(value, held_out)
        except Rejection as rejection:
            result.rejected.append(Rejected(row.value, row.place, rejection))
            continue
        result.changed.update(steps)
        kept.append(Row(value, row.place))
    first, held = sides(signatures([row.value for row in kept], recipe.seed), recipe.data)
    for number, row in enumerate(kept):
        if first[number] != number:
            repeated = Rejection(f"repeats {kept[first[number]].place}", "duplicates")
            result.rejected.append(Rejected(row.value, row.place, repeated))
        else:
            (result.validation if held[number] else result.train).append(row)
    if not result.train:
        raise UserError(_nothing_left(len(rows), result.rejected, recipe.data.validation))
    return result


def _nothing_left(rows: int, rejected: list[Rejected], share: float) -> str:
    what = f"{rows} conversation(s) leave nothing to train on"
    if len(rejected) == rows:
        told = f"{rejected[0].place}, {rejected[0].rejection.step}: {rejected[0].rejection}"
        return f"{what}, since all are rejected ({told}): correct the rows or the recipe's data.clean"
    return f"{what} after the split (data.validation={share}): add conversations or set data.validation=0"


def _counted(steps: Counter[str]) -> str:
    """`5 (duplicates 4, length 1)`."""
    each = ", ".join(f"{step} {count}" for step, count in steps.most_common())
    return f"{steps.total()} ({each})" if each else "0"


def read(source: Source, problems: list[Problem | str]) -> tuple[Read, dict[str, Any]]:
    """(rows of a source, what the receipt tells of it); what is wrong is appended to `problems`."""
    result = Read()
    try:
        detected = detect(source)
        for chunk in whole_chunks(source, detected.format):
            more = rows(detected, chunk)
            result.rows += more.rows
            result.rejected += more.rejected
            result.changes += more.changes
            problems += more.problems
    except UserError as error:
        problems += error.problems
        return result, {}
    count, lost = len(result.rows), len(result.rejected)
    columns = f" ({', '.join(detected.columns)})" if detected.columns else ""
    log.info("data: %s: %s%s, %d rows, %d left out", source.name, detected.format.name, columns, count, lost)
    reasons = Counter(rejected.rejection.reason for rejected in result.rejected)
    if not count and lost:
        listed = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common(3))
        problems.append(f"{source.name}: nothing in it can be learned: {listed}")
    metrics = {
        "source": source.name,
        "format": detected.format.name,
        "columns": detected.columns,
        "weight": source.weight,
        "rows": count,
        "rejected": dict(reasons),
        "changes": dict(result.changes),
    }
    return result, metrics


def told(problems: list[Problem | str]) -> list[str]:
    """The problems as lines; what is wrong with more than a few lines of a file in the same way is told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        file = problem.place.rpartition(":")[0] if isinstance(problem, Problem) else ""
        groups.setdefault((file, problem.text if isinstance(problem, Problem) else problem), []).append(str(problem))
    lines = []
    for same in groups.values():
        many = f"{same[0]} (and {len(same) - 1} more such lines, up to {same[-1].partition(': ')[0]})"
        lines += [many] if len(same) > ALIKE_SHOWN else same
    more = len(lines) - PROBLEMS_SHOWN
    return lines[:PROBLEMS_SHOWN] + ([f"and {more} more problems like these"] if more > 0 else [])


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
                        found.append(Row(question(record), place))
                except (ValueError, Rejection) as error:
                    problems.append(Problem(place, str(error)))
    except UserError as error:
        problems += error.problems
    return found


def question(row: Any) -> dict[str, Any]:
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


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    lines = [json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    command("data", data)
