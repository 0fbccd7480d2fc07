"""Which format a record has, told by its columns and what they hold, and the rows of a source in that format."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipe import UserError
from train.reading import exports, shapes
from train.reading.chunks import Chunk, records
from train.reading.row import Problem, Rejected, Rejection, Row, told
from train.reading.shapes import ANSWERS, QUESTIONS, TURNS, first, is_written_list, label
from train.reading.sources import Source, chunks
from train.reading.turns import Changes

Record = Mapping[str, Any]
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
SHAREGPT = Format("ShareGPT", "conversations [system, tools]", shapes.talk)
ALPACA = Format("Alpaca", "instruction, output [input, history, system]", shapes.instruction)
DOLLY = Format("Dolly", "instruction, response [context]", shapes.instruction)
PROMPT = Format("prompt and completion", "prompt, completion [system]", shapes.question)
QUESTION = Format("question and answer", "question, answer [system]", shapes.question)
PREFERENCE = Format("preference pairs", "chosen, rejected [prompt]", shapes.preference)
KTO = Format("KTO", "prompt, completion, label", shapes.judged)
TEXT = Format("plain text", "text", shapes.plain)
GLAIVE = Format("Glaive function calling", "system, chat", shapes.glaive)
OASST = Format("OpenAssistant messages", "message_id, parent_id, text, role", exports.oasst)
OASST_TREE = Format("OpenAssistant trees", "prompt with replies", exports.oasst)
CHATGPT = Format("ChatGPT export", "mapping", exports.chatgpt)
OPEN_WEBUI = Format("Open WebUI export", "chat", exports.open_webui)
CLAUDE = Format("Claude export", "chat_messages", exports.claude)
EXPECTED = "name them (of a table: in its first line) as one of: " + "; ".join(
    format.columns for format in (MESSAGES, SHAREGPT, ALPACA, DOLLY, PROMPT, QUESTION, PREFERENCE, KTO, TEXT)
)


@dataclass(frozen=True)
class Detected:
    """The format of a source, the columns that it was seen by, and where."""

    format: Format
    columns: tuple[str, ...]
    place: str


@dataclass
class Read:
    """What a chunk gives: rows, rows left out, what is wrong, and how often normalisation did what."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    changes: Changes = field(default_factory=Counter)


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
                return Detected(format_of(record), columns, place)
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
    for number, tree in exports.trees(every):
        yield Chunk(source.name, number, [(number, tree)])


def numbered(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(line or row, record) of a chunk."""
    for place, record in records(chunk):
        yield int(place.rpartition(":")[2]), record


def rows(detected: Detected, chunk: Chunk) -> Read:
    """The rows of a chunk, each checked to be of the source's format."""
    read = Read()
    format = OASST_TREE if detected.format == OASST else detected.format
    strangers: set[str] = set()
    for place, record in records(chunk):
        try:
            if isinstance(record, Problem):
                read.problems.append(record)
                continue
            own = format_of(record)
            if own != format:
                if own.name not in strangers:
                    strangers.add(own.name)
                    read.problems.append(Problem(place, _mixed(own, detected)))
                continue
            value = format.value(record, read.changes)
            if value.get("label") is False:
                raise Rejection("labelled as a bad answer", "label")
            read.rows.append(Row(value, place))
        except Rejection as rejection:
            read.rejected.append(Rejected(record, place, rejection))
        except RecursionError:
            read.problems.append(Problem(place, "nested too deeply: a row is an object of a few levels"))
        except ValueError as error:
            read.problems.append(Problem(place, str(error)))
    return read


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
    if set(TURNS) & record.keys():  # null, or of another type: the conversion tells
        return MESSAGES
    if "text" in record:
        return TEXT
    names = [str(column)[:40] for column in record]
    more = [f"{len(names) - COLUMNS_TOLD} more"] if len(names) > COLUMNS_TOLD else []
    columns = ", ".join(names[:COLUMNS_TOLD] + more) or "(none)"
    raise ValueError(f"no format has the columns {columns}: {EXPECTED}")


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
    return GLAIVE if {"system", "chat"} <= record.keys() and isinstance(record["chat"], str) else None


def _conversation(record: Record) -> Format | None:
    """Formats with a column of turns, or two; other columns beside them, such as a prompt, only repeat."""
    if {"chosen", "rejected"} <= record.keys():
        return PREFERENCE
    turns = [name for name in TURNS if isinstance(record.get(name), list) or is_written_list(record.get(name))]
    if len(turns) > 1:
        raise ValueError(f"has turns in {' and in '.join(turns)}: keep one of these columns")
    if not turns:
        return None
    if label(record) is not None:
        return KTO
    start = first(record, TURNS)[0] if isinstance(first(record, TURNS), list) and first(record, TURNS) else None
    return SHAREGPT if isinstance(start, dict) and start.get("role") is None and "from" in start else MESSAGES


def _pair(record: Record) -> Format | None:
    """Formats with a column of the question and one of the answer."""
    answers = [name for name in ANSWERS if name in record]
    if "instruction" in record and answers:
        _one_of(("instruction",), answers)
        return DOLLY if answers == ["response"] else ALPACA
    questions = [name for name in QUESTIONS if name in record]
    if not questions or not answers:
        return None
    _one_of(questions, answers)
    if label(record) is not None:
        return KTO
    return PROMPT if questions == ["prompt"] else QUESTION


def _one_of(questions: tuple[str, ...] | list[str], answers: list[str]) -> None:
    if len(questions) * len(answers) > 1:
        raise ValueError(
            f"can be read in several ways (question: {' or '.join(questions)}; answer: {' or '.join(answers)}): "
            "keep one column of each"
        )


def _mixed(own: Format, detected: Detected) -> str:
    return f"is {own.name}, but {detected.place} is {detected.format.name}: put each format in a file of its own"
