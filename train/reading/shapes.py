"""The row that each format makes of a record: every function takes (record, changes) and returns a row's value.

They raise ValueError for what is wrong with the record, and Rejection for what nothing can be learned from.
"""

from collections import Counter
from contextlib import suppress
from typing import Any

from train.reading.exports import (
    RENDERED,
    baize_turns,
    glaive_system,
    glaive_turns,
    human_assistant,
    is_human_assistant,
)
from train.reading.row import (
    ANSWERS,
    CHOICES,
    CONTEXTS,
    PAIRS,
    QUESTIONS,
    SPEAKERS,
    SYSTEMS,
    TRUTHS,
    TURNS,
    Record,
    Rejection,
    columns_of_turns,
    first,
    is_exchange,
    is_written_list,
    label,
)
from train.reading.turns import LEARNED, MASKED, Changes, as_turns, conversation, parsed, text, thought_of, without_end

Value = dict[str, Any]
MARKS_WITHIN = 2000  # characters
OTHER_OPENING = "worse answers to another opening left out"
WEIGHTED = "weights of rows not used, which data.weights gives to files"
OTHER_ANSWERS = "further answers to one question left out"
LOOKS_RENDERED = "texts that look like conversations in some template learned whole, questions too"


def talk(record: Record, changes: Changes) -> Value:
    """A column of turns, of OpenAI's or ShareGPT's spelling, of exchanges, or of texts that alternate."""
    name = next(iter(columns_of_turns(record)), None)
    given = as_turns(record[name] if name else first(record, TURNS))
    if all(isinstance(said, str) for said in given):
        given = _alternating(given, record.get("speakers"))
    elif is_exchange(given[0]):
        given = [one for turn in given for one in _exchanged(turn)]
    return _whole(record, given, changes)


def _alternating(said: list[str], speakers: Any) -> list[Any]:
    """Turns of plain texts: the user begins; SODA names who speaks."""
    if not isinstance(speakers, list) or len(speakers) != len(said):
        speakers = [at % 2 for at in range(len(said))]
    names = list(dict.fromkeys(speakers))
    if len(names) > 2:
        raise Rejection("more than two speak")
    roles = dict(zip(names, ("user", "assistant"), strict=False))
    return [{"role": roles[speaker], "content": words} for speaker, words in zip(speakers, said, strict=True)]


def _exchanged(turn: Any) -> list[Any]:
    if not is_exchange(turn):
        return [turn]
    system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
    return system + _exchange(first(turn, QUESTIONS), first(turn, ANSWERS))


def bare(record: Any, changes: Changes) -> Value:
    """A record that is itself the list of turns."""
    return conversation(record, changes)


def question(record: Record, changes: Changes) -> Value:
    """A question and its answer, each a text or a list of turns; an input, or context, follows after an empty line."""
    if chosen := [name for name in CHOICES if record.get(name)]:
        raise ValueError(f"has {chosen[0]!r}, which no format has a place for: write the choices into the question")
    name = next((name for name in ("instruction", *QUESTIONS) if record.get(name) is not None), "")
    asked = record.get(name)
    more = [text(record[part], f"'{part}'") for part in CONTEXTS if part != name and record.get(part)]
    if isinstance(asked, str) and not is_written_list(asked):
        asked = "\n\n".join(part for part in (text(asked, f"'{name}'"), *more) if part.strip())
    elif any(map(str.strip, more)):
        raise ValueError(f"has turns in {name!r} and a context beside them: write the context into a turn")
    answer = _turns(_answer(record, changes), "assistant")
    if thought := thought_of(record, "", changes):
        answer = [*answer[:-1], answer[-1] | {"reasoning_content": thought}]
    return _whole(record, _history(record) + _turns(asked, "user") + answer, changes)


def _history(record: Record) -> list[Any]:
    history = record.get("history") or []
    history = parsed(history, "'history'") if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    return [turn for pair in history for turn in _exchange(*pair)]


def _answer(record: Record, changes: Changes) -> Any:
    """The answer; of SQuAD's several the first."""
    if "answers" not in record:
        return first(record, ANSWERS)
    answers = record["answers"]
    said = answers["text"] if isinstance(answers, dict) else [answer.get("text") for answer in answers]
    if not said:
        raise Rejection("no answer: the context has none")
    if len(set(said)) > 1:
        changes[OTHER_ANSWERS] += 1
    return said[0]


def calls(record: Record, changes: Changes) -> Value:
    """xLAM: a question, the tools, and the calls that answer it."""
    called = {"role": "assistant", "content": "", "tool_calls": record["answers"]}
    return _whole(record, [*_turns(first(record, QUESTIONS), "user"), called], changes)


def judged(record: Record, changes: Changes) -> Value:
    """KTO: an answer, and whether it is a good one."""
    value = talk(record, changes) if columns_of_turns(record) else question(record, changes)
    return value | {"label": label(record)}


def preference(record: Record, changes: Changes) -> Value:
    """A better and a worse answer to what stands in a column of its own or opens both.

    Where they do not answer the same, only the better one stays.
    """
    if isinstance(record.get("input"), dict) and "messages" in record["input"]:  # OpenAI's own, with the tools in it
        record = {**record, "input": None, **record["input"]}
    asked = first(record, (*columns_of_turns(record), *QUESTIONS, "instruction"))
    better_and_worse = next(names for names in PAIRS if set(names) <= record.keys())
    pair = dict(zip(("chosen", "rejected"), (_opened(record[name], asked) for name in better_and_worse), strict=True))
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
    name = "text" if "text" in record else "content"
    content = text(record[name], f"'{name}'")
    if RENDERED.search(content, 0, MARKS_WITHIN):
        changes[LOOKS_RENDERED] += 1
    else:
        content = without_end(content, changes)
    if not content.strip():
        raise Rejection("an empty text")
    return {"text": content}


def baize(record: Record, changes: Changes) -> Value:
    """Baize: the turns stand in one text."""
    return conversation(baize_turns(record["input"]), changes)


def glaive(record: Record, changes: Changes) -> Value:
    """Glaive's function calling: the tools stand in the system prompt, the turns in one text."""
    system, tools = glaive_system(text(record["system"], "'system'"))
    turns = glaive_turns(text(record["chat"], "'chat'"))
    return conversation(turns, changes, tools, system)


def _whole(record: Record, turns: Any, changes: Changes) -> Value:
    """The conversation with the record's system prompt and tools.

    Raises:
        Rejection: the whole record is marked as not to be learned.
    """
    for key in (*LEARNED, *MASKED):
        if record.get(key) is not None and TRUTHS.get(str(record[key]).strip().lower()) is (key in MASKED):
            raise Rejection(f"marked as not to be learned: {key!r} is {record[key]!r}")
    if str(record.get("weight", "1")) not in TRUTHS and record["weight"] is not None:
        changes[WEIGHTED] += 1
    tools, system = first(record, ("tools", "functions")), first(record, SYSTEMS)
    system = system.get("parts", system.get("content")) if isinstance(system, dict) else system
    return conversation(turns, changes, tools, system)


def _exchange(asked: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _turns(given: Any, role: str) -> list[Any]:
    """Turns of a list of them, of a single one, or of a text, which is a turn of that role."""
    said = given
    if is_written_list(given):
        with suppress(ValueError):  # else a text that only looks like a list
            said = parsed(given, "")
    if isinstance(said, list) and said and isinstance(said[0], dict) and set(SPEAKERS) & said[0].keys():
        return said
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
