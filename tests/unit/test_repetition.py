"""The repetition filter, by the bounds of Gopher's table A1."""

import json
from pathlib import Path

import pytest

from pipeline.recipe import Clean
from train.cleaning.clean import WORDS, clean, repeats
from train.reading.row import Rejection

REPOSITORY = Path(__file__).parents[2]
PROSE = (REPOSITORY / "LICENSE").read_text(encoding="utf-8").split("1. Definitions.")[1][:2000]
DISTINCT = [f"word{number}" for number in range(400)]


def test_prose_repeats_nothing() -> None:
    assert repeats(PROSE) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("the " * 60, "'the the' alone is 100% of the characters"),
        ("\n".join([*DISTINCT[:60], *["again"] * 40]), "39 of 100 lines stand there before"),
        ("\n".join([*DISTINCT[:60], *["x" * 100] * 5]), "repeated lines are 47% of the characters"),
        ("\n\n".join([" ".join(DISTINCT[:60]), *["I am sorry.", "Really."] * 4]), "6 of 9 lines stand there before"),
        (" ".join([*DISTINCT[:60], *[f"truly wonderful {place}" for place in range(20)]]), "'truly wonderful' alone"),
        (
            " ".join(DISTINCT[:60] + DISTINCT[:60]),
            "phrases of 5 words that were there before are 50% of the characters",
        ),
    ],
)
def test_a_repetition_is_told(text: str, told: str) -> None:
    assert str(repeats(text)).startswith(told)


@pytest.mark.parametrize("share", [0.10, 0.20])
def test_the_bound_of_repeated_phrases_is_gophers(share: float) -> None:
    again = round(400 * share)
    words = [f"w{number:03}" for number in range(400 - again)]
    assert (repeats(" ".join(words + words[:again])) is not None) == (share > 0.15)


def test_short_answers_and_code_may_repeat() -> None:
    assert repeats("no " * (WORDS - 1)) is None
    answer = f"Here it is:\n```\n{'0, 0, 0, 0,' * 99}\n```\n"
    row = {"messages": [{"role": "user", "content": "the " * 99}, {"role": "assistant", "content": answer}]}
    assert clean(row, Clean(repetition=True)) == (row, [])


def test_an_answer_that_repeats_itself_is_rejected_if_that_is_asked_for() -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the " * 99}]}
    assert clean(row, Clean()) == (row, [])
    with pytest.raises(Rejection) as raised:
        clean(row, Clean(repetition=True))
    assert raised.value.step == "repetition"
    with pytest.raises(Rejection):
        clean({"text": "the " * 99}, Clean(repetition=True))


def test_the_shipped_conversations_repeat_nothing() -> None:
    for line in (REPOSITORY / "recipes" / "assistant.jsonl").read_text(encoding="utf-8").splitlines():
        clean(json.loads(line), Clean(repetition=True))
