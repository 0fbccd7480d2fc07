"""A request of OpenAI's API as the engine can answer it, and the engine's answer as that API has it.

llama.cpp answers 200 to much that it ignores, and 500 to what it cannot parse, which clients send again and again: what
it would drop or misread is refused, or put in its words, and its errors are given their cause.
Source: OpenAI's API reference (chat/create, completions/create), llama.cpp's `oaicompat_chat_params_parse`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from serve.gateway.json_schema import unenforced, unreadable

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT, COMPLETIONS, TEMPLATE = "/v1/chat/completions", "/v1/completions", "/apply-template"
LENGTHS = ("max_tokens", "max_completion_tokens", "n_predict")
# Type and inclusive bounds; a float may be given as a whole number, null as nothing.
VALUES: dict[str, tuple[type, float | None, float | None]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "seed": (int, -(2**63), 2**63 - 1),
    "top_logprobs": (int, 0, 20),
    "stream": (bool, None, None),
    "echo": (bool, None, None),
    "parallel_tool_calls": (bool, None, None),
    "stream_options": (dict, None, None),
    "response_format": (dict, None, None),
    "chat_template_kwargs": (dict, None, None),
    "messages": (list, None, None),
    "tools": (list, None, None),
    "model": (str, None, None),
}
NAMES = {
    float: "a number", int: "a whole number", bool: "true or false", dict: "an object", list: "a list", str: "a text"
}  # fmt: skip
NEUTRAL: tuple[object, ...] = (0, False, [], {}, {"type": "text"})  # what asks for nothing
REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")
# llama.cpp says 500 to whatever it cannot parse; these are its own failures.
FAULTS = re.compile(r"bad_alloc|[Cc]ompute|batch|decode|got exception|unknown error|failed to process|Unable to|memory")
EXTRAS = ("n_prompt_tokens", "n_ctx")


class Refusal(Exception):
    """A request that is not answered; `details` are further fields of the error, `param` among them."""

    def __init__(self, status: int, message: str, **details: object) -> None:
        super().__init__(message)
        self.status = status
        self.details = details

    @property
    def body(self) -> bytes:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": None} | self.details
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True)
class Model:
    """What the engine says of what it serves.

    Its chat template `has_tools` where it writes their definitions, `has_calls` where it writes their calls,
    `has_developer` where it knows that role; `most_choices` are answered at once; `absent` are parameters that this
    engine does not have.
    """

    names: tuple[str, ...]
    context: int
    vocabulary: int
    has_tools: bool
    has_calls: bool
    has_developer: bool
    most_choices: int
    absent: frozenset[str] = frozenset()


def answerable(path: str, asked: dict[str, Any], model: Model) -> list[dict[str, Any]]:
    """The questions in a request, each with one answer, in the order of its choices.

    Raises:
        Refusal: OpenAI's API does not have it so, or this engine would not do it.
    """
    for name, (kind, low, high) in VALUES.items():
        _check_value(asked, name, kind, low, high)
    for name in ("n", "best_of"):
        _check_value(asked, name, int, 1, min(model.most_choices, 128))  # 128 is OpenAI's bound
    if asked.get("model") is not None and asked["model"] not in model.names:
        raise unknown_model(asked["model"], model)
    if path not in (CHAT, COMPLETIONS, TEMPLATE):
        return [asked]
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in sorted(model.absent & asked.keys()):
        if asked[name] not in NEUTRAL:
            raise Refusal(400, f"{name}: this engine has none: leave it out, or serve with llama.cpp", param=name)
    _check_stop(asked)
    _check_logit_bias(asked, model)
    if "json_schema" in asked:
        _check_schema(asked["json_schema"], "json_schema")
    if asked.get("stream_options") and not asked.get("stream"):
        raise Refusal(400, "stream_options is for stream: true alone", param="stream_options")
    for name in LENGTHS:
        _set_length(asked, name, model)
    if path == COMPLETIONS:
        return _completions(asked)
    _check_chat(asked, model)
    return [question | {"n": 1} for question in _seeded(asked, asked.get("n", 1))]


def unknown_model(name: object, model: Model) -> Refusal:
    """OpenAI's 404."""
    there = ", ".join(model.names)
    return Refusal(404, f"The model {name!r} does not exist: there is {there}", param="model", code="model_not_found")


def _check_value(asked: dict[str, Any], name: str, kind: type, low: float | None, high: float | None) -> None:
    value = asked.get(name)
    if value is None:
        return
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise Refusal(400, f"{name} is {_shown(value)}: give {NAMES[kind]}", param=name)
    number: Any = value
    if (low is not None and number < low) or (high is not None and number > high):
        raise Refusal(400, f"{name} is {_shown(value)}: give {NAMES[kind]} from {low} to {high}", param=name)


