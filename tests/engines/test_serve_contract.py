"""The API keeps OpenAI's contract: what it refuses, and that the official client's types parse every answer."""

import json
from typing import Any

import openai
import pytest
from gguf_fixture import CONTEXT, NAME, SLOTS, TRAINED, WORDS, Server, write_gguf, write_run
from openai import OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from serve.asking.endpoint import ask
from serve.gateway.exchange import refusal
from serve.gateway.json_schema import is_enforced, unenforced, unreadable

pytest_plugins = ["serve_fixtures"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "apple"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": CITY}}
CLOCK, MOON = ({"type": "function", "function": {"name": name}} for name in ("clock", "moon"))
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
WITH_TOOLS = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{{- '<|im_start|>assistant\\n' }}
{%- for call in message.tool_calls %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""  # as Hermes has it


def strict(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def parts(**part: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part]}]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "model"), ({"model": 5}, 400, "model"),
    ({"messages": []}, 400, "messages"), ({"messages": None}, 400, "messages"), ({"messages": "hi"}, 400, "messages"),
    ({"messages": [None]}, 400, "messages"), ({"messages": [{"content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages"),
    ({"messages": [*USER, {"role": "assistant", "content": None}]}, 400, "messages"),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}]}, 400, "messages"),  # its template has none
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, 400, "messages"),
    ({"messages": parts(type="image_url", image_url={"url": "data:image/png;base64,AAAA"})}, 400, "messages"),
    ({"messages": parts(type="image_url", image_url={"url": "file:///etc/passwd"})}, 400, "messages"),
    ({"messages": parts(type="input_audio", input_audio={"data": "AAAA", "format": "wav"})}, 400, "messages"),
    ({"messages": parts(type="file", file={"file_id": "x"})}, 400, "messages"),
    ({"messages": parts(type="text", text=3)}, 400, "messages"), ({"messages": parts(text="x")}, 400, "messages"),
    ({"tools": [TOOL], "tool_choice": "required"}, 400, "tools"), ({"tools": [TOOL]}, 400, "tools"),
    ({"tools": [{"type": "function"}]}, 400, "tools"), ({"tools": "x"}, 400, "tools"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools"), ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice"),
    ({"functions": [TOOL["function"]]}, 400, "functions"), ({"function_call": "auto"}, 400, "function_call"),
    ({"modalities": ["audio"]}, 400, "modalities"), ({"web_search_options": {}}, 400, "web_search_options"),
    ({"response_format": strict({"type": "string", "pattern": "^(?=a)b$"})}, 400, "response_format"),
    ({"response_format": strict({"not": {}})}, 400, "response_format"),
    ({"response_format": strict({"$ref": "#/$defs/x"})}, 400, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {"type": "foo"}}}, 400, "response_format"),
    ({"json_schema": {"type": "foo"}}, 400, "json_schema"),
    ({"response_format": strict(5)}, 400, "response_format"), ({"response_format": "json"}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"response_format": {}}, 400, "response_format"),
    ({"stop": ""}, 400, "stop"), ({"stop": [""]}, 400, "stop"), ({"stop": 5}, 400, "stop"), ({"stop": {}}, 400, "stop"),
    ({"n": 0}, 400, "n"), ({"n": 1.5}, 400, "n"), ({"n": True}, 400, "n"), ({"n": SLOTS + 65}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": -2}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"), ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_completion_tokens": -(10**30)}, 400, "max_completion_tokens"), ({"n_predict": -2}, 400, "n_predict"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": "x"}, 400, "temperature"), ({"top_p": 2}, 400, "top_p"),
    ({"frequency_penalty": 5}, 400, "frequency_penalty"), ({"seed": 1.5}, 400, "seed"), ({"seed": 2**70}, 400, "seed"),
    ({"logprobs": 3}, 400, "logprobs"), ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logit_bias": {"apple": 1}}, 400, "logit_bias"), ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 200}}, 400, "logit_bias"), ({"logit_bias": "x"}, 400, "logit_bias"),
    ({"stream_options": {"include_usage": True}, "stream": False}, 400, "stream_options"),
    ({"chat_template_kwargs": "x"}, 400, "chat_template_kwargs"), ({"reasoning_format": "x"}, 400, "reasoning_format"),
    ({"grammar": "root ::= ("}, 400, None), ({"min_p": "x"}, 400, None),  # type: ignore[list-item]
    ({"messages": [{"role": "user", "content": "apple " * CONTEXT}]}, 400, "messages"),
]  # fmt: skip


