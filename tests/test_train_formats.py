"""Every format: a row in the shape of each public set and what it becomes; what is left out, and what is wrong."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from train.reading.formats import Detected, Read, detect, format_of, rows, whole_chunks
from train.reading.row import Rejection
from train.reading.sources import Source

USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, ASSISTANT]
WORSE = [USER, {"role": "assistant", "content": "pang"}]
SCHEMA = {"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001"} | CALL]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "18 degrees"}
WITH_TOOLS = {"messages": [USER, CALLED, RESULT, ASSISTANT], "tools": TOOLS}
HH = "\n\nHuman: ping\n\nAssistant: %s\n\nHuman: more?\n\nAssistant: %s"
MORE = {"role": "user", "content": "more?"}


def node(name: str, parent: str | None, role: str, content: Any, **more: Any) -> dict[str, Any]:
    """A node of ChatGPT's `mapping`."""
    told = content if isinstance(content, dict) else {"content_type": "text", "parts": [content]}
    message = {"author": {"role": role}, "content": told, "recipient": "all", "metadata": {}} | more
    return {name: {"id": name, "parent": parent, "children": [], "message": message}}


CHATGPT = {
    "title": "t",
    "current_node": "f",
    "mapping": {"r": {"id": "r", "parent": None, "children": ["a"], "message": None}}
    | node("a", "r", "system", "", metadata={"is_visually_hidden_from_conversation": True})
    | node("b", "a", "user", {"content_type": "multimodal_text", "parts": ["ping"]})
    | node("other", "b", "assistant", "another branch")
    | node("c", "b", "assistant", {"content_type": "code", "text": "search('ping')"}, recipient="browser")
    | node("d", "c", "tool", "found")
    | node("e", "d", "assistant", {"content_type": "thoughts", "thoughts": [{"content": "hm"}]})
    | node("f", "e", "assistant", "pong"),
}
OPEN_WEBUI = {
    "id": "1",
    "title": "t",
    "chat": {
        "params": {"system": "Be brief."},
        "history": {
            "currentId": "b",
            "messages": {
                "a": {"id": "a", "parentId": None, "childrenIds": ["x", "b"], "role": "user", "content": "ping"},
                "x": {"id": "x", "parentId": "a", "childrenIds": [], "role": "assistant", "content": "other"},
                "b": {
                    "id": "b",
                    "parentId": "a",
                    "childrenIds": [],
                    "role": "assistant",
                    "content": '<details type="reasoning">\n<summary>Thought</summary>\n> hm\n</details>\npong',
                },
            },
        },
    },
}
CLAUDE = {
    "uuid": "1",
    "name": "t",
    "chat_messages": [
        {"sender": "human", "text": "ping", "content": [{"type": "text", "text": "ping"}], "attachments": []},
        {"sender": "assistant", "text": "hm pong", "content": [{"type": "thinking"}, {"type": "text", "text": "pong"}]},
    ],
}
OASST_TREE = {
    "message_tree_id": "1",
    "prompt": {
        "role": "prompter",
        "text": "ping",
        "replies": [
            {"role": "assistant", "text": "pang", "rank": 1, "replies": []},
            {"role": "assistant", "text": "pong", "rank": 0, "replies": [{"role": "prompter", "text": "so?"}]},
        ],
    },
}
GLAIVE = {
    "system": "SYSTEM: You are helpful with access to the following functions. Use them if required -\n"
    + json.dumps(SCHEMA, indent=4)
    + "\n",
    "chat": 'USER: ping\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{"city": "Paris"}\'} '
    "<|endoftext|>\n\n\nFUNCTION RESPONSE: 18 degrees\n\n\nASSISTANT: pong <|endoftext|>\n\n\n",
}

# The columns of public sets as their cards and files have them; the words are ours.
SHAPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "OpenAI": ("OpenAI messages", {"messages": TALK}, {"messages": TALK}),
    "OpenAI, parts": (
        "OpenAI messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "ping"}]}, ASSISTANT]},
        {"messages": TALK},
    ),
    "OpenAI, developer": (
        "OpenAI messages",
        {"messages": [{"role": "developer", "content": "Be brief."}, *TALK]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "OpenAI, tools": (
        "OpenAI messages",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "call00001", "type": "function"}
                        | {"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "call00001", "content": "18 degrees"},
                ASSISTANT,
            ],
            "tools": TOOLS,
            "parallel_tool_calls": False,
        },
        WITH_TOOLS,
    ),
    "OpenAI, functions of 2023": (
        "OpenAI messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": CALL["function"]},
                {"role": "function", "name": "get_weather", "content": "18 degrees"},
                ASSISTANT,
            ],
            "functions": [SCHEMA],
        },
        WITH_TOOLS,
    ),
    "OpenAI, reasoning and weight": (
        "OpenAI messages",
        {"messages": [USER, ASSISTANT | {"weight": 0}, MORE, ASSISTANT | {"reasoning_content": "hm", "weight": 1}]},
        {"messages": [USER, ASSISTANT | {"weight": 0}, MORE, ASSISTANT | {"reasoning_content": "hm"}]},
    ),
    "a list of turns": ("lists of messages", TALK, {"messages": TALK}),
    "UltraChat-200k": (
        "OpenAI messages",
        {"prompt": "ping", "prompt_id": "7", "messages": TALK},
        {"messages": TALK},
    ),
    "no_robots": (
        "OpenAI messages",
        {"prompt": "ping", "prompt_id": "7", "messages": [SYSTEM, *TALK], "category": "Chat"},
        {"messages": [SYSTEM, *TALK]},
    ),
    "ShareGPT52K": (
        "ShareGPT",
        {"id": "x_0", "conversations": [{"from": "human", "value": "ping"}, {"from": "gpt", "value": "pong"}]},
        {"messages": TALK},
    ),
    "OpenHermes-2.5": (
        "ShareGPT",
        {
            "custom_instruction": None,
            "source": "airoboros2.2",
            "system_prompt": None,
            "idx": None,
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "ping", "weight": None},
                {"from": "gpt", "value": "pong", "weight": None},
            ],
        },
        {"messages": [SYSTEM, *TALK]},
    ),
    "ShareGPT of LLaMA-Factory, tools": (
        "ShareGPT",
        {
            "conversations": [
                {"from": "human", "value": "ping"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "18 degrees"},
                {"from": "gpt", "value": "pong"},
            ],
            "tools": json.dumps([SCHEMA]),
        },
        WITH_TOOLS,
    ),
    "conversations with roles": ("OpenAI messages", {"conversations": TALK}, {"messages": TALK}),
    "LMSYS-Chat-1M": ("OpenAI messages", {"conversation_id": "7", "conversation": TALK}, {"messages": TALK}),
    "Alpaca": (
        "Alpaca",
        {"instruction": "Add them.", "input": "1 and 2", "output": "3", "text": "Below is an instruction..."},
        {"messages": [{"role": "user", "content": "Add them.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]},
    ),
    "Alpaca without input": ("Alpaca", {"instruction": "ping", "input": "", "output": "pong"}, {"messages": TALK}),
    "Alpaca of LLaMA-Factory": (
        "Alpaca",
        {"instruction": "more?", "output": "pong", "system": "Be brief.", "history": [["ping", "pong"]]},
        {"messages": [SYSTEM, *TALK, MORE, ASSISTANT]},
    ),
    "dolly-15k": (
        "Dolly",
        {"instruction": "ping", "context": "", "response": "pong", "category": "open_qa"},
        {"messages": TALK},
    ),
    "prompt and completion": ("prompt and completion", {"prompt": "ping", "completion": "pong"}, {"messages": TALK}),
    "prompt and completion of turns": (
        "prompt and completion",
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "gsm8k": ("question and answer", {"question": "ping", "answer": "pong"}, {"messages": TALK}),
    "MetaMathQA": (
        "question and answer",
        {"type": "GSM_AnsAug", "query": "ping", "original_question": "p", "response": "pong"},
        {"messages": TALK},
    ),
    "OpenOrca": (
        "question and answer",
        {"id": "1", "system_prompt": "Be brief.", "question": "ping", "response": "pong"},
        {"messages": [SYSTEM, *TALK]},
    ),
    "UltraFeedback binarized": (
        "preference pairs",
        {
            "prompt": "ping",
            "prompt_id": "7",
            "chosen": TALK,
            "rejected": WORSE,
            "messages": TALK,
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        {"messages": TALK, "rejected": WORSE},
    ),
    "preference, explicit turns": (
        "preference pairs",
        {"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": WORSE[1:]},
        {"messages": [SYSTEM, *TALK], "rejected": [SYSTEM, *WORSE]},
    ),
    "preference, plain": (
        "preference pairs",
        {"system": "Be brief.", "question": "ping", "chosen": "pong", "rejected": "pang"},
        {"messages": [SYSTEM, *TALK], "rejected": [SYSTEM, *WORSE]},
    ),
    "preference, plain and without a prompt": (
        "preference pairs",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"text": "The sky is blue.", "rejected": "The sky is green."},
    ),
    "preference of LLaMA-Factory": (
        "preference pairs",
        {
            "conversations": [{"from": "human", "value": "ping"}],
            "chosen": {"from": "gpt", "value": "pong"},
            "rejected": {"from": "gpt", "value": "pang"},
        },
        {"messages": TALK, "rejected": WORSE},
    ),
    "HH-RLHF": (
        "preference pairs",
        {"chosen": HH % ("pong", "yes"), "rejected": HH % ("pong", "no")},
        {
            "messages": [*TALK, MORE, {"role": "assistant", "content": "yes"}],
            "rejected": [*TALK, MORE, {"role": "assistant", "content": "no"}],
        },
    ),
    "HH-RLHF with its prompt apart": (
        "preference pairs",
        {"prompt": "\n\nHuman: ping\n\nAssistant:", "chosen": " pong", "rejected": " pang"},
        {"messages": TALK, "rejected": WORSE},
    ),
    "HH-RLHF that parts earlier": (
        "preference pairs",
        {"chosen": HH % ("pong", "yes"), "rejected": HH % ("pang", "no")},
        {"messages": [*TALK, MORE, {"role": "assistant", "content": "yes"}]},
    ),
    "KTO-mix-14k": (
        "KTO",
        {"dataset": "x", "prompt": [USER], "completion": [ASSISTANT], "label": True},
        {"messages": TALK, "label": True},
    ),
    "KTO, plain, from a table": (
        "KTO",
        {"prompt": "ping", "completion": "pong", "label": "True"},
        {"messages": TALK, "label": True},
    ),
    "KTO of LLaMA-Factory": ("KTO", {"messages": TALK, "kto_tag": True}, {"messages": TALK, "label": True}),
    "WikiText": ("plain text", {"text": " = Valkyria = \n"}, {"text": " = Valkyria = \n"}),
    "glaive-function-calling": (
        "Glaive function calling",
        GLAIVE,
        {
            "messages": [{"role": "system", "content": "You are helpful."}, *WITH_TOOLS["messages"]],
            "tools": TOOLS,
        },
    ),
    "glaive without functions": (
        "Glaive function calling",
        {"system": "SYSTEM: Be brief.", "chat": "USER: ping\n\n\nASSISTANT: pong <|endoftext|>"},
        {"messages": [SYSTEM, *TALK]},
    ),
    "oasst1 trees": ("OpenAssistant trees", OASST_TREE, {"messages": TALK}),
    "ChatGPT's conversations.json": ("ChatGPT export", CHATGPT, {"messages": TALK}),
    "Open WebUI's chats": ("Open WebUI export", OPEN_WEBUI, {"messages": [SYSTEM, *TALK]}),
    "Open WebUI's older chats": ("Open WebUI export", {"chat": {"messages": TALK}}, {"messages": TALK}),
    "Claude's conversations.json": ("Claude export", CLAUDE, {"messages": TALK}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_is_recognized_and_read(name: str) -> None:
    format, record, value = SHAPES[name]
    assert format_of(record).name == format
    assert format_of(record).value(record, Counter()) == value


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
    "message no object": (messages("ping"), "messages[0] is not an object with 'role' and 'content'"),
    "no role": (messages({"content": "x"}), "messages[0]: unknown role None: choose one of: system, user, assistant"),
    "unknown role": (messages(USER, {"role": "narrator", "content": "x"}), "messages[1]: unknown role 'narrator'"),
    "role no text": (messages({"role": ["user"], "content": "x"}), "messages[0]: unknown role ['user']"),
    "no content": (messages({"role": "user", "text": "x"}), "messages[0] has no 'content': its keys are role, text"),
    "content a number": (messages({"role": "user", "content": 1}), "messages[0]: 'content' must be text, it is int"),
    "an image": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
        "messages[0]: 'content' has a part of type 'image_url': only text is learned, leave such rows out",
    ),
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


PICTURE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://file-7"}
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
    "an empty text": ({"text": " \n"}, "an empty text"),
    "a pair with one answer": ({"prompt": "a", "chosen": "b", "rejected": None}, "'chosen' or 'rejected' is empty"),
    "a picture in ChatGPT": (
        {"mapping": node("f", None, "user", {"content_type": "multimodal_text", "parts": [PICTURE]})},
        "shows an image: only text is learned",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_learned_is_left_out_with_its_reason(case: str) -> None:
    record, reason = LEFT_OUT[case]
    with pytest.raises(Rejection) as raised:
        value(record)
    assert raised.value.reason == reason


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SILENT = {"role": "system", "content": ""}
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


def read(name: str, *records: Any) -> tuple[Detected, Read]:
    """A file of these records, detected and read whole."""
    path = Path(name)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(name)
    detected, read = detect(source), Read()
    for chunk in whole_chunks(source, detected.format):
        more = rows(detected, chunk)
        read.rows += more.rows
        read.rejected += more.rejected
        read.problems += more.problems
    return detected, read


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_mixed_file_is_told_with_both_lines() -> None:
    _, mixed = read("mixed.jsonl", {"messages": TALK}, {"instruction": "a", "output": "b"}, {"messages": TALK})
    assert list(map(str, mixed.problems)) == [
        "mixed.jsonl:2: is Alpaca, but mixed.jsonl:1 is OpenAI messages: put each format in a file of its own"
    ]
    assert [row.place for row in mixed.rows] == ["mixed.jsonl:1", "mixed.jsonl:3"]


def test_detection_names_format_columns_and_line() -> None:
    detected, _ = read("talks.jsonl", 7, {"id": 1, "messages": TALK})
    assert (detected.format.name, detected.columns, detected.place) == (
        "OpenAI messages",
        ("id", "messages"),
        "talks.jsonl:2",
    )


def test_bad_answers_of_kto_are_left_out_with_the_reason() -> None:
    _, kto = read("kto.jsonl", *({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    assert [row.place for row in kto.rows] == ["kto.jsonl:1"]
    assert [(lost.place, lost.rejection.step) for lost in kto.rejected] == [("kto.jsonl:2", "label")]


def test_messages_of_openassistant_become_the_best_thread_of_each_tree() -> None:
    def message(name: str, parent: str | None, text: str, rank: int | None = None) -> dict[str, Any]:
        role = "assistant" if text.startswith("p") and parent else "prompter"
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "lang": "en"}

    tree = [message("1", None, "ping"), message("2", "1", "pang", 1), message("3", "1", "pong", 0)]
    detected, found = read("oasst.jsonl", *tree, message("9", None, "Anyone?"))
    assert detected.format.name == "OpenAssistant messages"
    assert [(row.value, row.place) for row in found.rows] == [({"messages": TALK}, "oasst.jsonl:1")]
    assert [lost.place for lost in found.rejected] == ["oasst.jsonl:4"]
    assert found.problems == []
