"""Turns of any spelling become one conversation: roles, tool calls and results, order, up to the last answer."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from train.reading.row import MEDIA, REASONING, SPEAKERS, TRUTHS, Rejection

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
SAID = ("content", "value", "utterance", "parts", "refusal")
# `reasoning: on` tells how a set was made, and is no thought.
FLAGS = (
    *("on", "off", "true", "false", "yes", "no", "y", "n", "0", "1", "none", "null", "n/a", "low", "medium", "high"),
    *("minimal", "max", "auto", "default", "detailed", "enabled", "disabled", "thinking", "think", "no_think"),
    *("/think", "/no_think"),
)
FILES = ("files", "attachments")
# Whether an answer is learned, or only read: OpenAI's, axolotl's, ms-swift's and xtuner's keys, and torchtune's.
LEARNED = ("weight", "loss_weight", "train", "training", "trainable", "learn", "loss")
MASKED = ("masked", "mask")
SPANS = ("train_detail", "training_detail")  # axolotl's: which characters are learned
MASK_LIKE = re.compile("mask|train|learn|loss|weight|supervis", re.IGNORECASE)
# What ends a turn in the templates of the families; at the end of a text it is left over from one.
END = re.compile(
    r"(?:\s*(?:<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|end_of_turn|END_OF_TURN_TOKEN|eos|return)\|>"
    r"|<end_of_turn>|<turn\|>|<eos>|</s>|<\N{FULLWIDTH VERTICAL LINE}end\N{LOWER ONE EIGHTH BLOCK}of"
    r"\N{LOWER ONE EIGHTH BLOCK}sentence\N{FULLWIDTH VERTICAL LINE}>))+\s*\Z"
)
SURROGATE = re.compile("[\ud800-\udfff]")
JOINED = "turns of one role joined"
OPENING = "answers before the first question left out"
ENDING = "turns after the last answer left out"
ENDED = "end tokens at the end of a text left out"
FLAGGED = "flags such as 'reasoning: on' not taken for thoughts"
OTHERS_MARKED = "turns of users, systems or tools marked as to be learned: only answers are"


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
        raise Rejection("no answer that is to be learned: each is marked as one that is only read")
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
    messages = [_message(turn, f"messages[{index}]", changes) for index, turn in enumerate(as_turns(given))]
    if system is not None and (prompt := text(system, "'system'")).strip():
        messages.insert(0, {"role": "system", "content": prompt})
    return _opened(_joined(messages, changes), changes)


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
        raise ValueError(f"{where} has a broken surrogate pair (a cut emoji): fix it")
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


def thought_of(given: Mapping[str, Any], where: str, changes: Changes) -> str:
    """The thoughts that stand in one of the columns for them; a flag in it is none, and is counted."""
    for value in (given[key] for key in REASONING if given.get(key)):
        if isinstance(value, str | list) and not (isinstance(value, str) and value.strip().lower() in FLAGS):
            return text(value, f"{where}the reasoning")
        changes[FLAGGED] += 1
    return ""


def mark_of(given: Mapping[str, Any], where: str) -> bool | None:
    """Whether it is marked as to be learned; None if nothing is said.

    Raises:
        ValueError: a mark is neither true nor false, contradicts another, or is of a name that is not known.
    """
    said: dict[str, bool] = {}
    for key, value in given.items():
        if value is None or key in SPANS or not MASK_LIKE.search(str(key)):
            continue
        truth = TRUTHS.get(str(value).strip().lower())
        if key in (*LEARNED, *MASKED):
            if truth is None:
                raise ValueError(f"{where}{key!r} is {value!r}: a turn is learned or not, give true or false, 1 or 0")
            said[key] = truth != (key in MASKED)
        elif truth is not None or isinstance(value, int | float | list):
            raise ValueError(
                f"{where}{key!r} looks like a mark of what is learned, and is not known: name it 'train', with true or "
                "false, or take it out"
            )
    if len(set(said.values())) > 1:
        raise ValueError(f"{where}{' and '.join(map(repr, said))} contradict each other: keep one")
    return next(iter(said.values()), None)


def without_end(words: str, changes: Changes) -> str:
    """The text without the tokens that end a turn at its end, which the template writes; HTML's `<s>...</s>` stays."""
    end = END.search(words) if words.endswith((">", " ", "\n")) else None
    if end is None or ("</s>" in end[0] and "<s>" in words):
        return words
    changes[ENDED] += 1
    return words[: end.start()]


