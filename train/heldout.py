"""The held-out questions: `{"messages": [...], "answer": "...", "facts": ["key string", "one|or another"]}` a line."""

from collections import Counter
from typing import Any

from pipeline import UserError
from train.reading.chunks import records
from train.reading.row import Problem, Rejection, Row
from train.reading.sources import Source, chunks
from train.reading.turns import text, turns


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
