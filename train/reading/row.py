"""One row of training data: its place, its texts, why one does not become a row, and the columns of public sets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from pipeline.recipe import Columns

PROBLEMS_SHOWN, ALIKE_SHOWN = 20, 3
Record = Mapping[str, Any]
Names = tuple[tuple[str, str], ...]  # (name that formats know, name of a column here)
COLUMNS = {"prompt": "prompt", "answer": "completion", "reasoning": "reasoning_content"}
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "contents", "turns", "data")
# Columns of a question and of its answer, where a set has just one of each.
QUESTIONS = ("prompt", "question", "query", "input", "inputs", "text_input", "problem", "user", "human")
ANSWERS = ("completion", "response", "answer", "output", "target", "targets", "solution", "assistant")
CONTEXTS = ("input", "context")
# Columns of a better and a worse answer.
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
)
SPEAKERS = ("role", "from", "speaker")
REASONING = ("reasoning_content", "reasoning", "thinking", "complex_cot")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
SYSTEMS = ("system", "system_prompt", "system_instruction", "systeminstruction")
CHOICES = ("choices", "options")
OTHERS = ("instruction", "context", "history", "tools", "answers", "text", "label")
KNOWN = frozenset((*QUESTIONS, *ANSWERS, *TURNS, *SYSTEMS, *MEDIA, *CHOICES, *REASONING, *OTHERS)).union(*PAIRS)
Change = Callable[[str], str]
# Patterns, to be compiled with re.DOTALL; a fence that nothing closes goes to the end.
FENCED = r"```.*?(?:```|\Z)"
CODE = FENCED + r"|`[^`\n]+`"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
PLAIN = ("text", "rejected")  # of a row without turns, both are texts
WRITTEN = ("content", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Row:
    """What the data stage writes, and `file:line` (of a table: `file:row`) where it comes from.

    `value` is one of
    - a conversation `{"messages": [...]}` with `tools` where given. It ends with an assistant's turn. A message has
      `role` (system, user, assistant, tool), `content` (text, possibly empty) and where given `reasoning_content`,
      `tool_calls` (OpenAI's form with `arguments` as an object), `tool_call_id`, `name`, and of what is not to be
      learned `weight` 0 for a whole answer, or `only_read`, [from, to) of characters of its content;
    - a preference pair, with `rejected` beside `messages`: the same opening with the worse answer;
    - a judged answer, with `label` beside `messages`: whether it is a good one;
    - plain text `{"text": ...}`, of a pair without a prompt with `rejected`, the worse text.
    """

    value: dict[str, Any]
    place: str


class Rejection(Exception):
    """Why a row is left out: it is not wrong, only of no use. It goes to `rejected.jsonl` and is counted."""

    def __init__(self, reason: str, step: str = "format") -> None:
        super().__init__(reason, step)
        self.reason = reason
        self.step = step

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is left out: `value` as it was read."""

    value: Any
    place: str
    rejection: Rejection


class Problem(NamedTuple):
    """What is wrong with a file or a line of it, and what fixes it; the user has to."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def told(problems: Sequence[Problem | str]) -> list[str]:
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


def named_columns(columns: Columns) -> Names:
    """The names that a recipe gives to columns, each with the one that formats know."""
    given = {name: getattr(columns, name) for name in vars(columns) if getattr(columns, name)}
    return tuple((COLUMNS.get(name, name), column) for name, column in given.items())


def renamed(record: Record, names: Names) -> Record:
    """The record with those of its columns that the recipe names, and no others; as it is if it has none of them.

    Raises:
        ValueError: it has an answer without its prompt, or the other way round.
    """
    found = {known: record[name] for known, name in names if name in record}
    missing = [name for known, name in names if known in ("prompt", "completion") and name not in record]
    if found and missing:
        raise ValueError(f"has no column {missing[0]!r}, which data.columns names: its columns are {', '.join(record)}")
    return found or record


def spread(record: Any, names: Names = ()) -> Iterator[Any]:
    """The rows of a record that holds several: Self-Instruct's `instances`, SQuAD's `paragraphs`; else itself.

    Names of columns in capitals are read as if they were not.

    Raises:
        ValueError: it has not the columns that the recipe names (`renamed`).
    """
    if not isinstance(record, dict):
        yield record
        return
    record = renamed(record, names) if names else record
    if not "".join(record).islower():
        lowered = {name: name.strip().lower() for name in record if name not in KNOWN}
        if any(name in KNOWN and name not in record for name in lowered.values()):
            record = {lowered.get(name, name): value for name, value in record.items()}
    if "instruction" in record and are_objects(record.get("instances")):
        yield from ({"instruction": record["instruction"]} | instance for instance in record["instances"])
    elif are_objects(record.get("paragraphs")) and all(are_objects(one.get("qas")) for one in record["paragraphs"]):
        for paragraph in record["paragraphs"]:
            yield from ({"context": paragraph.get("context")} | asked for asked in paragraph["qas"])
    else:
        yield record


def require_words(record: Any) -> None:
    """Raises a Rejection if the record is about a picture, film or sound."""
    if isinstance(record, dict) and (media := [name for name in MEDIA if record.get(name)]):
        raise Rejection(f"has {media[0]!r}: only text is learned")


def require_kind(value: dict[str, Any], rows: str) -> None:
    """Raises a Rejection if a method that learns from such `rows` (pipeline.methods) can learn nothing of this one."""
    if rows == "chat":
        if value.get("label") is False:
            raise Rejection("labelled as a bad answer", "label")
        return
    if "messages" not in value:
        raise Rejection("has no prompt, only texts: write the question into 'prompt'", rows)
    if rows == "judged":
        if value.get("label") is None:
            raise Rejection("has no 'label' that says whether its answer is a good one (true, false)", rows)
        return
    if "rejected" not in value:
        raise Rejection("is no pair of a better and a worse answer ('chosen', 'rejected') to the same question", rows)
    better, worse = value["messages"][-1], value["rejected"][-1]
    for name, answer in (("chosen", better), ("rejected", worse)):
        if is_empty(answer):
            raise Rejection(f"the {name} answer is empty", rows)
    if {**better, "content": better["content"].strip()} == {**worse, "content": worse["content"].strip()}:
        raise Rejection("the chosen and the rejected answer are equal", rows)


def is_empty(message: dict[str, Any]) -> bool:
    """Whether a turn of the user or the assistant says and calls nothing."""
    if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
        return False
    return not message["content"].strip().strip(INVISIBLE)


def columns_of_turns(record: Record) -> list[str]:
    """The columns that hold a list of turns, also as JSON text."""
    return [name for name in TURNS if name in record and _holds_turns(name, record[name])]


def _holds_turns(name: str, value: Any) -> bool:
    if name in ("turns", "data"):  # also names of other lists, MT-bench's of questions alone
        kind = str if name == "data" else dict
        return isinstance(value, list) and bool(value) and isinstance(value[0], kind)
    return isinstance(value, list) or is_written_list(value)


def is_exchange(turn: Any) -> bool:
    """Whether it is a question with its answer, such as {"human": ..., "assistant": ...}."""
    if not isinstance(turn, dict) or set(SPEAKERS) & turn.keys():
        return False
    return [sum(name in turn for name in names) for names in (QUESTIONS, ANSWERS)] == [1, 1]


def first(record: Record, names: tuple[str, ...]) -> Any:
    """The first of these columns that is not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def label(record: Record) -> bool | None:
    """Whether the record is labelled as good or bad, in any spelling of true and false."""
    return TRUTHS.get(str(record.get("label", record.get("kto_tag"))).strip().lower())


def is_written_list(value: Any) -> bool:
    """Whether it is a list as JSON text, as in a table's cell."""
    return isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")


def are_objects(value: Any) -> bool:
    """Whether it is a list of at least one object, and of nothing else."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def texts(value: dict[str, Any]) -> Iterator[str]:
    """Every written text of a row, in order: contents, reasoning, the arguments of tool calls, a rejected answer."""
    yield from (value[part] for part in PLAIN if isinstance(value.get(part), str))
    for message in (message for part in _parts(value) for message in value[part]):
        yield from (message[key] for key in WRITTEN if isinstance(message.get(key), str))
        for call in message.get("tool_calls") or ():
            yield from _strings(call.get("function", {}).get("arguments"))


def changed(value: dict[str, Any], change: Change) -> dict[str, Any]:
    """The row with `change` applied to each of those texts; roles, names, ids and the tools' schemas stay."""
    new = value | {part: [_message(message, change) for message in value[part]] for part in _parts(value)}
    return new | {part: change(value[part]) for part in PLAIN if isinstance(value.get(part), str)}


def _parts(value: dict[str, Any]) -> list[str]:
    return [part for part in ("messages", "rejected") if isinstance(value.get(part), list)]


def _message(message: dict[str, Any], change: Change) -> dict[str, Any]:
    new = message | {key: change(message[key]) for key in WRITTEN if isinstance(message.get(key), str)}
    if "only_read" in message and new["content"] != message["content"]:
        new["only_read"] = _moved(message, new["content"], change)
    if message.get("tool_calls"):
        new["tool_calls"] = [_call(call, change) for call in message["tool_calls"]]
    return new


def _moved(message: dict[str, Any], new: str, change: Change) -> list[list[int]]:
    """Where the characters that are only read stand in the changed content.

    Raises:
        Rejection: a change reaches over the bounds of what is learned.
    """
    bounds = [0, *(place for span in message["only_read"] for place in span), len(message["content"])]
    pieces = [change(message["content"][start:end]) for start, end in pairwise(bounds)]
    if "".join(pieces) != new:
        raise Rejection("cleaning would change it across the bounds of what is learned")
    places = list(accumulate(map(len, pieces)))
    return [[start, end] for start, end in zip(places[::2], places[1::2], strict=False)]


def _call(call: dict[str, Any], change: Change) -> dict[str, Any]:
    function = call.get("function", {})
    if "arguments" not in function:
        return call
    return call | {"function": function | {"arguments": _nested(function["arguments"], change)}}


def _nested(value: Any, change: Change) -> Any:
    if isinstance(value, dict):
        return {key: _nested(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_nested(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
