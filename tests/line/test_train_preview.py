"""The preview: what it marks is what is learned, its numbers are those of training, and it needs no training."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import UserError
from pipeline.rows import RowWriter, picked, row_batch, rows
from train.preview import CLOSE, OPEN, preview
from train.run import run
from train.template import IGNORED, row_examples
from train.tokens import histogram, pieces


@pytest.fixture
def shown(based: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the preview prints, without colour."""

    def show(wish: str | None = None, **knobs: Any) -> str:
        recipe = replace(based.recipe, train=replace(based.recipe.train, **knobs))
        preview(recipe, based.run, wish)
        return capsys.readouterr().out

    return show


def of_data(based: Any) -> list[dict[str, Any]]:
    return list(rows(based.run.path("data"), "train"))


def test_what_stands_between_the_brackets_is_what_is_learned(shown: Callable, based: Any) -> None:
    for number, row in enumerate(of_data(based), 1):
        title, text = shown(str(number)).split("\n", 1)
        learned = [part.split(CLOSE)[0] for part in text.split(OPEN)[1:]]
        assert learned == [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert title.startswith(f"{row['source']}: ")


def test_without_the_brackets_it_is_the_rendered_conversation(shown: Callable, based: Any, tokenizer: Any) -> None:
    text = shown("1").split("\n", 1)[1].replace(OPEN, "").replace(CLOSE, "")
    assert text.strip() == tokenizer.apply_chat_template(of_data(based)[0]["messages"], tokenize=False).strip()


def test_a_conversation_is_found_by_its_place_in_either_part(shown: Callable, based: Any) -> None:
    for part in ("train", "validation"):
        place = next(rows(based.run.path("data"), part))["source"]
        assert shown(place).startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("0", r"ROW=0: there is no such conversation: give a number from 1 to \d+"),
        ("999", r"ROW=999: there is no such conversation: give a number from 1 to \d+"),
        ("talks.jsonl:99", r"ROW=talks\.jsonl:99: no conversation is from there: name file and line, .*"),
    ],
)
def test_a_wish_that_cannot_be_met_is_told(wish: str, said: str, shown: Callable) -> None:
    with pytest.raises(UserError, match=f"^{said}$"):
        shown(wish)


TEXTS = ["Hello", "Grüße, 世界", "👩\u200d👩\u200d👧 🙂", "  a\n\n b ", "It is <|im_end|> here."]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_the_learned_ones_the_labels(text: str, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    [row] = row_examples(tokenizer, {"messages": messages}, 1000)
    found = pieces(tokenizer, row.input_ids, row.labels)
    assert "".join(piece.text for piece in found) == tokenizer.decode(row.input_ids)
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    assert "".join(piece.text for piece in found if piece.learned) == tokenizer.decode(learned)
    assert {piece.text for piece in found if piece.special} >= {"<|im_start|>", "<|im_end|>"}


def test_a_packed_row_is_shown_whole_with_its_boundaries(shown: Callable, based: Any) -> None:
    text = shown().split("packed row 1: ")[1].split("packed row 2: ")[0].split("==== all rows")[0]
    titles = [line for line in text.splitlines() if line.startswith("conversation ")]
    count = int(titles[0].split(" of ")[1].split(":")[0])
    assert len(titles) == count > 1
    assert text.count("<|im_start|>user\nWhat says the ") == count
    assert all(": positions 0 to " in title for title in titles)


def test_the_numbers_are_those_of_all_rows(shown: Callable, based: Any, tokenizer: Any) -> None:
    text = shown()
    examples = [row_examples(tokenizer, row, 160)[0] for row in of_data(based)]
    learned = sum(label != IGNORED for row in examples for label in row.labels)
    tokens = sum(len(row.input_ids) for row in examples)
    said = (
        f"train: {len(examples)} conversations, {tokens:,} tokens, {learned:,} of them learned ({learned / tokens:.0%})"
    )
    assert said in text
    told = json.loads(based.run.path("tokens", "preview.json").read_text())
    assert told["parts"]["train"]["supervised_tokens"] == learned
    assert sum(count for _, count in told["lengths"]) == len(examples)


def test_cut_rows_are_counted(shown: Callable, based: Any, tokenizer: Any) -> None:
    lengths = [len(row_examples(tokenizer, row, 160)[0].input_ids) for row in of_data(based)]
    most = max(lengths) - 1
    cut = sum(length >= most for length in lengths)
    assert f"  {cut} cut to train.max_length={most}\n" in shown(max_length=most)


def test_rows_without_anything_to_learn_are_an_error_before_training(based: Any) -> None:
    recipe = replace(based.recipe, train=replace(based.recipe.train, max_length=16))
    told = r"^talks\.jsonl:1: its first answer begins at token \d+, and no conversation has one within .*=16: raise it$"
    for command in (preview, run):
        with pytest.raises(UserError, match=told):
            command(recipe, based.run)


SPEECHLESS = "{% for m in messages if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"
REFUSING = "{{ raise_exception('not this one') }}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            SPEECHLESS,
            r"^talks\.jsonl:1: the base's chat template shows none of the assistant's words, .*chat_template$",
        ),
        (REFUSING, r"^talks\.jsonl:1: .*not this one"),
    ],
)
def test_a_template_that_shows_no_answer_is_told_with_the_first_row(template: str, told: str, based: Any) -> None:
    based.run.path("base", "chat_template.jinja").write_text(template)
    recipe = replace(based.recipe, train=replace(based.recipe.train, on_template_error="skip"))
    with pytest.raises(UserError, match=told):
        preview(recipe, based.run)


