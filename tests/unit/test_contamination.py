"""Held-out questions in the training data: found where they are asked or quoted, and nowhere else."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from train.cleaning.contamination import check, questions
from train.reading.row import Rejection, Row

REPOSITORY = Path(__file__).parents[2]
QUESTION = "Which quantization loses the least accuracy, and how many bits does a weight of it have?"


def talk(*said: str) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    return {"messages": turns}


TRAVEL = talk("A plane goes 1200 miles in 3 hours. How many more hours would it take to go an additional 2000 miles?")


def found(value: dict[str, Any], *asked: dict[str, Any]) -> str | None:
    held_out = questions([Row(row, f"q.jsonl:{number}") for number, row in enumerate(asked, 1)], 0.8)
    try:
        check(value, pickle.loads(pickle.dumps(held_out)))  # as it comes to another process
    except Rejection as rejection:
        assert rejection.step == "contamination"
        return rejection.reason
    return None


@pytest.mark.parametrize(
    "value",
    [
        talk(QUESTION, "Q8_0."),
        talk("Hello", "Hi.", QUESTION, "Q8_0."),
        talk(QUESTION.upper().replace(",", " - "), "Q8_0."),
        talk(QUESTION.replace("loses", "looses"), "Q8_0."),
        talk(f"{QUESTION} Please answer in one short sentence and add a friendly greeting for my colleague.", "Q8_0."),
        talk("Write an exam question.", f"Here is one: {QUESTION}"),
        {"text": f"Question: {QUESTION} Answer: Q8_0."},
    ],
)
def test_a_question_is_found(value: dict[str, Any]) -> None:
    assert found(value, talk("Who?"), talk(QUESTION)) == "has the held-out question of q.jsonl:2 in it"


@pytest.mark.parametrize(
    "value",
    [
        talk("Which quantization is the smallest?", "Q4_K_M."),
        talk("How many bits does a weight have?", "8."),
        talk("Which types are there?", "The quantization that loses the least accuracy has 8 bits a weight."),
        talk("Who are you? And who am I?", "x"),
        talk("What is 17 + 26?", "43"),
        talk("Hi there!", "Who?"),
        talk("?", "..."),
        talk(
            "A train goes 270 miles in 3 hours. How many more hours would it take to go an additional 180 miles?", "2"
        ),
        {"text": ""},
    ],
)
def test_another_question_on_the_same_subject_stays(value: dict[str, Any]) -> None:
    assert found(value, talk("Who?"), talk("Who are you?"), talk("What is 17 + 25?"), TRAVEL, talk(QUESTION)) is None


def test_a_question_of_several_turns_is_found_by_all_of_them() -> None:
    asked = talk("What is the capital of Italy?", "Rome.", "And of Spain?")
    assert found(talk("And of Spain?", "x"), asked) is None
    assert found(talk("Hi", "x", "What is the capital of Italy?", "It is Rome.", "and of Spain", "x"), asked)


def test_a_template_that_the_questions_share_is_not_looked_at() -> None:
    template = "Classify the sentiment of the following sentence of a film review as positive or negative: "
    asked = [talk(template + film) for film in ("a dull remake", "what a joy", "two lost hours", "see it twice", "meh")]
    assert found(talk(f"{template}moving from the first minute on", "positive"), *asked) is None
    assert (
        found(talk(f"{template}two lost hours", "negative"), *asked) == "has the held-out question of q.jsonl:3 in it"
    )


def test_a_question_in_another_script_is_found() -> None:
    asked = "用一句话介绍一下你自己和你所在的项目好吗？"
    assert found(talk(asked.replace("好吗？", "好吗"), "x"), talk(asked))
    assert found(talk("今天的天气怎么样？", "x"), talk(asked)) is None


def test_no_questions_find_nothing() -> None:
    assert (
        found(
            talk("", ""),
        )
        is None
    )


def test_the_shipped_conversations_hold_no_held_out_question() -> None:
    asked, learned = (
        [json.loads(line) for line in (REPOSITORY / "recipes" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("assistant.heldout.jsonl", "assistant.jsonl")
    )
    held_out = questions([Row(row, str(number)) for number, row in enumerate(asked)], 0.8)
    assert len(held_out.places) == 50
    for row in learned:
        check(row, held_out)
    for row in asked:
        with pytest.raises(Rejection):
            check({"messages": [*row["messages"], {"role": "assistant", "content": "x"}]}, held_out)
