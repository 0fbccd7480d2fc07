"""Turns of any spelling as one conversation: what is normalized, what is left out, and what is wrong."""

from collections import Counter
from typing import Any

import pytest

from train.reading.formats import format_of
from train.reading.row import Rejection

USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, ASSISTANT]
MORE = {"role": "user", "content": "more?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001"} | CALL]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "18 degrees"}


def messages(*given: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(given), **more}


def value(record: Any) -> dict[str, Any]:
    return format_of(record).value(record, Counter())


WRONG: dict[str, tuple[Any, str]] = {
    "no object": (
        7,
        "not an object with named columns but int: name them (of a table: in its first line)",
    ),
    "null": (None, "not an object with named columns but NoneType"),
    "no columns": ({}, "no format has the columns (none): name them"),
    "unknown columns": ({"sentence": "x", "label": 1}, "no format has the columns sentence, label: name them"),
    "two columns of turns": ({"messages": TALK, "conversations": TALK}, "has turns in messages and in conversations"),
    "two answers": (
        {"prompt": "a", "completion": "b", "response": "c"},
        "can be read in several ways (question: prompt; answer: completion or response): keep one column of each",
    ),
    "messages no list": (messages() | {"messages": "ping"}, "'messages' is text that is not JSON ('ping')"),
    "messages an object": ({"messages": {"a": 1}}, "'messages' must be a list of turns, it is dict"),
    "message no object": (messages(7), "messages[0] is not an object with 'role' and 'content'"),
    "no role": (messages({"content": "x"}), "messages[0]: unknown role None: choose one of: system, user, assistant"),
    "unknown role": (messages(USER, {"role": "narrator", "content": "x"}), "messages[1]: unknown role 'narrator'"),
    "role no text": (messages({"role": ["user"], "content": "x"}), "messages[0]: unknown role ['user']"),
    "no content": (messages({"role": "user", "text": "x"}), "messages[0] has no 'content': its keys are role, text"),
    "content a number": (messages({"role": "user", "content": 1}), "messages[0]: 'content' must be text, it is int"),
    "content of texts": (
        messages({"role": "user", "content": ["ping"]}, ASSISTANT),
        "messages[0]: 'content' must be text, or a list of parts with 'text', not of str",
    ),
    "one message a row": ({"role": "user", "content": "ping"}, "is one message: write those of a conversation as one"),
    "an object of objects": ({"a": {"x": 1}, "b": {"x": 2}}, "is an object of 2 objects: write these as a JSON list"),
    "many columns": (
        {f"c{number}": 1 for number in range(20)},
        "no format has the columns c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, 8 more: name them",
    ),
    "choices": (
        {"question": "ping", "choices": ["a", "b"], "answer": "a"},
        "has 'choices', which no format has a place for: write the choices into the question",
    ),
    "several answers": ({"question": "ping", "answer": ["a", "b"]}, "messages[1]: 'content' must be text, or a list"),
    "a context beside turns": (
        {"prompt": [USER], "context": "x", "completion": "b"},
        "has turns in 'prompt' and a context beside them: write the context into a turn",
    ),
    "texts and messages": (messages("ping", ASSISTANT), "messages[0] is not an object with 'role' and 'content'"),
    "questions alone": ({"turns": ["ping", "more?"]}, "no format has the columns turns: name them"),
    "broken surrogate": (
        messages({"role": "user", "content": "cut \ud83d"}, ASSISTANT),
        "messages[0]: 'content' has a broken surrogate pair (a cut emoji): mend it",
    ),
    "tools no list": (messages(*TALK, tools="{"), "'tools' is text that is not JSON ('{')"),
    "a tool without a name": (messages(*TALK, tools=[{}]), "a tool without 'name'"),
    "history no pairs": ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be a list of [ques"),
    "text no text": ({"text": 7}, "'text' must be text, it is int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_record_is_told(case: str) -> None:
    record, problem = WRONG[case]
    with pytest.raises(ValueError) as raised:
        value(record)
    assert str(raised.value).startswith(problem)


LEFT_OUT: dict[str, tuple[Any, str]] = {
    "no turns": (messages(), "no turns"),
    "no answer": (messages(USER), "no turn of role 'assistant': there is nothing to learn from it"),
    "only answers of weight 0": (
        messages(USER, ASSISTANT | {"weight": 0}),
        "no answer that is to be learned: all have weight 0",
    ),
    "only an answer": (messages(ASSISTANT), "no turn of role 'user' before an answer"),
    "a late system prompt": (
        messages(USER, ASSISTANT, SYSTEM, USER, ASSISTANT),
        "a turn of role 'system' after the first one: chat templates have no place for it",
    ),
    "a call that is no JSON": (
        messages(
            USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
        ),
        "messages[1]: the tool call is not a name with JSON arguments",
    ),
    "a result without a call": (messages(USER, RESULT, ASSISTANT), "a tool's result without a call of it"),
    "an answer instead of a result": (
        messages(USER, CALLED, ASSISTANT),
        "an answer follows tool calls without their results",
    ),
    "an image": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
        "messages[0]: 'content' has a part of type 'image_url': only text is learned",
    ),
    "a call of Gemini's": (
        {"contents": [{"role": "user", "parts": [{"functionCall": {"name": "f"}}]}]},
        "messages[0]: 'content' has a part with functionCall: only text is learned",
    ),
    "three speakers": ({"dialogue": ["a", "b", "c"], "speakers": ["A", "B", "C"]}, "more than two speak"),
    "SQuAD's unanswerable question": (
        {"question": "ping", "context": "x", "answers": {"text": [], "answer_start": []}},
        "no answer: the context has none",
    ),
    "an empty text": ({"text": " \n"}, "an empty text"),
    "a pair with one answer": ({"prompt": "a", "chosen": "b", "rejected": None}, "'chosen' or 'rejected' is empty"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_learned_is_left_out_with_its_reason(case: str) -> None:
    record, reason = LEFT_OUT[case]
    with pytest.raises(Rejection) as raised:
        value(record)
    assert raised.value.reason == reason


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


NORMALIZED = {
    "turns of one role": (
        messages(SYSTEM, SYSTEM, USER, MORE, assistant("a"), assistant("b")),
        [
            {"role": "system", "content": "Be brief.\n\nBe brief."},
            {"role": "user", "content": "ping\n\nmore?"},
            assistant("a\n\nb"),
        ],
    ),
    "an answer first": (messages(assistant("Hello!"), *TALK), TALK),
    "a question last": (messages(*TALK, USER), TALK),
    "an empty system prompt": (
        messages({"role": "system", "content": ""}, *TALK),
        [{"role": "system", "content": ""}, *TALK],
    ),
    "other keys": (messages(USER | {"name": "x"}, ASSISTANT | {"id": 1}), TALK),
    "other marks of what is not learned": (
        messages(USER, assistant("a", train=False), MORE, assistant("b", loss_weight=1.0)),
        [USER, assistant("a", weight=0), MORE, assistant("b")],
    ),
    "null content": (messages(USER, {"role": "assistant", "content": None}), [USER, assistant("")]),
    "words before a call": (
        messages(USER, assistant("I look."), {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        [USER, assistant("I look.", tool_calls=[{"id": "call00001"} | CALL])],
    ),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_a_conversation_is_normalized(case: str) -> None:
    record, expected = NORMALIZED[case]
    assert value(record)["messages"] == expected


def test_what_normalization_did_is_counted() -> None:
    changes: Counter[str] = Counter()
    record = messages(ASSISTANT, USER, USER, ASSISTANT, USER)
    format_of(record).value(record, changes)
    assert changes == {
        "answers before the first question left out": 1,
        "turns of one role joined": 1,
        "turns after the last answer left out": 1,
    }


def test_results_follow_their_calls_in_order_whatever_tells_which_is_which() -> None:
    calls = [
        CALL | {"id": "a"},
        {"type": "function", "function": {"name": "other", "arguments": {}}},
        CALL | {"id": "c"},
    ]
    results = [
        {"role": "tool", "tool_call_id": "c", "content": "third"},
        {"role": "tool", "name": "other", "content": "second"},
        {"role": "tool", "content": "first"},
    ]
    talk = value(messages(USER, assistant("", tool_calls=calls), *results, ASSISTANT))["messages"]
    assert [message["content"] for message in talk[2:5]] == ["first", "second", "third"]
    assert [message["tool_call_id"] for message in talk[2:5]] == [call["id"] for call in talk[1]["tool_calls"]]
