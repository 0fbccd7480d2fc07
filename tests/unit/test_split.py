"""Duplicates and the split: what is alike is on one side, and stays there when rows are added."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.recipe import Clean, Data
from train.cleaning.duplicates import RUN, TEMPLATE_ROWS, equal, held_back, joined, near, same_prompt, sides, signatures

REPOSITORY = Path(__file__).parents[2]
DATA = Data(validation=0.3)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def talk(*said: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def sentence(seed: object, words: int = 30) -> str:
    """Made-up words, others for another seed."""
    chance = random.Random(str(seed))
    return " ".join("".join(chance.choices(LETTERS, k=chance.randint(2, 9))) for _ in range(words))


def distinct(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [talk(sentence(number), sentence(-number)) for number in range(start, start + count)]


def changed(value: dict[str, Any], seed: object) -> dict[str, Any]:
    """The row with one word of its question replaced."""
    words = value["messages"][0]["content"].split()
    words[random.Random(str(seed)).randrange(len(words))] = "otherwise"
    return talk(" ".join(words), value["messages"][1]["content"])


def on_sides(values: list[dict[str, Any]], data: Data = DATA) -> list[bool]:
    return list(sides(signatures(values, 0), data)[1])


def jaccard(one: str, other: str) -> float:
    first, second = ({text[at : at + RUN] for at in range(len(text) - RUN + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("alphabet", [LETTERS, "日本語学習者会話例文章"])
def test_the_estimated_similarity_is_the_real_one(alphabet: str) -> None:
    chance = random.Random(0)
    letters = [chance.choice(alphabet) for _ in range(400)]
    texts = ["".join(letters)]
    for _ in range(80):
        letters[chance.randrange(len(letters))] = chance.choice(LETTERS.upper())
        texts.append("".join(letters))
    rows = signatures([{"text": text} for text in texts], 0)
    sketches = rows["sketch"]
    estimated = ((sketches == sketches[0]).mean(axis=1) - 1 / 256) / (1 - 1 / 256)
    real = np.array([jaccard(texts[0].casefold(), text.casefold()) for text in texts])
    assert real.min() < 0.3
    # The standard error of 128 hashes is at most 0.044; four of them leave 1 of 16,000 estimates outside.
    assert np.abs(estimated - real).max() < 4 * 0.044


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (talk("a", "b"), talk("a", "b"), True),
        (talk(sentence(1), sentence(2)), changed(talk(sentence(1), sentence(2)), 0), True),
        (talk(sentence(1), sentence(2)), talk(sentence(1).upper(), f" {sentence(2)}\n"), True),
        (talk(sentence(1), sentence(2), system="one"), talk(sentence(1), sentence(2), system="other"), True),
        (talk(sentence(1), sentence(2)), talk(sentence(3), sentence(2)), False),
        (talk(sentence(1), sentence(2)), talk(sentence(1), sentence(3)), False),
        (talk("What is 2 + 2?", "4"), talk("What is 2 + 3?", "5"), False),
        (
            talk("日本の首都はどこですか？", "東京です。人口は約千四百万人で、世界でも最大級の都市のひとつです。"),
            talk("日本の首都はどこですか。", "東京です。人口は約千四百万人で、世界でも最大級の都市のひとつです。"),
            True,
        ),
        ({"text": sentence(1)}, {"text": sentence(1) + "."}, True),
        ({"text": ""}, {"text": "a"}, False),
    ],
)
def test_what_a_near_duplicate_is(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    assert list(near(signatures([one, other], 0), 0.8)) == [0, 0 if alike else 1]


def test_a_signature_is_the_same_alone_and_among_others() -> None:
    values = [talk("a", "b"), {"text": ""}, *distinct(3), talk("你好", "🙂")]
    alone = np.concatenate([signatures([value], 7) for value in values])
    assert (alone == signatures(values, 7)).all()
    assert len(signatures([], 7)) == 0


def test_equal_rows_have_the_first_one_s_label() -> None:
    one, two, three = distinct(3)
    assert list(equal(signatures([one, two, one, three, two, one], 0))) == [0, 1, 0, 3, 1, 0]


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    links = [talk(sentence(1), sentence(2))]
    for step in range(12):
        links.append(changed(links[-1], step))
    others = distinct(30, start=100)
    rows = signatures([*others[:15], *links, *others[15:]], 0)
    assert near(rows[[15, 27]], 0.8)[1] == 1, "the ends alone are no near duplicates"
    assert list(near(rows, 0.8)) == [*range(15), *[15] * 13, *range(28, 43)]


def test_answers_to_the_same_prompt_are_one_cluster() -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "x", "arguments": {"y": "z"}}}]}
    values = [
        talk("Why not now?", sentence(1)),
        talk("Who?", sentence(2)),
        talk("why not, now", sentence(3), system="Answer like a pirate."),
        {"text": "Why not now?"},
        talk("Why not now?", "Because.", "Why not now?", sentence(4)),
        {"messages": [talk("Why not now?")["messages"][0], calling, {"role": "tool", "content": sentence(5)}, calling]},
        talk("🙂", sentence(6)),
        talk("🙁", sentence(7)),
        talk(system="Say something.") | {"messages": [{"role": "assistant", "content": sentence(8)}]},
        talk(system="Say something.") | {"messages": [{"role": "assistant", "content": sentence(9)}]},
    ]
    rows = signatures(values, 0)
    assert list(same_prompt(rows, near(rows, 0.8))) == [0, 1, 0, 3, 4, 5, 6, 7, 8, 9]


def test_joining_is_what_a_search_through_the_pairs_finds() -> None:
    chance = random.Random(1)
    for _ in range(50):
        size = chance.randint(1, 30)
        pairs = [(chance.randrange(size), chance.randrange(size)) for _ in range(chance.randint(0, 30))]
        label = list(range(size))
        for _ in range(size):
            for left, right in pairs:
                label[left] = label[right] = min(label[left], label[right])
        left, right = np.array(pairs, int).reshape(-1, 2).T
        assert list(joined(np.arange(size), left, right)) == label


def test_the_shipped_conversations_have_one_pair_of_near_duplicates() -> None:
    lines = (REPOSITORY / "recipes" / "assistant.jsonl").read_text(encoding="utf-8").splitlines()
    rows = signatures([json.loads(line) for line in lines], 0)
    numbers = np.arange(len(rows))
    assert (equal(rows) == numbers).all() and (same_prompt(rows, numbers) == numbers).all()
    labels = near(rows, Clean().similarity)
    # "I forgot my API key." and "Show me my API key." with the same long answer: 0.86 by their real runs.
    assert [(label + 1, place + 1) for place, label in enumerate(labels) if label != place] == [(174, 365)]


def test_the_shipped_conversations_are_split_by_the_hash_of_each() -> None:
    lines = (REPOSITORY / "recipes" / "assistant.jsonl").read_text(encoding="utf-8").splitlines()
    held = on_sides([json.loads(line) for line in lines], Data())
    hashes = [hashlib.sha256(json.dumps([0, json.loads(line)], sort_keys=True).encode()).digest() for line in lines]
    assert held == [int.from_bytes(digest[:8], "big") / 2**64 < 0.1 for digest in hashes]
    assert sum(held) == 45, "what the losses of the default recipe were measured on"


def test_the_split_is_the_same_each_time_and_another_with_another_seed() -> None:
    values = distinct(99)
    assert on_sides(values) == on_sides(values)
    assert on_sides(values) != list(sides(signatures(values, 1), DATA)[1])


def test_the_split_has_about_the_share_that_was_asked_for() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    held = held_back(digests, np.arange(10_000), 0.3, 10_000)
    assert abs(held.mean() - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5


def test_the_order_of_the_file_moves_no_conversation() -> None:
    values = distinct(60)
    assert on_sides(values) == on_sides(values[::-1])[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_added_rows_move_no_conversation(seed: int) -> None:
    values = distinct(60)
    added = [*distinct(60, start=200), *(changed(value, seed) for value in values), *values]
    random.Random(seed).shuffle(added)
    before = on_sides(values)
    for count in (1, 30, len(added)):
        assert on_sides(values + added[:count])[: len(values)] == before


def test_near_duplicates_and_answers_to_one_prompt_are_on_one_side() -> None:
    values = distinct(60)
    groups = [[value, value, changed(value, 1), talk(value["messages"][0]["content"], "else")] for value in values]
    data = Data(validation=0.3, clean=Clean(duplicates=False))
    held = np.array(on_sides([value for group in groups for value in group], data)).reshape(60, 4)
    assert 0 < held[:, 0].sum() < 60
    assert (held == held[:, :1]).all()


def test_equal_rows_are_kept_once_near_ones_too_if_that_is_asked_for() -> None:
    one, two = distinct(2)
    rows = signatures([one, one, changed(one, 1), two], 0)

    def kept(**settings: bool) -> list[int]:
        return list(sides(rows, Data(clean=Clean(**settings)))[0])

    assert kept() == [0, 0, 2, 3]
    assert kept(near_duplicates=True) == [0, 0, 0, 3]
    assert kept(duplicates=False) == [0, 1, 2, 3]


def test_validation_has_an_upper_bound() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    held = held_back(digests, np.arange(100_000), 0.1, 1000)
    assert 500 < held.sum() <= 1000
    fewer = held_back(digests, np.arange(100_000), 0.1, 300)
    assert fewer.sum() <= 300 and not (fewer & ~held).any(), "the fewest of those that were held back before"


def test_a_file_that_grows_past_the_bound_moves_rows_to_training_only() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 4000, np.uint64)
    before = np.zeros(0, bool)
    for size in range(100, 4001, 100):
        held = held_back(digests[:size], np.arange(size), 0.1, 100)
        assert not (held[: len(before)] & ~before).any()
        before = held


def test_a_small_file_still_gives_both_sides() -> None:
    assert sum(on_sides(distinct(3), Data(validation=0.001))) == 1


def test_a_share_of_zero_holds_nothing_back() -> None:
    assert on_sides(distinct(5), Data(validation=0)) == [False] * 5


def test_no_rows_are_no_error() -> None:
    assert on_sides([]) == []


def test_a_template_that_all_share_is_no_duplicate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    values = [talk(f"{sentence(0, 200)} {sentence(number, 5)}", "yes") for number in range(TEMPLATE_ROWS + 20)]
    held = on_sides([*values, *values], Data(validation=0.3, clean=Clean(duplicates=False)))
    assert held[: len(values)] == held[len(values) :] and 0 < sum(held) < len(held)
    assert f"{2 * len(values)} of {2 * len(values)} rows are alike" in caplog.text
