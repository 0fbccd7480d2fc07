"""Every format: a row in the shape of each public set and what it becomes; a file of several."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import found_in

from train.reading.formats import format_of

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