STEERING = "\x1b[2J\x1b]0;title\x07 \x9b31m \r\x08\x00\x7f \u202edne"


@pytest.mark.parametrize("colour", [False, True])
def test_data_neither_steers_the_terminal_nor_are_markup(
    colour: bool, shown: Callable, based: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    row = {"messages": [{"role": role, "content": f"[/red]{STEERING}"} for role in ("user", "assistant")]}
    with RowWriter(based.run.path("data", "train.arrow")) as writer:
        writer.write(row_batch([json.dumps(row)], [f"e[/vil]{STEERING}.jsonl:1"]))
    for text in (shown(), shown("1")):
        text = re.sub(r"\x1b\[[\d;]*m", "", text) if colour else text
        assert not re.search(r"[^\n\S ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert "e[/vil]\N{SYMBOL FOR ESCAPE}[2J" in text and "[/red]\N{SYMBOL FOR ESCAPE}[2J" in text
        assert r"\u009b31m" in text and r"\u202edne" in text


def test_plain_text_is_shown_as_learned(shown: Callable, based: Any) -> None:
    with RowWriter(based.run.path("data", "train.arrow")) as writer:
        writer.write(row_batch([json.dumps({"text": "Once upon a time there was a fox."})], ["tale.txt:1"]))
    text = shown("1")
    assert text.startswith("tale.txt:1: 10 tokens, 9 learned")
    assert f"Once{OPEN} upon a time there was a fox.<|im_end|>{CLOSE}" in text


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [
        ([5], [(16, 1)]),
        ([16, 17, 32, 33], [(16, 1), (32, 2), (64, 1)]),
        ([100, 900], [(128, 1), (256, 0), (512, 0), (1024, 1)]),
        ([], []),
    ],
)
def test_a_bar_ends_at_twice_the_length_of_the_one_before(lengths: list[int], bars: list[tuple[int, int]]) -> None:
    from datasets import Dataset

    assert histogram(Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})) == bars


def test_colour_marks_what_is_learned_on_a_terminal(based: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    preview(based.recipe, based.run, "1")
    text = capsys.readouterr().out
    row = next(picked(based.run.path("data"), "train", [0]))
    assert f"\x1b[1;32m{row['messages'][1]['content']}" in text and OPEN not in text
    assert "learned (green)" in text


def test_training_leaves_it_for_the_report(trained: Any) -> None:
    told = json.loads(trained.run.path("tokens", "preview.json").read_text())
    assert told["packing"]["rows"] == trained.receipt("train")["metrics"]["packing"]["rows"]
    assert [piece["learned"] for piece in told["example"]["pieces"]].count(True) > 0
    assert Path(trained.run.path("tokens", "preview.json")).stat().st_size < 20_000
