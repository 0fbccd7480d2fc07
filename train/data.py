"""Read, check and split the conversations:  python -m train.data RECIPE

What may be read, and in which formats: train/sources.py and train/formats.py.
A held-out file has questions: `{"messages": [...], "answer": "...", "facts": ["key string", "one|or another"]}`.
"""

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from recipe import Made, Recipe, Run, UserError, command
from recipe.files import fingerprint, fresh_folder, put_in_place
from recipe.rows import RowWriter
from train.chunks import records
from train.formats import Read, detect, rows, whole_chunks
from train.row import Problem, Rejection, Row
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
    found = {source: result.rows for source, (result, _) in reads.items()}
    every = [row for result in found.values() for row in result]
    validation, train = split(every, recipe.data.validation, recipe.seed)
    weights = {id(row): copies(source, row.value, recipe.seed) for source in found for row in found[source]}
    train = [row for row in train for _ in range(weights[id(row)])]
    if not train:
        raise UserError("data.weights leave no row to train on: give at least one source a weight of 1")

    parts = {"train": train, "validation": validation, "heldout": questions}
    rejected = [lost for result, _ in reads.values() for lost in result.rejected]
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

    files = [*(source.name for source in found if not source.hub), recipe.data.heldout]
    return Made(
        outputs=[run.path("data")],
        metrics={name: len(part) for name, part in parts.items()}
        | {
            "duplicates": _duplicates(every),
            "rejected": len(rejected),
            "sources": [told for _, told in reads.values()],
        },
        inputs={name: fingerprint(Path(name)) for name in files if name},
    )


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


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(validation, train): a conversation's side depends on its text and the seed alone, so duplicates stay together.

    Raises:
        UserError: one side would be empty.
    """
    if share == 0:
        return [], rows

    def position(row: Row) -> float:
        text = json.dumps([seed, row.value], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    positions = {id(row): position(row) for row in rows}
    validation = [row for row in rows if positions[id(row)] < share]
    if not validation:  # a small file may have none below the share: take the lowest, with its duplicates
        lowest = min(positions.values())
        validation = [row for row in rows if positions[id(row)] == lowest]
    train = [row for row in rows if positions[id(row)] not in {positions[id(held)] for held in validation}]
    if not train:
        raise UserError(
            f"{len(rows)} conversation(s) leave nothing to train on after the split (data.validation={share}): "
            "add conversations or set data.validation=0"
        )
    return validation, train


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    lines = [json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _duplicates(rows: list[Row]) -> int:
    return len(rows) - len({json.dumps(row.value, sort_keys=True) for row in rows})


if __name__ == "__main__":
    command("data", data)
