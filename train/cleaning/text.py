"""The texts of a row: what people and models wrote in it, read one after another or changed one by one."""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

from train.reading.row import Rejection

Change = Callable[[str], str]
# Patterns, to be compiled with re.DOTALL; a fence that nothing closes goes to the end.
FENCED = r"```.*?(?:```|\Z)"
CODE = FENCED + r"|`[^`\n]+`"
PLAIN = ("text", "rejected")  # of a row without turns, both are texts
WRITTEN = ("content", "reasoning_content")


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
