"""Which format a record has, told by its columns and what they hold, and the rows of a source in that format."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline import UserError
from train.reading import shapes
from train.reading.chunks import Chunk, records
from train.reading.row import (
    ANSWERS,
    PAIRS,
    QUESTIONS,
    Names,
    Problem,
    Record,
    Rejected,
    Rejection,
    Row,
    are_objects,
    columns_of_turns,
    is_exchange,
    label,
    require_kind,
    require_words,
    spread,
    told,
)
from train.reading.sources import Source, chunks
from train.reading.turns import Changes

RECORDS_TRIED = 1000
COLUMNS_TOLD = 12


@dataclass(frozen=True)
class Format:
    """A format: its name, the columns that tell it, and what makes a row's value of a record."""

    name: str
    columns: str
    value: Callable[[Any, Changes], dict[str, Any]]


MESSAGES = Format("OpenAI messages", "messages [tools]", shapes.talk)
LISTS = Format("lists of messages", "", shapes.bare)
EXCHANGES = Format("lists of exchanges", "conversation of input and output", shapes.talk)
GEMINI = Format("Gemini", "contents [systemInstruction]", shapes.talk)
DIALOGUE = Format("dialogues", "turns of speaker and utterance", shapes.talk)
ALTERNATING = Format("lists of texts", "conversations of texts that alternate", shapes.talk)
SHAREGPT = Format("ShareGPT", "conversations [system, tools]", shapes.talk)
ALPACA = Format("Alpaca", "instruction, output [input, history, system]", shapes.question)
DOLLY = Format("Dolly", "instruction, response [context]", shapes.question)
PROMPT = Format("prompt and completion", "prompt, completion [system]", shapes.question)
QUESTION = Format("question and answer", "question, answer [system]", shapes.question)
SQUAD = Format("SQuAD", "question, context, answers", shapes.question)
XLAM = Format("function calls", "query, tools, answers", shapes.calls)
PREFERENCE = Format("preference pairs", "chosen, rejected [prompt]", shapes.preference)
KTO = Format("KTO", "prompt, completion, label", shapes.judged)
TEXT = Format("plain text", "text", shapes.plain)
BAIZE = Format("Baize", "input", shapes.baize)
GLAIVE = Format("Glaive function calling", "system, chat", shapes.glaive)
OASST = Format("OpenAssistant messages", "message_id, parent_id, text, role", shapes.oasst)
OASST_TREE = Format("OpenAssistant trees", "prompt with replies", shapes.oasst)
CHATGPT = Format("ChatGPT export", "mapping", shapes.chatgpt)
OPEN_WEBUI = Format("Open WebUI export", "chat", shapes.open_webui)
CLAUDE = Format("Claude export", "chat_messages", shapes.claude)
EXPECTED = "name them (of a table: in its first line) as one of: " + "; ".join(
    format.columns for format in (MESSAGES, SHAREGPT, ALPACA, DOLLY, PROMPT, QUESTION, PREFERENCE, KTO, TEXT)
)


@dataclass(frozen=True)
class Detected:
    """The format of a source, the columns that it was seen by, and where."""

    format: Format
    columns: tuple[str, ...]
    place: str
    names: Names = ()


@dataclass
class Read:
    """What a chunk gives: rows, rows left out, what is wrong, and how often normalisation did what."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    changes: Changes = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)  # columns of data.columns that were there


def detect(source: Source) -> Detected:
    """The format of the source's first record that has one.

    Raises:
        UserError: none of the first thousand has, or the source cannot be read.
    """
    problems: list[Problem] = []
    for chunk in chunks(source):
        for place, record in records(chunk):
            try:
                if isinstance(record, Problem):
                    raise ValueError(record.text)
                columns = tuple(map(str, record)) if isinstance(record, dict) else ()
                return Detected(format_of(next(spread(record, source.columns))), columns, place, source.columns)
            except ValueError as error:
                problems.append(Problem(place, str(error)))
        if len(problems) >= RECORDS_TRIED:
            break
    raise UserError(*(told(problems) or [f"{source.name}: is empty: write one conversation a line"]))


def whole_chunks(source: Source, format: Format) -> Iterator[Chunk]:
    """The source's chunks, in which a record is a whole conversation: OpenAssistant's messages become trees."""
    if format != OASST:
        yield from chunks(source)
        return
    every = (pair for chunk in chunks(source) for pair in numbered(chunk))
    for number, tree in shapes.trees(every):
        yield Chunk(source.name, number, [(number, tree)])


def numbered(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(line or row, record) of a chunk."""
    for place, record in records(chunk):
        yield int(place.rpartition(":")[2]), record


def rows(detected: Detected, chunk: Chunk, wanted: str = "chat") -> Read:
    """The rows of a chunk, each checked to be of the source's format and of a `wanted` kind (pipeline.methods)."""
    read = Read()
    format = OASST_TREE if detected.format == OASST else detected.format
    strangers: set[str] = set()
    for place, record in _spread(chunk, detected, read):
        try:
            own = format_of(record)
            if own != format:
                if own.name not in strangers:
                    strangers.add(own.name)
                    read.problems.append(Problem(place, _mixed(own, detected)))
                continue
            require_words(record)
            value = format.value(record, read.changes)
            require_kind(value, wanted)
            read.rows.append(Row(value, place))
        except Rejection as rejection:
            read.rejected.append(Rejected(record, place, rejection))
        except RecursionError:
            read.problems.append(Problem(place, "nested too deeply: a row is an object of a few levels"))
        except ValueError as error:
            read.problems.append(Problem(place, str(error)))
        except (AttributeError, KeyError, TypeError):  # deep inside what no vendor publishes a schema of
            why = f"a part of it is of another type than {format.name} has there: fix the row, or leave it out"
            read.problems.append(Problem(place, why))
    return read