def _check_stop(asked: dict[str, Any]) -> None:
    stop = asked.get("stop", [])
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise Refusal(400, f"stop is {_shown(stop)}: give a text that is not empty, or a list of such", param="stop")
    if words:
        asked["stop"] = words
    else:
        asked.pop("stop", None)


def _check_logit_bias(asked: dict[str, Any], model: Model) -> None:
    bias = asked.get("logit_bias", {})
    if not isinstance(bias, dict):
        raise Refusal(400, f"logit_bias is {_shown(bias)}: give an object of tokens and numbers", param="logit_bias")
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and int(token) < model.vocabulary):
            most = model.vocabulary - 1
            raise Refusal(400, f"logit_bias: {token!r} is no token: give ids from 0 to {most}", param="logit_bias")
        _check_value({"logit_bias": value}, "logit_bias", float, -100, 100)


def _set_length(asked: dict[str, Any], name: str, model: Model) -> None:
    """-1 means no limit but the context, as many clients say it; so does any length that the context cannot hold."""
    length = asked.get(name)
    if length is None:
        return
    if isinstance(length, bool) or not isinstance(length, int) or (length < 1 and length != -1):
        raise Refusal(400, f"{name} is {_shown(length)}: give a whole number from 1 on, or -1 for no limit", param=name)
    if length == -1 or length > model.context:
        del asked[name]


