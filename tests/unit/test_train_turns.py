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


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


WRONG: dict[str, tuple[Any, str]] = {
    "no object": (
        7,
        "not an object with named columns but int: name them (of a table: in its first line)",
    ),
    "null": (None, "not an object with named columns but NoneType"),
    "no columns": ({}, "no format has the columns (none): name them"),
    "unknown columns": (
        {"sentence": "x", "label": 1},
        "no format has the columns sentence, label: set in the recipe what they are, as data: {columns: {text: "
        "sentence}}, or name them (of a table: in its first line) as one of: messages",
    ),
    "a question and an answer of other names": (
        {"id": "7", "Frage: was": "Was ist das?", "Antwort": "Ein Stein.", "n": 3},
        "no format has the columns id, Frage: was, Antwort, n: set in the recipe what they are, as data: {columns: "
        "{prompt: 'Frage: was', answer: Antwort}}, or name them",
    ),
    "turns of another name": (
        {"gespräch": TALK},
        "no format has the columns gespräch: set in the recipe what they are, as data: {columns: {messages: gespräch}}",
    ),
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
        "messages[0]: 'content' has a broken surrogate pair (a cut emoji): fix it",
    ),
    "tools no list": (messages(*TALK, tools="{"), "'tools' is text that is not JSON ('{')"),
    "a tool without a name": (messages(*TALK, tools=[{}]), "a tool without 'name'"),
    "history no pairs": ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be a list of [ques"),
    "half a weight": (
        messages(USER, ASSISTANT | {"weight": 0.5}),
        "messages[1]: 'weight' is 0.5: a turn is learned or not, give true or false, 1 or 0",
    ),
    "marks that contradict": (
        messages(USER, ASSISTANT | {"train": True, "masked": True}),
        "messages[1]: 'train' and 'masked' contradict each other: keep one",
    ),
    "a whole turn's mark against its spans": (
        messages(
            USER, ASSISTANT | {"weight": 0, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}
        ),
        "messages[1]: what it says of its parts contradicts what it says of the whole turn: keep one",
    ),
    "a whole turn's mark against its parts": (
        messages(USER, assistant(None, train=True) | {"content": [{"type": "text", "text": "a", "train": False}]}),
        "messages[1]: what it says of its parts contradicts what it says of the whole turn: keep one",
    ),
    "a row's marks that contradict": (messages(*TALK, train=True, masked="1"), "'train' and 'masked' contradict each"),
    "a row's weight that is no number": (
        messages(*TALK, weight="abc"),
        "'weight' is 'abc': give 1 or 0, and how much a file counts by data.weights",
    ),
    "a mark of another name": (
        messages(USER, ASSISTANT | {"loss_mask": [0, 1]}),
        "messages[1]: 'loss_mask' looks like a mark of what is learned, and is not known: name it 'train'",
    ),
    "offsets beyond the text": (
        messages(USER, ASSISTANT | {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": True}]}),
        "messages[1]: 'train_detail' names characters 0 to 4, the last one included, of a text of 4",
    ),
    "offsets that overlap": (
        messages(USER, ASSISTANT | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}] * 2}),
        "messages[1]: 'train_detail' must say once, by true or false, whether a character is learned",
    ),
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
        "no answer that is to be learned: each is marked as one that is only read",
    ),
    "only an answer": (messages(ASSISTANT), "no turn of role 'user' before an answer"),
    "an image beside a text": (
        messages(USER | {"images": ["a.png"]}, ASSISTANT),
        "messages[0] has 'images': only text is learned",
    ),
    "a row that is not to be learned": (
        {"prompt": "a", "completion": "b", "weight": 0},
        "marked as not to be learned: 'weight' is 0",
    ),
    "answers of which one is learned, with a call": (
        messages(USER, assistant("a", weight=0), assistant("", tool_calls=[CALL])),
        "two answers in a row with thoughts or calls, of which only one is to be learned",
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
    "other keys": (messages(USER | {"time": "x"}, ASSISTANT | {"id": 1, "trained_by": "gpt-4"}), TALK),
    "names": (
        messages(USER | {"name": "Ada"}, USER | {"name": "Bo"}, ASSISTANT | {"name": "assistant"}),
        [USER | {"name": "Ada"}, USER | {"name": "Bo"}, ASSISTANT],
    ),
    "a late system prompt": (messages(*TALK, SYSTEM, *TALK), [*TALK, SYSTEM, *TALK]),
    "a system prompt after a greeting": (messages(assistant("Hello!"), SYSTEM, *TALK), [SYSTEM, *TALK]),
    "flags that are no thoughts": (
        messages(USER, assistant("a", reasoning="on"), MORE, assistant("b", reasoning={"effort": "low"})),
        [USER, assistant("a"), MORE, assistant("b")],
    ),
    "a refusal": (messages(USER, assistant(None, refusal="I cannot.")), [USER, assistant("I cannot.")]),
    "an end token at the end": (
        messages(USER | {"content": "ping</s>"}, assistant("a<|im_end|>\n<|endoftext|>")),
        [USER, assistant("a")],
    ),
    "text that is struck out": (messages(USER, assistant("<s>a</s>")), [USER, assistant("<s>a</s>")]),
    "axolotl's offsets": (
        messages(USER, assistant("bad good", train_detail=[{"begin_offset": 4, "end_offset": 7, "train": True}])),
        [USER, assistant("bad good", only_read=[[0, 4]])],
    ),
    "axolotl's offsets, none learned": (
        messages(*TALK, USER, assistant("bad", train_detail=[{"begin_offset": 0, "end_offset": 2, "train": False}])),
        [*TALK, USER, assistant("bad", weight=0)],
    ),
    "axolotl's parts": (
        messages(
            USER,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "bad ", "train": False}, {"type": "text", "text": "good"}],
            },
        ),
        [USER, assistant("bad good", only_read=[[0, 4]])],
    ),
    "an answer that is not learned before one that is": (
        messages(USER, assistant("a", training=False), assistant("b")),
        [USER, assistant("a\n\nb", only_read=[[0, 3]])],
    ),
    "torchtune's marks": (
        messages(USER | {"masked": True}, assistant("a", masked=True), MORE, assistant("b", masked=False)),
        [USER, assistant("a", weight=0), MORE, assistant("b")],
    ),
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
