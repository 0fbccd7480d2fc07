"""Read, check and split the conversations:  python -m train.data RECIPE

A data file is JSONL in OpenAI's format: `{"messages": [{"role": "user", "content": "..."}, ...]}` a line.
A held-out file has questions: `{"messages": [...], "answer": "...", "facts": ["key string", "one|or another"]}`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe import Made, Recipe, Run, UserError, command
from recipe.files import fingerprint, fresh_folder, put_in_place
from recipe.rows import RowWriter

ROLES = ("system", "user", "assistant")
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One checked line: `value` is what the stage writes, `place` its file and line."""

    value: dict[str, Any]
    place: str


def data(recipe: Recipe, run: Run) -> Made:
    """Write `data/train.arrow`, `data/validation.arrow` (recipe.rows) and `data/heldout.jsonl` below the run folder.

    Raises:
        UserError: every problem of every file, each with file and line.
    """
    problems: list[str] = []
    rows = [row for name in recipe.data.train for row in read(Path(name), conversation, problems)]
    questions = read(Path(recipe.data.heldout), question, problems) if recipe.data.heldout else []
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        raise UserError(*problems[:PROBLEMS_SHOWN], *([f"and {more} more problems like these"] if more > 0 else []))
    validation, train = split(rows, recipe.data.validation, recipe.seed)

    parts = {"train": train, "validation": validation, "heldout": questions}
    folder = fresh_folder(run.path(".data.tmp"))
    for name in ("train", "validation"):
        with RowWriter(folder / f"{name}.arrow") as writer:
            for row in parts[name]:
                writer.add(json.dumps(row.value, ensure_ascii=False), row.place)
    lines = [json.dumps(row.value | {"source": row.place}, ensure_ascii=False) + "\n" for row in questions]
    (folder / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    put_in_place(folder, run.path("data"))

    sources = [*recipe.data.train, *([recipe.data.heldout] if recipe.data.heldout else [])]
    return Made(
        outputs=[run.path("data")],
        metrics={name: len(part) for name, part in parts.items()} | {"duplicates": _duplicates(rows)},
        inputs={name: fingerprint(Path(name)) for name in sources},
    )


def read(path: Path, check: Callable[[Any], dict[str, Any]], problems: list[str]) -> list[Row]:
    """Rows of a JSONL file that pass `check`; what is wrong is appended to `problems` with file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        problems.append(f"{path}: no such file: correct the path in the recipe's `data` section")
        return []
    except IsADirectoryError:
        problems.append(f"{path}: is a folder: name the JSONL file(s) in it")
        return []
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}): correct the path or the file's permissions")
        return []
    rows, problems_before = [], len(problems)
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
            if text:
                rows.append(Row(check(json.loads(text)), place))
        except UnicodeDecodeError as error:
            problems.append(f"{place}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8")
        except json.JSONDecodeError as error:
            problems.append(f"{place}: not JSON at column {error.colno} ({error.msg}): write one JSON object a line")
        except RecursionError:
            problems.append(f"{place}: nested too deeply: a row is an object with a list `messages`")
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if not rows and len(problems) == problems_before:
        problems.append(f"{path}: is empty: write one conversation a line")
    return rows


def conversation(row: Any) -> dict[str, Any]:
    """The checked messages of a row, up to the last turn of the assistant.

    Raises:
        ValueError: what is wrong with the row.
    """
    messages = _messages(row)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("no turn of role 'assistant': there is nothing to learn from it, add the answer")
    return {"messages": messages[: turns[-1] + 1]}


def question(row: Any) -> dict[str, Any]:
    """The checked messages of a held-out row, which end with a question, its reference answer and key facts.

    Raises:
        ValueError: what is wrong with the row.
    """
    messages = _messages(row)
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with role {messages[-1]['role']!r}: a held-out row ends with the user's question")
    facts = row.get("facts")
    if not isinstance(facts, list) or not facts or not all(isinstance(fact, str) and fact.strip() for fact in facts):
        raise ValueError("'facts' must be a list of strings that a right answer contains, like [\"make serve\"]")
    answer = row.get("answer", "")
    if not isinstance(answer, str):
        raise ValueError("'answer' must be text")
    if any(map(_has_broken_surrogate, [answer, *facts])):
        raise ValueError("'facts' or 'answer' has a broken surrogate pair (a cut emoji): mend it")
    return {"messages": messages, "answer": answer, "facts": facts}


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


def _messages(row: Any) -> list[dict[str, str]]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError('not a conversation: a row is {"messages": [{"role": ..., "content": ...}, ...]}')
    if not row["messages"]:
        raise ValueError("'messages' is empty: write the turns of the conversation")
    checked = []
    for index, message in enumerate(row["messages"]):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is not an object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{index}]: unknown role {role!r}: choose one of: {', '.join(ROLES)}")
        if role == "system" and index > 0:
            raise ValueError(f"messages[{index}]: role 'system' must be the first message")
        if not isinstance(content, str):
            raise ValueError(f"messages[{index}]: 'content' must be text, it is {type(content).__name__}")
        if not content.strip() and role != "system":
            raise ValueError(f"messages[{index}]: 'content' of role {role!r} is empty")
        if _has_broken_surrogate(content):
            raise ValueError(f"messages[{index}]: 'content' has a broken surrogate pair (a cut emoji): mend it")
        checked.append({"role": role, "content": content})
    return checked


def _has_broken_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _duplicates(rows: list[Row]) -> int:
    return len(rows) - len({json.dumps(row.value, sort_keys=True) for row in rows})


if __name__ == "__main__":
    command("data", data)