def _message(turn: Any, where: str, changes: Changes) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object with 'role' and 'content'")
    key = next((key for key in SPEAKERS if turn.get(key) is not None), "role")
    name = turn.get(key)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r}: choose one of: system, user, assistant, tool")
    if key == "speaker" and role == "system":  # in dialogues of a user with a service
        role = "assistant"
    if shown := [key for key in (*MEDIA, *FILES) if turn.get(key)]:
        raise Rejection(f"{where} has {shown[0]!r}: only text is learned")
    learned = mark_of(turn, f"{where}: ")
    content = next((turn[key] for key in SAID if turn.get(key) is not None), None)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "call":  # ShareGPT: the whole turn is the call
        role, content, calls = "assistant", "", content
    thought = thought_of(turn, f"{where}: ", changes) if role == "assistant" else ""
    if role == "assistant" and isinstance(content, list):  # LLaMA-Factory and Anthropic write these as parts
        thoughts = _parts(content, "reasoning", "thinking")
        thought = thought or text([{"text": part.get("value", part.get("thinking"))} for part in thoughts], where)
        calls = calls or [part.get("value") for part in _parts(content, "tool_call")]
        content = [part for part in content if part not in (*thoughts, *_parts(content, "tool_call"))]
    if content is None and not calls and not set(SAID) & turn.keys():
        raise ValueError(f"{where} has no 'content': its keys are {', '.join(map(str, turn))}")
    if role == "tool" and not isinstance(content, str | list | None):  # results are often objects
        content = json.dumps(content, ensure_ascii=False)
    words, only_read = _marked(turn, content, learned, where)
    if (
        role != "tool" and (end := END.search(words)) and not ("<s>" in words and "</s>" in end[0])
    ):  # struck out in HTML
        words = words[: end.start()]
        changes[ENDED] += 1
    message: Message = {"role": role, "content": words}
    if role == "tool":
        message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    elif isinstance(name := turn.get("name"), str) and name.strip() and name.strip().lower() not in ROLES:
        message["name"] = name
    if role != "assistant":
        if learned:
            changes[OTHERS_MARKED] += 1
        return message
    if thought.strip():
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = tool_calls(calls, where)
    only_read = [[first, min(last, len(words))] for first, last in only_read if first < len(words)]
    if learned is False or only_read == [[0, len(words)]]:
        message["weight"] = 0
    elif only_read:
        message["only_read"] = only_read
    return message


def _marked(turn: Mapping[str, Any], content: Any, whole: bool | None, where: str) -> tuple[str, list[list[int]]]:
    """(the turn's text, its characters from and to which it is only read) by axolotl's offsets or marked parts.

    Raises:
        ValueError: they contradict what the turn says as a `whole`.
    """
    details = next((turn[key] for key in SPANS if turn.get(key)), None)
    listed = content if isinstance(content, list) else []
    marks = [mark_of(part, f"{where}: ") for part in listed if isinstance(part, dict)]
    if details is not None:
        words = text(content, f"{where}: 'content'")
        learned = _learned_by_offsets(details, content, where)
    elif any(mark is not None for mark in marks):
        parts = [_part(part, where) for part in listed]
        words = "".join(parts)  # so axolotl reads them, whose marks these are
        learned = b"".join(bytes([mark is not False]) * len(part) for mark, part in zip(marks, parts, strict=True))
    else:
        return text(content, f"{where}: 'content'"), []
    if learned and whole is not None and whole != any(learned):
        raise ValueError(f"{where}: what it says of its parts contradicts what it says of the whole turn: keep one")
    return words, [list(run.span()) for run in re.finditer(b"\0+", learned)]


def _learned_by_offsets(details: Any, content: Any, where: str) -> bytes:
    """A byte a character, 1 where it is learned: inside a span that says so, its last character included."""
    if isinstance(details, str):
        details = parsed(details, f"{where}: 'train_detail'")
    if not isinstance(content, str) or not isinstance(details, list):
        raise ValueError(f"{where}: 'train_detail' must be a list of offsets in a text")
    learned, told = bytearray(len(content)), bytearray(len(content))
    for detail in details:
        begin, end, mark = (detail.get(key) for key in ("begin_offset", "end_offset", "train"))
        if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin <= end < len(content):
            raise ValueError(
                f"{where}: 'train_detail' names characters {begin!r} to {end!r}, the last one included, of a text of "
                f"{len(content)}: the first has offset 0"
            )
        if any(told[begin : end + 1]) or not isinstance(mark, bool):
            raise ValueError(f"{where}: 'train_detail' must say once, by true or false, whether a character is learned")
        told[begin : end + 1] = b"\1" * (end + 1 - begin)
        learned[begin : end + 1] = bytes([mark]) * (end + 1 - begin)
    return bytes(learned)


def _parts(content: list[Any], *kinds: str) -> list[Any]:
    return [part for part in content if isinstance(part, dict) and part.get("type") in kinds]


def _joined(messages: list[Message], changes: Changes) -> list[Message]:
    """One turn of the several that one role and name has in a row; results of tools stay apart."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        alike = last and all(last.get(key) == message.get(key) for key in ("role", "name"))
        if last is None or not alike or message["role"] == "tool":
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
        joined[-1] = _only_read(last, message, both)
    return joined


def _only_read(first: Message, second: Message, both: Message) -> Message:
    """The joined turn, in which what was only to be read in either is only read."""
    if not {"weight", "only_read"} & both.keys() or ("weight" in first and "weight" in second):
        return both
    if ("weight" in first or "weight" in second) and {"reasoning_content", "tool_calls"} & both.keys():
        raise Rejection("two answers in a row with thoughts or calls, of which only one is to be learned")
    start = len(both["content"]) - len(second["content"])
    spans = [[0, start]] if "weight" in first else list(first.get("only_read", []))
    own = [[0, len(second["content"])]] if "weight" in second else second.get("only_read", [])
    spans += [[start + begin, start + end] for begin, end in own]
    return {key: value for key, value in both.items() if key != "weight"} | {"only_read": spans}


def _lines(first: Message, second: Message, key: str) -> str:
    return "\n\n".join(part for part in (first.get(key, ""), second.get(key, "")) if part)


def _opened(messages: list[Message], changes: Changes) -> list[Message]:
    """After the system prompt the user speaks first: most chat templates refuse or misread anything else."""
    start = 1 if messages[0]["role"] == "system" else 0
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    if asked > start:
        if asked == len(messages):
            raise Rejection("no turn of role 'user' before an answer")
        told = [message for message in messages[:asked] if message["role"] == "system"]
        if len(told) < asked:
            changes[OPENING] += 1
        return told + messages[asked:]
    return messages
