"""The row that each format makes of a record: every function takes (record, changes) and returns a row's value.

They raise ValueError for what is wrong with the record, and Rejection for what nothing can be learned from.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from train.reading.calls import parsed
from train.reading.row import Rejection
from train.reading.transcripts import glaive_system, glaive_turns, human_assistant, is_human_assistant
from train.reading.turns import Changes, as_turns, conversation, text

Record = Mapping[str, Any]
Value = dict[str, Any]
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
# Columns of a question and of its answer, where a set has just one of each.
QUESTIONS = ("prompt", "question", "query", "input", "inputs", "problem", "user", "human")
ANSWERS = ("completion", "response", "answer", "output", "targets", "solution", "assistant")
CONTEXTS = ("input", "context")
LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
OTHER_OPENING = "worse answers to another opening left out"


def talk(record: Record, changes: Changes) -> Value:
    """A column of turns, of OpenAI's or ShareGPT's spelling."""
    return _whole(record, first(record, TURNS), changes)


def bare(record: Any, changes: Changes) -> Value:
    """A record that is itself the list of turns."""
    return conversation(record, changes)


def instruction(record: Record, changes: Changes) -> Value:
    """Alpaca and Dolly: the input, or context, follows the instruction after an empty line."""
    asked = [text(record.get(name), f"'{name}'") for name in ("instruction", *CONTEXTS)]
    question = "\n\n".join(part for part in asked if part.strip())
    history = record.get("history") or []
    history = parsed(history, "'history'") if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    turns = [turn for pair in history for turn in _exchange(*pair)]
    return _whole(record, turns + _exchange(question, first(record, ANSWERS)), changes)


def question(record: Record, changes: Changes) -> Value:
    """A question and its answer, each a text or a list of turns."""
    asked, answer = _turns(first(record, QUESTIONS), "user"), _turns(first(record, ANSWERS), "assistant")
    return _whole(record, asked + answer, changes)


def judged(record: Record, changes: Changes) -> Value:
    """KTO: an answer, and whether it is a good one."""
    value = talk(record, changes) if set(TURNS) & record.keys() else question(record, changes)
    return value | {"label": label(record)}


def preference(record: Record, changes: Changes) -> Value:
    """A better and a worse answer to what stands in a column of its own or opens both.

    Where they do not answer the same, only the better one stays.
    """
    asked = first(record, (*TURNS, *QUESTIONS, "instruction"))
    pair = {name: _opened(record[name], asked) for name in ("chosen", "rejected")}
    if all(isinstance(said, str) for said in pair.values()):  # a continuation of nothing
        return plain({"text": pair["chosen"]}, changes) | {"rejected": text(pair["rejected"], "'rejected'")}
    better = _whole(record, pair["chosen"], changes)
    worse = _whole(record, pair["rejected"], Counter())["messages"]
    if better["messages"][:-1] != worse[:-1]:
        changes[OTHER_OPENING] += 1
        return better
    return better | {"rejected": worse}


def plain(record: Record, changes: Changes) -> Value:
    """Text that is learned as it stands."""
    if not (content := text(record["text"], "'text'")).strip():
        raise Rejection("an empty text")
    return {"text": content}


def glaive(record: Record, changes: Changes) -> Value:
    """Glaive's function calling: the tools stand in the system prompt, the turns in one text."""
    system, tools = glaive_system(text(record["system"], "'system'"))
    turns = glaive_turns(text(record["chat"], "'chat'"))
    return conversation(turns, changes, tools, system)


def first(record: Record, names: tuple[str, ...]) -> Any:
    """The first of these columns that is not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def label(record: Record) -> bool | None:
    """Whether the record is labelled as good or bad, in any spelling of true and false."""
    given = record.get("label", record.get("kto_tag"))
    given = given.strip().lower() if isinstance(given, str) else given
    return LABELS.get(given) if isinstance(given, bool | int | str) else None


def is_written_list(value: Any) -> bool:
    """Whether it is a list as JSON text, as in a table's cell."""
    return isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")


def _whole(record: Record, turns: Any, changes: Changes) -> Value:
    """The conversation with the record's system prompt and tools."""
    tools, system = first(record, ("tools", "functions")), first(record, ("system", "system_prompt"))
    return conversation(turns, changes, tools, system)


def _exchange(asked: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _turns(given: Any, role: str) -> list[Any]:
    """Turns of a list of them, of a single one, or of a text, which is a turn of that role."""
    if is_written_list(given):
        try:
            given = as_turns(given)
        except ValueError:
            return [{"role": role, "content": given}]  # a text that only looks like a list
    if isinstance(given, list) and given and isinstance(given[0], dict) and "type" not in given[0]:
        return given
    return [given if isinstance(given, dict) else {"role": role, "content": given}]


def _opened(said: Any, asked: Any) -> Any:
    """The turns of the question and this answer to it; the answer's text where there is no question at all."""
    if said is None or said in ("", []):
        raise Rejection("'chosen' or 'rejected' is empty")
    if asked is None and isinstance(said, str) and not is_written_list(said):
        return human_assistant(said) if is_human_assistant(said) else said
    if is_human_assistant(asked) and isinstance(said, str):
        return human_assistant(
            f"{asked.removesuffix(' ').removesuffix('Assistant:').rstrip()}\n\nAssistant: {said.strip()}"
        )
    turns = _turns(said, "assistant")
    speakers = {turn.get("role") or turn.get("from") for turn in turns if isinstance(turn, dict)}
    return turns if asked is None or speakers & {"user", "human"} else _turns(asked, "user") + turns
