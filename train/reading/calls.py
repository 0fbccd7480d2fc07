"""Tools, the calls of them and their results, of any spelling, in OpenAI's form with the arguments as an object."""

import json
from typing import Any

from train.reading.row import Rejection

Message = dict[str, Any]
NO_CALL = "the tool call is not a name with JSON arguments"


def parsed(written: str, where: str) -> Any:
    """The value that is written as JSON inside a text.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(written, strict=False)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is text that is not JSON ({written[:40]!r}): write a JSON list") from None


def tool_calls(given: Any, where: str) -> list[Message]:
    """Tool calls in OpenAI's form, from a list of them, from one, or from the JSON text of either.

    Raises:
        Rejection: one is not a name with JSON arguments; models write such calls, and the row should not teach it.
    """
    try:
        listed = parsed(given, where) if isinstance(given, str) else given
    except ValueError:
        raise Rejection(f"{where}: {NO_CALL}") from None
    return [_call(one, where) for one in (listed if isinstance(listed, list) else [listed])]


def _call(given: Any, where: str) -> Message:
    try:
        given = parsed(given, where) if isinstance(given, str) else given
        function = given["function"] if isinstance(given.get("function"), dict) else given
        name, arguments = function["name"], function.get("arguments", function.get("parameters", {}))
        arguments = parsed(arguments, where) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Rejection(f"{where}: {NO_CALL}") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Rejection(f"{where}: {NO_CALL}")
    known = {"id": given["id"]} if isinstance(given.get("id"), str) and given["id"] else {}
    return known | {"type": "function", "function": {"name": name, "arguments": arguments}}


def offered_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form: from a list or its JSON text, each whole or only what stands in `function`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(tools, str):
        tools = parsed(tools, "'tools'") if tools.strip() else None
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of objects with a JSON schema each, or its JSON text")
    whole = [tool if isinstance(tool.get("function"), dict) else {"function": tool} for tool in tools]
    if unnamed := [tool for tool in whole if not isinstance(tool["function"].get("name"), str)]:
        raise ValueError(f"a tool without 'name': {json.dumps(unnamed[0])[:80]}")
    return [{"type": "function"} | tool for tool in whole]


def paired_results(messages: list[Message]) -> list[Message]:
    """Each result of a tool with the id of its call, in the order of the calls.

    Raises:
        Rejection: a result without a call.
    """
    paired: list[Message] = []
    calls: list[Message] = []
    waiting: list[Message] = []
    number = 0
    for message in messages:
        if message["role"] == "tool":
            own = [one for one in waiting if one["id"] == message.get("tool_call_id")]
            own = own or [one for one in waiting if one["function"]["name"] == message.get("name")] or waiting
            if not own:
                raise Rejection("a tool's result without a call of it")
            answered = own[0]
            waiting.remove(answered)
            named = message if "name" in message else message | {"name": answered["function"]["name"]}
            paired.append(named | {"tool_call_id": answered["id"]})
            continue
        _order(paired, calls)
        calls = []
        for one in message.get("tool_calls", []):
            number += 1  # nine letters and digits, which is what Mistral's templates demand
            calls.append({"id": f"call{number:05}"} | one)
        waiting = list(calls)
        paired.append(message | {"tool_calls": calls} if calls else message)
    return paired


def _order(paired: list[Message], calls: list[Message]) -> None:
    """Sort the results at the end of `paired` as their calls stand."""
    places = {one["id"]: place for place, one in enumerate(calls)}
    results = [message for message in paired[-len(calls) :] if message["role"] == "tool"] if calls else []
    if results:
        paired[-len(results) :] = sorted(results, key=lambda result: places[result["tool_call_id"]])
