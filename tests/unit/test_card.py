"""The model card: metadata that the Hub accepts, and the run's facts in Markdown that no name can break."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_run import EVERY, Told, comparisons

from report.report import card, plain, report

pytest_plugins = ["report_fixtures"]


def made(run: Told) -> str:
    return card(run.recipe, run.run)


def test_the_hub_reads_the_metadata(told: Callable[..., Told]) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(made(told())).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert (data.base_model, data.base_model_relation) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune")
    assert (data.pipeline_tag, data.tags) == ("text-generation", ["truetune", "lora", "conversational", "gguf"])
    assert data.model_name == "mine"
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("accuracy", 0.93),
        ("loss", 0.84),
    ]


def test_what_the_base_does_not_state_is_left_out(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    receipt = run.run.receipt("base")
    for key in ("license", "languages", "model"):
        receipt.metrics.pop(key)
    run.run.write_receipt(receipt)
    text = made(run)
    head = text.split("---\n")[1]
    assert "license" not in head and "base_model" not in head and "language:" not in head
    assert "The base states no licence" in text


def test_an_adapter_alone_is_called_one(told: Callable[..., Told]) -> None:
    text = made(told("data", "base", "train"))
    assert "base_model_relation: adapter" in text and "library_name: peft" in text
    assert "PeftModel.from_pretrained" in text and "llama-server" not in text


@pytest.mark.parametrize(
    ("stages", "problems", "answer"),
    [
        (EVERY, {}, "Yes: it is the model that was trained."),
        (EVERY, {"F16": "logits | differ"}, "No: F16 is not the model that was trained."),
        (("data", "base", "train"), {}, "Not proved yet."),
    ],
)
def test_the_verdict_is_the_pages(
    told: Callable[..., Told], stages: tuple[str, ...], problems: dict[str, str], answer: str
) -> None:
    assert f"**Is this the model that was trained?** {answer}" in made(told(*stages, rows=comparisons(**problems)))


def test_the_badge_is_of_the_proof_that_holds(told: Callable[..., Told]) -> None:
    run, badge = told(), Path("runs/mine/badge.svg")
    for stages, says in ((("prove",), "same model"), ((), ""), (("prove",), "another model")):
        run.make("compare", *stages, rows=comparisons(**({"F16": "logits differ"} if says == "another model" else {})))
        report(run.recipe, run.run)
        assert (f"![proof: {says}](badge.svg)" in Path("runs/mine/README.md").read_text()) == bool(says)
        assert badge.is_file() == bool(says) and (not says or f">{says}</text>" in badge.read_text())
        run.run.receipt_path("prove").unlink(missing_ok=True)


def test_every_row_of_a_table_has_as_many_cells_as_its_head(told: Callable[..., Told]) -> None:
    text = made(told(rows=comparisons(F16="token ids: probe '|', position 1: a | b\nc")))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_the_recommended_file_and_its_rule_are_named(told: Callable[..., Told]) -> None:
    text = made(told())
    assert "| `gguf/mine-Q5_K_M.gguf` (recommended) | 112" in text
    assert "Recommended: Q5\\_K\\_M, the smallest type that loses at most 0.05 nats." in text


def test_each_link_stands_with_its_whole_hash(told: Callable[..., Told]) -> None:
    run = told()
    text = made(run)
    for stage in ("base", "reference", "merge"):
        assert run.run.receipt(stage).outputs[f"runs/mine/{stage}/weights"]["sha256"] in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", r"a \| b"),
        ("two\nlines", "two lines"),
        ("<b>*x*</b> [y](z) `c`", r"\<b\>\*x\*\</b\> \[y\](z) \`c\`"),
        ("back\\slash", r"back\\slash"),
        ("plain words, 1.5", "plain words, 1.5"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown
