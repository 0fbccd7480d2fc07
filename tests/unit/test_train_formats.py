"""Every format: a row in the shape of each public set and what it becomes; a file of several."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import found_in

from train.reading.formats import format_of
from train.reading.row import spread

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
    "LIMA": ("lists of texts", {"conversations": ["ping", "pong"], "source": "x"}, {"messages": TALK}),
    "UltraChat": ("lists of texts", {"id": "0", "data": ["ping", "pong"]}, {"messages": TALK}),
    "SODA": (
        "lists of texts",
        {"dialogue": ["ping", "more?", "pong"], "speakers": ["Ann", "Ann", "Bob"], "narrative": "x"},
        {"messages": [{"role": "user", "content": "ping\n\nmore?"}, ASSISTANT]},
    ),
    "Capybara": (
        "lists of exchanges",
        {"source": "x", "conversation": [{"input": "ping", "output": "pong"}]},
        {"messages": TALK},
    ),
    "ms-swift's older exchanges": (
        "lists of exchanges",
        {"system": "Be brief.", "conversation": [{"human": "ping", "assistant": "pong"}]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "XTuner": (
        "lists of exchanges",
        {"conversation": [{"system": "Be brief.", "input": "ping", "output": "pong"}]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "MultiWOZ 2.2": (
        "dialogues",
        {
            "dialogue_id": "1",
            "services": ["x"],
            "turns": [
                {"speaker": "USER", "utterance": "ping", "frames": []},
                {"speaker": "SYSTEM", "utterance": "pong", "frames": []},
            ],
        },
        {"messages": TALK},
    ),
    "Gemini": (
        "Gemini",
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [{"role": "user", "parts": [{"text": "ping"}]}, {"role": "model", "parts": [{"text": "pong"}]}],
        },
        {"messages": [SYSTEM, *TALK]},
    ),
    "Bedrock": (
        "OpenAI messages",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "ping"}]},
                {"role": "assistant", "content": [{"text": "pong"}]},
            ],
        },
        {"messages": [SYSTEM, *TALK]},
    ),
    "LLaMA-Factory's parts": (
        "OpenAI messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "ping"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": json.dumps(CALL["function"])},
                    ],
                },
                {"role": "tool", "content": [{"type": "text", "value": "18 degrees"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "pong"}], "loss_weight": 1.0},
            ],
            "tools": json.dumps([SCHEMA]),
        },
        {"messages": [USER, CALLED | {"reasoning_content": "hm"}, RESULT, ASSISTANT], "tools": TOOLS},
    ),
    "ms-swift's history": (
        "question and answer",
        {"query": "more?", "response": "pong", "history": [["ping", "pong"]]},
        {"messages": [*TALK, MORE, ASSISTANT]},
    ),
    "sql-create-context": (
        "question and answer",
        {"question": "How many?", "context": "CREATE TABLE t (id INT)", "answer": "SELECT COUNT(*) FROM t"},
        {
            "messages": [
                {"role": "user", "content": "How many?\n\nCREATE TABLE t (id INT)"},
                {"role": "assistant", "content": "SELECT COUNT(*) FROM t"},
            ]
        },
    ),
    "Firefly": ("question and answer", {"kind": "x", "input": "ping", "target": "pong"}, {"messages": TALK}),
    "a table of a person's": ("question and answer", {"Question": "ping", "Answer ": "pong"}, {"messages": TALK}),
    "medical-o1": (
        "question and answer",
        {"Question": "ping", "Complex_CoT": "hm", "Response": "pong"},
        {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
    ),
    "Anthropic's thinking": (
        "OpenAI messages",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "pong"}],
                },
            ]
        },
        {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
    ),
    "a question with its reasoning": (
        "question and answer",
        {"question": "ping", "reasoning": "hm", "answer": "pong"},
        {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
    ),
    "an answer that looks like a list": (
        "Alpaca",
        {"instruction": "ping", "output": "[1, 2, 3]"},
        {"messages": [USER, {"role": "assistant", "content": "[1, 2, 3]"}]},
    ),
    "a column that is null": (
        "question and answer",
        {"question": "ping", "query": None, "answer": "pong", "output": None},
        {"messages": TALK},
    ),
    "SQuAD": (
        "SQuAD",
        {"id": "7", "question": "ping", "context": "pong", "answers": {"text": ["pong"], "answer_start": [0]}},
        {"messages": [{"role": "user", "content": "ping\n\npong"}, ASSISTANT]},
    ),
    "xLAM": (
        "function calls",
        {
            "id": 0,
            "query": "ping",
            "answers": json.dumps([CALL["function"]]),
            "tools": json.dumps([SCHEMA]),
        },
        {"messages": [USER, CALLED], "tools": TOOLS},
    ),
    "Baize": (
        "Baize",
        {"topic": "x", "input": "A conversation.\n[|Human|] ping\n[|AI|] pong\n[|Human|] "},
        {"messages": TALK},
    ),
    "OpenAI's preferences": (
        "preference pairs",
        {
            "input": {"messages": [USER], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [ASSISTANT],
            "non_preferred_output": WORSE[1:],
        },
        {"messages": TALK, "tools": TOOLS, "rejected": WORSE},
    ),
    "StackExchange, paired": (
        "preference pairs",
        {"qid": 1, "question": "ping", "response_j": "pong", "response_k": "pang"},
        {"messages": TALK, "rejected": WORSE},
    ),
    "The Stack": ("plain text", {"content": "print()", "path": "x.py"}, {"text": "print()"}),
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
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_is_recognized_and_read(name: str) -> None:
    format, record, value = SHAPES[name]
    (record,) = spread(record)
    assert format_of(record).name == format
    assert format_of(record).value(record, Counter()) == value


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_mixed_file_is_told_with_both_lines() -> None:
    _, mixed = found_in("mixed.jsonl", {"messages": TALK}, {"instruction": "a", "output": "b"}, {"messages": TALK})
    assert list(map(str, mixed.problems)) == [
        "mixed.jsonl:2: is Alpaca, but mixed.jsonl:1 is OpenAI messages: put each format in a file of its own"
    ]
    assert [row.place for row in mixed.rows] == ["mixed.jsonl:1", "mixed.jsonl:3"]


def test_detection_names_format_columns_and_line() -> None:
    detected, _ = found_in("talks.jsonl", 7, {"id": 1, "messages": TALK})
    assert (detected.format.name, detected.columns, detected.place) == (
        "OpenAI messages",
        ("id", "messages"),
        "talks.jsonl:2",
    )


def test_bad_answers_of_kto_are_left_out_with_the_reason() -> None:
    _, kto = found_in("kto.jsonl", *({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    assert [row.place for row in kto.rows] == ["kto.jsonl:1"]
    assert [(lost.place, lost.rejection.step) for lost in kto.rejected] == [("kto.jsonl:2", "label")]


def test_tasks_with_several_instances_are_several_rows() -> None:
    instances = [{"input": "1 1", "output": "2"}, {"input": "", "output": "0"}]
    detected, found = found_in("seed_tasks.jsonl", {"name": "x", "instruction": "Add.", "instances": instances})
    assert detected.format.name == "Alpaca"
    said = [[turn["content"] for turn in row.value["messages"]] for row in found.rows]
    assert said == [["Add.\n\n1 1", "2"], ["Add.", "0"]]
    assert [row.place for row in found.rows] == ["seed_tasks.jsonl:1"] * 2


def test_an_article_of_squad_is_a_row_a_question() -> None:
    asked = [{"id": name, "question": name, "answers": [{"text": f"{name}!", "answer_start": 0}]} for name in "ab"]
    never = {"id": "c", "question": "c", "answers": [], "is_impossible": True}
    article = {"title": "t", "paragraphs": [{"context": "x", "qas": [*asked, never]}]}
    detected, found = found_in("squad.json", {"version": "2.0", "data": [article]})
    assert detected.format.name == "SQuAD"
    assert [row.value["messages"][1]["content"] for row in found.rows] == ["a!", "b!"]
    assert [lost.rejection.reason for lost in found.rejected] == ["no answer: the context has none"]


@pytest.mark.parametrize("column", ["image", "images", "videos"])
def test_a_row_about_a_picture_is_left_out(column: str) -> None:
    pair = {"question": "Who is it?", "answer": "A cat."}
    _, found = found_in("seen.jsonl", pair | {column: ["cat.png"]}, pair | {column: None}, pair | {column: []})
    assert [row.place for row in found.rows] == ["seen.jsonl:2", "seen.jsonl:3"]
    assert [lost.rejection.reason for lost in found.rejected] == [f"has {column!r}: only text is learned"]


@pytest.mark.parametrize("of_list", [False, True])
def test_a_row_with_the_bytes_of_a_picture_is_left_out(of_list: bool) -> None:
    shown, blank = {"bytes": b"png", "path": None}, None
    images = [[shown], []] if of_list else [shown, blank]
    rows = [{"question": "Who?", "answer": "A cat.", "image": image, "hash": b"7"} for image in images]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "seen.parquet")
    _, found = found_in("seen.parquet")
    assert [row.place for row in found.rows] == ["seen.parquet:2"]
    assert [lost.value["image"] for lost in found.rejected] == [True]


@pytest.mark.parametrize("text", ["<|im_start|>user\nping<|im_end|>", "### Human: ping### Assistant: pong", "[INST] a"])
def test_a_text_that_is_a_rendered_conversation_is_counted(text: str) -> None:
    _, found = found_in("texts.jsonl", {"text": text}, {"text": "A text."})
    assert found.changes == {"texts that look like conversations in some template learned whole, questions too": 1}
