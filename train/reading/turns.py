"""Turns of any spelling become one conversation: roles, tool calls and results, order, up to the last answer."""

import json
import re
from collections import Counter
from typing import Any

from train.reading.calls import Message, offered_tools, paired_results, parsed, tool_calls
from train.reading.row import Rejection

Changes = Counter[str]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "chatbot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",  # ShareGPT names who answered
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
SPEAKERS, SAID = ("role", "from", "speaker"), ("content", "value", "utterance", "parts")
REASONING = ("reasoning_content", "reasoning", "thinking", "complex_cot")
UNLEARNED = ("weight", "loss_weight", "train", "loss")  # 0 or false in one of them: the answer is only read
SURROGATE = re.compile("[\ud800-\udfff]")
JOINED = "turns of one role joined"
OPENING = "answers before the first question left out"
ENDING = "turns after the last answer left out"


def conversation(given: Any, changes: Changes, tools: Any = None, system: Any = None) -> dict[str, Any]:
    """`{"messages": [...]}`, with `tools` where given, of a list of turns; `changes` counts what was done to them.

    Raises:
        ValueError: what is wrong with a turn.
        Rejection: there is nothing to learn from it, or no chat template has a place for it.
    """
    messages = turns(given, changes, system)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Rejection("no turn of role 'assistant': there is nothing to learn from it")
    if all(messages[index].get("weight") == 0 for index in answers):
        raise Rejection("no answer that is to be learned: all have weight 0")
    if answers[-1] + 1 < len(messages):
        changes[ENDING] += 1
    value: dict[str, Any] = {"messages": paired_results(messages[: answers[-1] + 1])}
    if offered := offered_tools(tools):
        value["tools"] = offered
    return value


def turns(given: Any, changes: Changes, system: Any = None) -> list[Message]:
    """The messages of a list of turns: the system prompt first, then the user, no role twice in a row.

    Raises:
        ValueError: what is wrong with a turn.
        Rejection: no chat template has a place for it.
    """
    messages = [_message(turn, f"messages[{index}]") for index, turn in enumerate(as_turns(given))]
    if system is not None and (prompt := text(system, "'system'")).strip():
        messages.insert(0, {"role": "system", "content": prompt})
    messages = _joined(messages, changes)
    if any(message["role"] == "system" for message in messages[1:]):
        raise Rejection("a turn of role 'system' after the first one: chat templates have no place for it")
    return _opened(messages, changes)


def as_turns(given: Any) -> list[Any]:
    """The list of turns; in CSV it is written as JSON.

    Raises:
        ValueError: it is no list.
        Rejection: it is empty.
    """
    if isinstance(given, str):
        given = parsed(given, "'messages'")
    if given is None or given == []:
        raise Rejection("no turns")
    if not isinstance(given, list):
        raise ValueError(f"'messages' must be a list of turns, it is {type(given).__name__}")
    return given


def text(content: Any, where: str) -> str:
    """The text of a turn: a string, or OpenAI's list of parts if all of them are text; null is no text.

    Raises:
        ValueError: it is anything else.
        Rejection: a part is something else, such as an image.
    """
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"{where} must be text, it is {type(content).__name__}")
    if not content.isascii() and SURROGATE.search(content):
        raise ValueError(f"{where} has a broken surrogate pair (a cut emoji): mend it")
    return content


def _part(part: Any, where: str) -> str:
    """The text of a part of a turn; Google's and Amazon's have no type."""
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be text, or a list of parts with 'text', not of {type(part).__name__}")
    if (kind := part.get("type", "text")) not in ("text", "input_text", "output_text"):
        raise Rejection(f"{where} has a part of type {kind!r}: only text is learned")
    if not {"text", "value"} & part.keys():
        raise Rejection(f"{where} has a part with {', '.join(map(str, part)) or 'nothing'}: only text is learned")
    return text(part.get("text", part.get("value")), where)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object with 'role' and 'content'")
    key = next((key for key in SPEAKERS if turn.get(key) is not None), "role")
    name = turn.get(key)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r}: choose one of: system, user, assistant, tool")
    if key == "speaker" and role == "system":  # in dialogues of a user with a service
        role = "assistant"
    content = next((turn[key] for key in SAID if turn.get(key) is not None), None)
    if role == "call":  # ShareGPT: the whole turn is the call
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(content, where)}
    calls = turn.get("tool_calls") or turn.get("function_call")
    thought = next((turn[key] for key in REASONING if turn.get(key)), None) if role == "assistant" else None
    if role == "assistant" and isinstance(content, list):  # LLaMA-Factory and Anthropic write these as parts
        thoughts = _parts(content, "reasoning", "thinking")
        thought = thought or text([{"text": part.get("value", part.get("thinking"))} for part in thoughts], where)
        calls = calls or [part.get("value") for part in _parts(content, "tool_call")]
        content = [part for part in content if part not in (*thoughts, *_parts(content, "tool_call"))]
    if content is None and not calls and not set(SAID) & turn.keys():
        raise ValueError(f"{where} has no 'content': its keys are {', '.join(map(str, turn))}")
    if role == "tool" and not isinstance(content, str | list | None):  # results are often objects
        content = json.dumps(content, ensure_ascii=False)
    message: Message = {"role": role, "content": text(content, f"{where}: 'content'")}
    if role == "assistant":
        if thought and isinstance(thought, str):
            message["reasoning_content"] = text(thought, f"{where}: 'reasoning_content'")
        if calls:
            message["tool_calls"] = tool_calls(calls, where)
        if any(key in turn and turn[key] == 0 for key in UNLEARNED):
            message["weight"] = 0
    elif role == "tool":
        message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    return message


def _parts(content: list[Any], *kinds: str) -> list[Any]:
    return [part for part in content if isinstance(part, dict) and part.get("type") in kinds]


def _joined(messages: list[Message], changes: Changes) -> list[Message]:
    """One turn of the several that one role has in a row; results of tools stay apart."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            joined.append(message)
            continue
        if "tool_calls" in last and message["content"]:
            raise Rejection("an answer follows tool calls without their results")
        changes[JOINED] += 1
        both = last | message | {"content": _lines(last, message, "content")}
        if reasoning := _lines(last, message, "reasoning_content"):
            both["reasoning_content"] = reasoning
        if calls := last.get("tool_calls", []) + message.get("tool_calls", []):
            both["tool_calls"] = calls
        joined[-1] = both
    return joined


def _lines(first: Message, second: Message, key: str) -> str:
    return "\n\n".join(part for part in (first.get(key, ""), second.get(key, "")) if part)


def _opened(messages: list[Message], changes: Changes) -> list[Message]:
    """After the system prompt the user speaks first: most chat templates refuse or misread anything else."""
    start = 1 if messages[0]["role"] == "system" else 0
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    if asked > start:
        if asked == len(messages):
            raise Rejection("no turn of role 'user' before an answer")
        changes[OPENING] += 1
    return messages[:start] + messages[asked:]