def _spread(chunk: Chunk, detected: Detected, read: Read) -> Iterator[tuple[str, Any]]:
    """(place, record) of each row that the chunk's records hold."""
    for place, whole in records(chunk):
        if isinstance(whole, Problem):
            read.problems.append(whole)
            continue
        try:
            yield from ((place, one) for one in spread(whole, detected.names))
        except ValueError as error:
            read.problems.append(Problem(place, str(error)))
        if detected.names and isinstance(whole, dict):
            read.named.update(name for _, name in detected.names if name in whole)


def format_of(record: Any) -> Format:
    """The format of a record.

    Raises:
        ValueError: no format has its columns, or more than one could be meant.
    """
    if isinstance(record, list):
        return LISTS
    if not isinstance(record, dict):
        raise ValueError(f"not an object with named columns but {type(record).__name__}: {EXPECTED}")
    if found := _export(record) or _conversation(record) or _pair(record):
        return found
    if {"messages", "conversations", "conversation"} & record.keys():  # of another type: the conversion tells
        return MESSAGES
    if {"text", "content"} & record.keys():
        if "role" in record:
            raise ValueError('is one message: write those of a conversation as one row, {"messages": [...]}')
        return TEXT
    if len(record) > 1 and all(isinstance(value, dict) for value in record.values()):
        raise ValueError(f"is an object of {len(record):,} objects: write these as a JSON list")
    names = [str(column)[:40] for column in record]
    more = [f"{len(names) - COLUMNS_TOLD} more"] if len(names) > COLUMNS_TOLD else []
    columns = ", ".join(names[:COLUMNS_TOLD] + more) or "(none)"
    raise ValueError(f"no format has the columns {columns}: {_own_columns(record)}{EXPECTED}")


def _own_columns(record: Record) -> str:
    """The key that names columns of one's own, filled with those that look like question and answer, or like turns."""
    turns = [name for name, value in record.items() if are_objects(value)]
    texts = [name for name, value in record.items() if isinstance(value, str) and value.strip()]
    longest = sorted(texts, key=lambda name: -len(record[name]))[:2]
    names = ("prompt", "answer") if len(longest) == 2 else ("text",)
    found = {"messages": turns[0]} if turns else dict(zip(names, sorted(longest, key=texts.index), strict=False))
    key = yaml.safe_dump({"columns": found}, default_flow_style=True, allow_unicode=True, sort_keys=False, width=1000)
    return f"set in the recipe what they are, as data: {key.strip()}, or " if found else ""


def _export(record: Record) -> Format | None:
    """Formats of chat windows and of collectors, which have columns of their own."""
    if isinstance(record.get("mapping"), dict):
        return CHATGPT
    if isinstance(record.get("chat_messages"), list):
        return CLAUDE
    if isinstance(record.get("chat"), dict) and {"messages", "history"} & record["chat"].keys():
        return OPEN_WEBUI
    if {"message_id", "parent_id", "text", "role"} <= record.keys():
        return OASST
    if isinstance(record.get("prompt"), dict) and "replies" in record["prompt"]:
        return OASST_TREE
    if isinstance(record.get("input"), str) and "[|Human|]" in record["input"]:
        return BAIZE
    return GLAIVE if {"system", "chat"} <= record.keys() and isinstance(record["chat"], str) else None


def _conversation(record: Record) -> Format | None:
    """Formats with a column of turns, or two; other columns beside them, such as a prompt, only repeat."""
    if any(better in record and worse in record for better, worse in PAIRS):
        return PREFERENCE
    turns = columns_of_turns(record)
    if len(turns) > 1:
        raise ValueError(f"has turns in {' and in '.join(turns)}: keep one of these columns")
    if not turns:
        return None
    if label(record) is not None:
        return KTO
    start = next(iter(record[turns[0]]), None) if isinstance(record[turns[0]], list) else None
    if isinstance(start, str) or is_exchange(start):
        return ALTERNATING if isinstance(start, str) else EXCHANGES
    if not isinstance(start, dict) or start.get("role") is not None:
        return GEMINI if isinstance(start, dict) and "parts" in start else MESSAGES
    return SHAREGPT if "from" in start else DIALOGUE if "speaker" in start else MESSAGES


def _pair(record: Record) -> Format | None:
    """Formats with a column of the question and one of the answer."""
    answers, questions = _filled(record, ANSWERS), _filled(record, QUESTIONS)
    if "instruction" in record and answers:
        _one_of(("instruction",), answers)
        return DOLLY if answers == ["response"] else ALPACA
    if len(questions) == 1 and not answers and "answers" in record:
        if "tools" in record:
            return XLAM
        texts = record["answers"]
        return SQUAD if (isinstance(texts, dict) and "text" in texts) or texts == [] or are_objects(texts) else None
    if not questions or not answers:
        return None
    _one_of(questions, answers)
    if label(record) is not None:
        return KTO
    return PROMPT if questions == ["prompt"] else QUESTION


def _filled(record: Record, names: tuple[str, ...]) -> list[str]:
    """Those of the columns that are there and not null; if all are null, those that are there."""
    present = [name for name in names if name in record]
    return [name for name in present if record[name] is not None] or present


def _one_of(questions: tuple[str, ...] | list[str], answers: list[str]) -> None:
    if len(questions) * len(answers) > 1:
        raise ValueError(
            f"can be read in several ways (question: {' or '.join(questions)}; answer: {' or '.join(answers)}): "
            "keep one column of each"
        )


def _mixed(own: Format, detected: Detected) -> str:
    return f"is {own.name}, but {detected.place} is {detected.format.name}: put each format in a file of its own"
