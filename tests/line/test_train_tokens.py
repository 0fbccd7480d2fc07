"""Tokens are made once, on any number of cores the same, and are those of each row alone."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import Recipe, UserError
from pipeline import rows as recipe_rows
from pipeline.rows import rows
from train import pool, tokens
from train.template import row_examples
from train.tokens import longest_and_sum, tokenized


def knobs(recipe: Recipe, **changed: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changed))


def files(based: Any) -> dict[str, bytes]:
    return {name: based.run.path("tokens", name).read_bytes() for name in based.files("tokens")}


@pytest.fixture
def many_batches(based: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The workplace with two rows a batch."""
    monkeypatch.setattr(recipe_rows, "ROWS_A_BATCH", 2)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "é🙂" * 99}]
    with Path("talks.jsonl").open("a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    based.run.receipt_path("data").unlink()
    based.make("data")
    return based


def test_the_tokens_are_those_of_each_row_alone(many_batches: Any, tokenizer: Any) -> None:
    made = tokenized(many_batches.recipe, many_batches.run)
    for part, dataset in made.datasets.items():
        alone = [row_examples(tokenizer, row, 160) for row in rows(many_batches.run.path("data"), part)]
        wanted = [asdict(example) for examples in alone for example in examples]
        assert list(dataset) == wanted
        assert made.counts[part] == {
            "rows": len(alone),
            "unshown": 0,
            "reasoning_lost": 0,
            "control_tokens": 0,
            "dropped": 0,
            "cut": sum(len(row["input_ids"]) == 160 for row in wanted),
            "examples": len(wanted),
            "tokens": sum(len(row["input_ids"]) for row in wanted),
            "supervised_tokens": sum(label != -100 for row in wanted for label in row["labels"]),
            "longest": max(len(row["input_ids"]) for row in wanted),
        }
    assert sum(part["cut"] for part in made.counts.values()) == 1
    assert longest_and_sum(made.datasets.values()) == (160, sum(part["tokens"] for part in made.counts.values()))


@pytest.mark.slow
def test_the_number_of_cores_changes_nothing(many_batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ALONE", 0)
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(tokens, "cores", lambda workers=workers: workers)
        tokenized(many_batches.recipe, many_batches.run)
        found.append(files(many_batches))
        many_batches.run.path("tokens").rename(f"tokens-{workers}")
    assert found[0] == found[1]


def test_a_second_time_takes_what_is_there(based: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenized(based.recipe, based.run)
    monkeypatch.setattr(tokens, "_tokenize", lambda *_: pytest.fail("made again"))
    second = tokenized(based.recipe, based.run)
    assert second.counts == first.counts
    assert list(second.datasets["train"]) == list(first.datasets["train"])


CHANGES: dict[str, Callable[[Any], Recipe]] = {
    "max_length": lambda based: knobs(based.recipe, max_length=100),
    "unshown": lambda based: knobs(based.recipe, on_template_error="skip"),
    "data": lambda based: changed_receipt(based, "data", "train.arrow"),
    "template": lambda based: changed_receipt(based, "base", "chat_template.jinja"),
}


def changed_receipt(based: Any, stage: str, name: str) -> Recipe:
    receipt = based.run.receipt(stage)
    [path] = [path for path in receipt.outputs if path.endswith(name)]
    based.run.write_receipt(replace(receipt, outputs=receipt.outputs | {path: {"sha256": "0", "bytes": 0}}))
    return based.recipe  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", CHANGES)
def test_what_they_are_made_from_makes_other_tokens_and_removes_the_old(what: str, based: Any) -> None:
    tokenized(based.recipe, based.run)
    [old] = based.run.path("tokens").iterdir()
    tokenized(CHANGES[what](based), based.run)
    [new] = based.run.path("tokens").iterdir()
    assert new.name != old.name


def test_what_they_are_not_made_from_leaves_them(based: Any) -> None:
    tokenized(based.recipe, based.run)
    before = sorted(based.run.path("tokens").rglob("*"))
    tokenized(knobs(based.recipe, epochs=9, batch_size=4), based.run)
    assert sorted(based.run.path("tokens").rglob("*")) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_was_interrupted_leaves_nothing(fault: Any, based: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(tokens, "_examples", interrupted)
    with pytest.raises(fault if isinstance(fault, type) else OSError):
        tokenized(based.recipe, based.run)
    assert not based.run.path("tokens").exists() and not based.run.path(".tokens.tmp").exists()


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def with_unshown(based: Any, many: int) -> Any:
    """Rows with tools, which the base's template does not show."""
    path = based.run.path("data", "train.arrow")
    kept = list(rows(based.run.path("data"), "train"))
    unshown = [kept[0] | {"tools": TOOLS, "source": f"talks.jsonl:{100 + number}"} for number in range(many)]
    with recipe_rows.RowWriter(path) as writer:
        every = [*kept, *unshown]
        writer.write(recipe_rows.row_batch([json.dumps(row) for row in every], [row["source"] for row in every]))
    return based


def test_rows_that_the_template_does_not_show_are_told_by_place(based: Any) -> None:
    with pytest.raises(UserError) as raised:
        tokenized(based.recipe, with_unshown(based, 30).run)
    [problem] = raised.value.problems
    assert problem.startswith("talks.jsonl:100: the chat template of ")
    assert problem.endswith(" (and 29 more such lines, up to talks.jsonl:129)")


def test_rows_that_the_template_does_not_show_are_dropped_on_wish(based: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = tokenized(knobs(based.recipe, on_template_error="skip"), with_unshown(based, 30).run)
    assert made.counts["train"]["unshown"] == 30
    assert made.counts["train"]["examples"] == len(made.datasets["train"]) == made.counts["train"]["rows"] - 30
    assert "train: 30 conversation(s) left out, the first: talks.jsonl:100: the chat template" in caplog.text


def test_reasoning_that_the_template_does_not_show_is_counted_and_told(
    based: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept = list(rows(based.run.path("data"), "train"))
    turns = [
        turn | {"reasoning_content": "Hm."} if turn["role"] == "assistant" else turn for turn in kept[1]["messages"]
    ]
    kept[1] |= {"messages": turns}
    with recipe_rows.RowWriter(based.run.path("data", "train.arrow")) as writer:
        writer.write(recipe_rows.row_batch([json.dumps(row) for row in kept], [row["source"] for row in kept]))
    made = tokenized(based.recipe, based.run)
    assert made.counts["train"]["reasoning_lost"] == 1 and made.counts["train"]["unshown"] == 0
    assert (
        "train: 1 conversation(s) lose their reasoning_content, which the base's chat template does not" in caplog.text
    )
    assert f"the first: {kept[1]['source']}: use a base whose template does" in caplog.text