@pytest.fixture
def client(server: Server):
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory):
    """A server whose chat template has tools, and whose words the beginning of a call."""
    folder = tmp_path_factory.mktemp("tools")
    write_gguf(folder / "tools.gguf", WITH_TOOLS, words=[*WORDS[:-1], "<tool_call>\n{"])
    write_run(folder, (folder / "tools.gguf").read_bytes())
    recipe = (folder / f"{NAME}.yaml").read_text()
    (folder / f"{NAME}.yaml").write_text(recipe.replace(str(CONTEXT), str(TRAINED)))  # a letter is a token there
    running = Server(folder)
    running.wait_for("Ctrl-C stops")
    with OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client:
        yield client
    assert running.end() == 0


def question(**more: object) -> dict[str, Any]:
    return {"model": NAME, "messages": USER, "max_tokens": 4, "temperature": 0, **more}


def parsed(kind: type[BaseModel], answer: BaseModel) -> Any:
    """The answer, once the client's own type takes it as it came, not only as far as the client looks."""
    return kind.model_validate_json(answer.model_dump_json(exclude_unset=True))


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_with_its_name(server: Server, stream: bool) -> None:
    for changes, status, param in REFUSED:
        got, answer = ask(server.port, CHAT, server.key, question(stream=stream) | changes)
        error = ErrorObject.model_validate(answer["error"])
        assert (got, error.param, error.type) in (
            (status, param, "invalid_request_error"),
            (status, param, "exceed_context_size_error"),
        ), (changes, answer)


@pytest.mark.parametrize(
    "changes", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}, {"stop": [" house"]}, {"seed": -1}]
)
def test_a_whole_answer_parses(client: OpenAI, changes: dict[str, Any]) -> None:
    answer = parsed(ChatCompletion, client.chat.completions.create(**question(), **changes))
    assert [choice.index for choice in answer.choices] == list(range(changes.get("n", 1)))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert all(bool(choice.logprobs) == ("logprobs" in changes) for choice in answer.choices)


@pytest.mark.parametrize("changes", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}])
def test_a_streamed_answer_is_the_whole_one(client: OpenAI, changes: dict[str, Any]) -> None:
    whole = client.chat.completions.create(**question(), **changes)
    stream = client.chat.completions.create(
        **question(), **changes, stream=True, stream_options={"include_usage": True}
    )
    chunks = [parsed(ChatCompletionChunk, chunk) for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage]
    assert chunks[-1].usage and not chunks[-1].choices
    assert (usage.completion_tokens, usage.prompt_tokens) == (whole.usage.completion_tokens, whole.usage.prompt_tokens)


def test_a_stream_without_usage_tells_none(client: OpenAI) -> None:
    assert not any(chunk.usage for chunk in client.chat.completions.create(**question(), stream=True))


def test_the_tokens_of_all_choices_are_counted(client: OpenAI) -> None:
    one, three = (client.chat.completions.create(**question(), n=n).usage for n in (1, 3))
    assert (three.prompt_tokens, three.completion_tokens) == (one.prompt_tokens, 3 * one.completion_tokens)


def test_choices_have_seeds_of_their_own(client: OpenAI) -> None:
    hot = question() | {"temperature": 2, "max_tokens": 20, "extra_body": {"top_k": 0, "min_p": 0}}
    first, again = (client.chat.completions.create(**hot, n=3, seed=7).choices for _ in range(2))
    assert len({choice.message.content for choice in first}) == 3
    assert [choice.message.content for choice in first] == [choice.message.content for choice in again]


@pytest.mark.parametrize("length", [-1, None, CONTEXT + 1, 10**12])
def test_no_length_is_the_context(client: OpenAI, length: int | None) -> None:
    usage = client.chat.completions.create(**question() | {"max_tokens": length}).usage
    assert CONTEXT - 1 <= usage.total_tokens <= CONTEXT


def test_parts_of_a_text_are_that_text(server: Server) -> None:
    both = [{"role": "user", "content": [{"type": "text", "text": "app"}, {"type": "text", "text": "le"}]}]
    _, whole = ask(server.port, "/apply-template", server.key, {"messages": USER})
    assert ask(server.port, "/apply-template", server.key, {"messages": both}) == (200, whole)


def test_a_developer_is_the_system_to_a_template_that_knows_none(server: Server) -> None:
    _, answer = ask(server.port, "/apply-template", server.key, {"messages": [{"role": "developer", "content": "x"}]})
    assert answer["prompt"].startswith("system: x")


def test_models(client: OpenAI) -> None:
    assert parsed(Model, client.models.retrieve(NAME)).id == NAME
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


def test_a_strict_schema_is_kept(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-c]{2}$"}}, "required": ["a"]}
    answer = client.chat.completions.create(**question() | {"max_tokens": 60}, response_format=strict(schema))  # type: ignore[call-overload]
    assert set(json.loads(answer.choices[0].message.content)["a"]) <= set("abc")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", ["", "moon"])
