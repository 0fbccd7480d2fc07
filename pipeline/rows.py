"""The conversations that `data` kept, in Arrow files that no stage has to hold in memory.

`train.arrow` and `validation.arrow` are Arrow IPC streams, which `datasets.Dataset.from_file` maps too. They have
`row`, the conversation as JSON text, so that tools of different schemas lie side by side, and `source`, its place.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.error import UserError
from pipeline.machine import at_most

# Marks the assistant's words for transformers alone: training removes it, loaders of GGUF files refuse it.
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
RENDER_SECONDS = 3  # of the processor; the longest conversations take a thousandth
ROLES_SHOWN = 20
ROWS_A_BATCH, BYTES_A_BATCH = 1000, 1 << 22


class RowWriter:
    """Writes batches of rows; the same batches give the same bytes."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.stream = pyarrow.ipc.new_stream(str(path), _schema())
        self.count = 0

    def write(self, batch: Any) -> None:
        """Write a batch of `row_batch`, in pieces that a reader can hold."""
        for piece in pieces(batch):
            self.stream.write_batch(piece)
        self.count += batch.num_rows

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def row_batch(texts: list[str], sources: list[str]) -> Any:
    """Conversations as JSON text and their places, in a batch that is cheap to send to another process."""
    import pyarrow

    return pyarrow.record_batch(
        [pyarrow.array(column, pyarrow.string()) for column in (texts, sources)], schema=_schema()
    )


def pieces(batch: Any) -> Iterator[Any]:
    """A record batch of any columns in slices of so few rows and bytes that they can be held in memory."""
    fitting = BYTES_A_BATCH * batch.num_rows // max(1, batch.nbytes)
    step = min(ROWS_A_BATCH, max(1, fitting))
    for first in range(0, batch.num_rows, step):
        yield batch.slice(first, step)


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema([("row", pyarrow.string()), ("source", pyarrow.string())])


def rows(data: Path, part: str, first: int | None = None) -> Iterator[dict[str, Any]]:
    """The conversations of a part of the data folder, or the `first` of them, with a batch in memory at a time."""
    for batch in batches(data, part):
        for text, source in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if first is not None:
                if first == 0:
                    return
                first -= 1
            yield json.loads(text) | {"source": source}


def batches(data: Path, part: str) -> Iterator[Any]:
    """The record batches of a part, one in memory at a time."""
    import pyarrow

    with pyarrow.OSFile(str(_path(data, part))) as file:
        yield from pyarrow.ipc.open_stream(file)


def count(data: Path, part: str) -> int:
    """How many conversations a part has."""
    return int(_table(data, part).num_rows)


def picked(data: Path, part: str, indexes: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The conversations at these places of a part, in the order of the indexes."""
    table = _table(data, part)
    for index in indexes:
        row = table.slice(index, 1).to_pylist()[0]
        yield json.loads(row["row"]) | {"source": row["source"]}


def row_text(tokenizer: Any, row: dict[str, Any]) -> str:
    """A conversation, or plain text, as training read it."""
    return str(row["text"]) if "text" in row else rendered(tokenizer, row["messages"], row.get("tools"))


def rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str:
    """The chat template's text for messages and tools, with the opening of the assistant's turn if it is a `prompt`.

    Calls of tools are given as the template takes them: DeepSeek's wants arguments as text, Mistral's ids of 9 letters.

    Raises:
        UserError: the template refuses the messages.
    """
    ways = [messages]
    if any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
        short = _with_short_ids(messages)
        ways += [short, _with_text(messages), _with_text(short)]
    problems = []
    for way in ways:
        try:
            with at_most(RENDER_SECONDS):
                text = tokenizer.apply_chat_template(way, tools or None, tokenize=False, add_generation_prompt=prompt)
            return str(text)
        except Exception as error:  # a template is code of a stranger's
            problems.append(" ".join(str(error).split())[:200] or type(error).__name__)
            if isinstance(error, TimeoutError | MemoryError | RecursionError):
                break
    roles = ", ".join(message["role"] for message in messages[:ROLES_SHOWN])
    raise UserError(
        f"the chat template refuses a conversation of {roles} ({problems[0]}): fix the data or the template"
    )


def _with_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON text, not as an object."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": arguments}}

    return [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the last nine letters and digits of tool calls' ids, as vLLM gives Mistral's templates."""

    def short(id: str) -> str:
        return "".join(filter(str.isalnum, id))[-9:].rjust(9, "0")

    found = []
    for message in messages:
        if message.get("tool_call_id"):
            message = message | {"tool_call_id": short(message["tool_call_id"])}
        if message.get("tool_calls"):
            calls = [call | {"id": short(call.get("id", ""))} for call in message["tool_calls"]]
            message = message | {"tool_calls": calls}
        found.append(message)
    return found


def heldout(data: Path) -> list[dict[str, Any]]:
    """The held-out questions: `messages`, `answer`, `facts`."""
    with (data / "heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _table(data: Path, part: str) -> Any:
    """A part as a table over the mapped file: nothing is read before it is asked for."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(_path(data, part)))).read_all()


def _path(data: Path, part: str) -> Path:
    return data / f"{part}.arrow"