def _seeded(asked: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` questions, each with a seed of its own that follows from the one that was given."""
    return [asked | ({"seed": (asked["seed"] + number) % 2**32} if "seed" in asked else {}) for number in range(count)]


def _completions(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prompt of a list by itself, `n` times."""
    neutral = {"echo": False, "suffix": "", "best_of": asked.get("n", 1)}
    for name, value in neutral.items():
        if asked.pop(name, value) != value:
            raise Refusal(400, f"{name}: this engine does not have it: leave it out", param=name)
    _check_value(asked, "logprobs", int, 0, 5)
    prompts = asked.get("prompt")
    if not isinstance(prompts, str | list) or prompts == []:
        raise Refusal(400, f"prompt is {_shown(prompts)}: give a text, or a list of texts or tokens", param="prompt")
    several = isinstance(prompts, list) and isinstance(prompts[0], str | list)
    each = prompts if several else [prompts]
    if not all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in each):
        raise Refusal(400, "prompt: give texts alone, or lists of tokens alone", param="prompt")
    return [question | {"prompt": prompt, "n": 1} for prompt in each for question in _seeded(asked, asked.get("n", 1))]


def _is_tokens(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _check_chat(asked: dict[str, Any], model: Model) -> None:
    """Put `asked` into the engine's words."""
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice"), ("web_search_options", "tools")):
        if name in asked:
            raise Refusal(400, f"{name} is not supported: use {instead}", param=name)
    if "audio" in asked or asked.get("modalities", ["text"]) != ["text"]:
        raise Refusal(400, 'This model writes text only: set modalities to ["text"]', param="modalities")
    if asked.get("reasoning_format", "auto") not in REASONING_FORMATS:
        choices = ", ".join(REASONING_FORMATS)
        raise Refusal(400, f"reasoning_format: choose one of {choices}", param="reasoning_format")
    _check_value(asked, "logprobs", bool, None, None)
    if "top_logprobs" in asked and not asked.get("logprobs"):
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    _check_format(asked.get("response_format", {"type": "text"}))
    _set_tools(asked, model)
    if not asked.get("messages"):
        raise Refusal(400, "messages is empty: give at least one message", param="messages")
    asked["messages"] = [
        _message(message, f"messages[{number}]", model) for number, message in enumerate(asked["messages"])
    ]


def _check_format(wanted: dict[str, Any]) -> None:
    kind = wanted.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        says = f"response_format.type is {_shown(kind)}: choose text, json_object or json_schema"
        raise Refusal(400, says, param="response_format")
    if kind == "json_schema":
        given = wanted.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(schema, dict):
            raise Refusal(400, "response_format.json_schema.schema is missing: give an object", param="response_format")
        _check_schema(schema, "response_format", given.get("strict"))
    elif "schema" in wanted:  # llama.cpp's own, beside json_object
        _check_schema(wanted["schema"], "response_format")


def _check_schema(schema: object, param: str, strict: object = False) -> None:
    if problem := next(unreadable(schema, schema, set()), ""):
        raise Refusal(400, f"{param}: {problem}", param=param)
    if strict and (problem := next(unenforced(schema), "")):
        raise Refusal(400, f"{param}: a strict schema cannot have {problem}: leave it out, or strict", param=param)


def _set_tools(asked: dict[str, Any], model: Model) -> None:
    """A named choice becomes the one tool that must be called, since llama.cpp takes it for `auto`."""
    tools, choice = asked.get("tools", []), asked.pop("tool_choice", None)
    names = [_tool_name(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    if not tools:
        asked.pop("tools", None)
        if choice not in (None, "none", "auto"):
            raise Refusal(400, "tool_choice needs tools", param="tool_choice")
        return
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else None
        if named not in names:
            says = f"tool_choice names {_shown(named)}, which is not among tools ({', '.join(names)})"
            raise Refusal(400, says, param="tool_choice")
        asked["tools"], choice = [tools[names.index(named)]], "required"
    if choice not in (None, "none", "auto", "required"):
        says = f"tool_choice is {_shown(choice)}: give none, auto, required, or the name of a function"
        raise Refusal(400, says, param="tool_choice")
    if not model.has_tools and choice == "none":
        del asked["tools"]
        return
    if not model.has_tools:
        says = "This model's chat template has no tools, so it would not see them: leave out tools"
        raise Refusal(400, says, param="tools")
    asked["tool_choice"] = choice or "auto"


def _tool_name(tool: object, where: str) -> str:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        says = f'{where}: give {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
        raise Refusal(400, says, param="tools")
    if not isinstance(parameters := function.get("parameters") or {}, dict):
        raise Refusal(400, f"{where}.function.parameters is {_shown(parameters)}: give a JSON schema", param="tools")
    _check_schema(parameters, "tools", function.get("strict"))
    return name


def _message(message: object, where: str, model: Model) -> dict[str, Any]:
    """One message with its text in one piece."""

    def refuse(says: str) -> Refusal:
        return Refusal(400, f"{where}{says}", param="messages")

    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or role not in ROLES:
        raise refuse(f".role is {_shown(role)}: give one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise refuse(".tool_calls: give each the type function, and a function with its name and arguments as texts")
    if calls and not model.has_calls:
        raise refuse(".tool_calls: this model's chat template has no tools, so it would not see them")
    content = message.get("content")
    if isinstance(content, list) and content:
        content = "".join(_text(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        raise refuse(f".content is {_shown(content)}: give a text, or a list of parts")
    # Others than the newest models take a developer's word as the system's (OpenAI's model spec).
    role = "system" if role == "developer" and not model.has_developer else role
    return message | {"role": role, "content": content}


def _text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "refusal"):
        says = f"{where} is a part of type {_shown(kind)}: this model reads text only"
        raise Refusal(400, says, param="messages")
    if not isinstance(text := part.get(kind), str):
        raise Refusal(400, f"{where}.{kind} is {_shown(text)}: give a text", param="messages")
    return text


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    return isinstance(function, dict) and all(isinstance(function.get(name), str) for name in ("name", "arguments"))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def refusal(status: int, made: object) -> Refusal:
    """An error of the engine: a 5xx only where the request is not to blame."""
    error = made.get("error", made) if isinstance(made, dict) else made
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = str(error.get("message") or error)
    if status in (500, 501) and not FAULTS.search(message):
        status = 400
    details: dict[str, Any] = {name: error[name] for name in EXTRAS if name in error}
    if error.get("type") == "exceed_context_size_error":
        details |= {"type": error["type"], "param": "messages", "code": "context_length_exceeded"}
    return Refusal(status, message, **details)


def joined(answers: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """One answer with the choices of all, each prompt's tokens counted once: `answers` has them for each in turn."""
    choices = [answer["choices"][0] | {"index": index} for index, answer in enumerate(answers)]
    for choice in choices:
        legacy_logprobs(choice)
    return answers[0] | {"choices": choices, "usage": total([answer["usage"] for answer in answers], prompts)}


def total(usages: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """The tokens of all answers."""
    first = usages[:: max(1, len(usages) // prompts)]
    prompt = sum(usage["prompt_tokens"] for usage in first)
    completion = sum(usage["completion_tokens"] for usage in usages)
    return usages[0] | {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def legacy_logprobs(choice: dict[str, Any], offset: int = 0) -> None:
    """A completion's log probabilities in lists, as its API has them; llama.cpp gives those of a chat."""
    given = choice.get("logprobs")
    if "text" not in choice or not isinstance(given, dict) or "content" not in given:
        return
    tokens = given["content"]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token["token"]))
    choice["logprobs"] = {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets[: len(tokens)],
    }


def event(chunk: dict[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