def test_a_tool_that_must_be_called_is(with_tools: OpenAI, named: str, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": named}} if named else "required"
    # Where nothing is required, this model ends at once.
    asked = question() | {"max_tokens": 200, "temperature": 1, "tools": [CLOCK, MOON], "logit_bias": {"2": 100}}
    assert not with_tools.chat.completions.create(**asked).choices[0].message.content
    answer = with_tools.chat.completions.create(**asked, tool_choice=choice, stream=stream)
    if stream:
        deltas = [choice.delta for chunk in answer for choice in parsed(ChatCompletionChunk, chunk).choices]
        calls = [call for delta in deltas for call in delta.tool_calls or [] if call.function.name]
    else:
        calls = parsed(ChatCompletion, answer).choices[0].message.tool_calls
    assert {call.function.name for call in calls} <= ({named} if named else {"clock", "moon"}) and calls


def test_a_call_and_what_came_of_it_are_read(with_tools: OpenAI) -> None:
    said = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    messages = [*said, {"role": "tool", "tool_call_id": "1", "content": "sun"}]
    assert with_tools.chat.completions.create(**question(messages=messages), tools=[TOOL]).choices  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "changes", [{}, {"n": 2}, {"logprobs": 2}, {"prompt": ["apple", "bread"]}, {"prompt": [260, 261]}]
)
def test_completions_parse_whole_and_streamed(client: OpenAI, changes: dict[str, Any]) -> None:
    asked = {"model": NAME, "prompt": "apple", "max_tokens": 3, "temperature": 0} | changes
    whole = parsed(Completion, client.completions.create(**asked))
    chunks = list(client.completions.create(**asked, stream=True))
    for (
        chunk
    ) in chunks:  # until its end a choice has no reason for it, which OpenAI's type for whole answers leaves out
        ended = [
            choice.model_copy(update={"finish_reason": choice.finish_reason or "stop"}) for choice in chunk.choices
        ]
        parsed(Completion, chunk.model_copy(update={"choices": ended}))
    count = 2 if "n" in changes or (isinstance(asked["prompt"][0], str) and isinstance(asked["prompt"], list)) else 1
    assert [choice.index for choice in whole.choices] == list(range(count))
    assert whole.usage.completion_tokens == 3 * count
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        if "logprobs" in changes:
            assert "".join(choice.logprobs.tokens) == choice.text
            assert [choice.text[at] for at in choice.logprobs.text_offset] == [" "] * 3
            assert [
                offset for each in mine if each.logprobs for offset in each.logprobs.text_offset
            ] == choice.logprobs.text_offset
            assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)


def test_completions_refuse_what_they_would_drop(server: Server) -> None:
    for changes in (
        {"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"logprobs": 6}, {"logprobs": True}, {"prompt": []},
        {"prompt": None}, {"prompt": 5}, {"prompt": ["a", 5]}, {"prompt": [1.5]}, {"prompt": [99999]}, {"stop": ""},
        {"prompt": [{"prompt_string": "<__media__>", "multimodal_data": ["AAAA"]}]},
    ):  # fmt: skip
        status, answer = ask(
            server.port, COMPLETIONS, server.key, {"model": NAME, "prompt": "a", "max_tokens": 1} | changes
        )
        assert (status, ErrorObject.model_validate(answer["error"]).type) == (400, "invalid_request_error"), changes


def test_a_deep_schema_is_an_answer_or_a_refusal(server: Server) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    for changes in (
        {"response_format": strict(schema)},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ):
        assert ask(server.port, CHAT, server.key, question(**changes))[0] in (200, 400)
    assert ask(server.port, CHAT, server.key, question())[0] == 200


def test_a_token_that_is_none_is_no_fault_of_the_server(server: Server) -> None:
    assert ask(server.port, "/detokenize", server.key, {"tokens": [9_999_999]})[0] == 400


@pytest.mark.parametrize(
    ("status", "message", "becomes"),
    [
        (500, "Failed to parse tools", 400),
        (501, "no embeddings", 400),
        (500, "Compute error.", 500),
        (503, "Loading", 503),
    ],
)
def test_only_the_engines_own_failures_are_5xx(status: int, message: str, becomes: int) -> None:
    assert refusal(status, {"error": {"message": message}}).status == becomes


@pytest.mark.parametrize(
    ("pattern", "enforced"),
    [
        ("^[a-c]+$", True), ("^(a|b){2,3}$", True), ("^(?:ab)+$", True), ("^a\\.b$", True), ("^\\.+$", True),
        ("^$", True),
        ("^#[0-9a-fA-F]{6}$", True), ("^[0-9]{4}-[0-9]{2}$", True), ("^é$", True),
        ("abc", False), ("^(?=a)b$", False), ("^\\w+$", False), ("^(a)\\1$", False), ("^a+?$", False), ("^(a$", False),
        ("^(?P<x>a)$", False), ("^a{2}{3}$", False), ("^a$b$", False), ("^", False),
        ("^.*$", False), ("^[^x]$", False), ("^[ -~]$", False), ('^"$', False), # a quote ends the string in JSON
        ("^a\\.+$", False),  # llama.cpp repeats the a as well
        ("^é+$", False),  # and the last byte of the letter alone
    ],
)  # fmt: skip
def test_the_patterns_that_the_grammar_keeps(pattern: str, enforced: bool) -> None:
    assert is_enforced(pattern) == enforced


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (CITY, ""), ({"type": ["string", "null"], "minLength": 1}, ""), ({"enum": [1, 2]}, ""), ({}, ""),
        ({"$defs": {"n": {"type": "integer", "minimum": 3}}, "$ref": "#/$defs/n"}, ""),
        ({"type": "number", "minimum": 5}, "'minimum'"), ({"type": "integer", "multipleOf": 3}, "'multipleOf'"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "'uniqueItems'"),
        ({"$defs": {"n": {"format": "email"}}, "$ref": "#/$defs/n"}, "the format 'email' at /$defs/n"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "'a' in 'required' without its property"),
        ({"anyOf": [{"type": "null"}, {"not": {}}]}, "'not' at /anyOf/1"), ({"allOf": [{}]}, "'allOf'"),
        ({"properties": {"a": True}}, "True as a schema at /properties/a"),
        ({"type": "string", "pattern": "^a$", "minLength": 1}, "a pattern, a format and a length together"),
    ],
)  # fmt: skip
def test_what_a_strict_schema_cannot_have(schema: Any, problem: str) -> None:
    assert next(unenforced(schema), "") == problem


UNREADABLE: list[tuple[Any, str]] = [
    ({"type": "foo"}, "the type 'foo' is unknown: choose one of object, array, string, integer, number, boolean, null"),
    ({"properties": {"a": {"type": ["string", []]}}}, "the type [] at /properties/a is unknown"),
    ({"$ref": "#/$defs/x"}, "the $ref '#/$defs/x' names nothing in the schema: give a path such as #/$defs/name"),
    ({"items": {"$ref": "other.json"}}, "the $ref 'other.json' at /items names nothing"), ({"$ref": 5}, "the $ref 5 "),
    ({"$defs": {"a": {"type": "x"}}, "anyOf": [{"$ref": "#/$defs/a"}]}, "the type 'x' at /$defs/a is unknown"),
    ({"$ref": "#"}, "the $ref '#' names nothing in the schema"), ({"type": []}, "the type [] is unknown"),
    ({"anyOf": []}, "anyOf is []: give a list of at least one"), ({"enum": 5}, "enum is 5: give a list of at least"),
    ({"type": "object", "properties": []}, "properties is []: give an object of schemas"),
    ({"type": "array", "items": True}, "True at /items is no schema: give an object"),
    ({"type": "array", "minItems": -1}, "minItems is -1: give a whole number from 0 on"),
    ({"type": "string", "pattern": 5}, "pattern is 5: give a text"),
    ({"type": "integer", "minimum": "3"}, "minimum is '3': give a number"),
    ({"type": "object", "additionalProperties": 5}, "5 at /additionalProperties is no schema"),
]  # fmt: skip
READABLE: list[Any] = [
    CITY, {}, {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, {"type": ["integer", "null"]},
    {"type": "integer", "minimum": 0, "exclusiveMinimum": True}, {"prefixItems": [{"const": 1}, {}], "default": 5},
    {"type": "object", "additionalProperties": False}, {"properties": {"properties": {"type": "string"}}},
]  # fmt: skip


def test_a_schema_is_refused_in_our_words_just_where_the_engine_cannot_read_it(with_tools: OpenAI) -> None:
    for schema, says in [*UNREADABLE, *((schema, "") for schema in READABLE)]:
        found = next(unreadable(schema, schema, set()), "")
        assert found.startswith(says) and bool(found) == bool(says), schema
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        for changes, param in (
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}, "response_format"),
            ({"tools": [tool], "tool_choice": "required"}, "tools"),
        ):
            asked: Any = question(max_tokens=1) | changes
            if not says:
                assert with_tools.chat.completions.create(**asked).choices, schema
                continue
            with pytest.raises(openai.BadRequestError) as refused:
                with_tools.chat.completions.create(**asked)
            assert refused.value.param == param and f"{param}: {says}" in refused.value.message
