"""The verdict is yes only of what stands there now, no with the artefact in which the model was lost, else open."""

from collections.abc import Callable
from pathlib import Path

import pytest
from report_run import EVERY, NAME, RECIPE, Told, comparisons

from report.summary import verdict

pytest_plugins = ["report_fixtures"]
FILES = EVERY[:-1]  # all but the proof of the endpoint
LOST = "logits: mean divergence 2.1, allowed 0.6; first at probe 'emoji', answer position 3: 'a' (1), trained 'b' (2)"


def test_what_passed_and_still_stands_is_the_trained_model(told: Callable[..., Told]) -> None:
    found = verdict((run := told()).recipe, run.run)
    assert (found.answer, found.outdated) == ("yes", False)
    assert [row.name for row in found.rows][-1] == "served Q8_0"


@pytest.mark.parametrize("lost", ["merge", "F16", "Q4_K_M", "served Q8_0"])
def test_what_failed_is_named_with_its_first_divergence(told: Callable[..., Told], lost: str) -> None:
    run = told(rows=comparisons(**{lost: LOST}))
    found = verdict(run.recipe, run.run)
    assert (found.answer, found.reasons) == ("no", [f"{lost}: {LOST}"])


def test_the_first_artefact_that_differs_comes_first(told: Callable[..., Told]) -> None:
    run = told(rows=comparisons(merge="a", F16="b", Q2_K="c"))
    assert verdict(run.recipe, run.run).reasons == ["merge: a", "F16: b", "Q2_K: c"]


def test_files_that_differ_need_no_endpoint_to_be_told(told: Callable[..., Told]) -> None:
    run = told(*FILES, rows=comparisons(Q2_K=LOST))
    assert verdict(run.recipe, run.run).answer == "no"


@pytest.mark.parametrize(
    ("stages", "reason", "rows"),
    [
        (("train",), "Nothing has been compared yet", 0),
        (EVERY[:-2], "Nothing has been compared yet", 0),
        (FILES, "The served endpoint has not been asked yet", 8),
    ],
)
def test_what_was_not_asked_is_not_proved(
    told: Callable[..., Told], stages: tuple[str, ...], reason: str, rows: int
) -> None:
    run = told("data", "base", *[stage for stage in stages if stage not in ("data", "base")])
    found = verdict(run.recipe, run.run)
    assert (found.answer, len(found.rows)) == ("open", rows)
    assert found.reasons[0].startswith(reason) and "make prove RECIPE=mine" in found.reasons[0]


def test_a_proof_of_an_older_file_proves_nothing(told: Callable[..., Told]) -> None:
    run = told()
    weights = run.run.path("train/weights")
    weights.write_text("trained again")
    receipt = run.run.receipt("train")
    receipt.outputs[str(weights)] = {"sha256": "0" * 64, "bytes": 13}
    run.run.write_receipt(receipt)
    found = verdict(run.recipe, run.run)
    assert (found.answer, found.outdated) == ("open", True)
    assert "'train' has run again since 'reference'" in found.reasons[0]


def test_files_compared_under_another_recipe_prove_nothing_either(told: Callable[..., Told]) -> None:
    run = told(*FILES, rows=comparisons(Q2_K=LOST))
    Path(f"{NAME}.yaml").write_text(RECIPE.replace("Q8_0, ", ""))
    found = verdict(run.recipe, run.run)
    assert (found.answer, found.outdated) == ("open", True)
    assert "the recipe's gguf has changed since 'gguf'" in found.reasons[0]


def test_a_proof_of_another_recipe_proves_nothing(told: Callable[..., Told]) -> None:
    run = told()
    Path(f"{NAME}.yaml").write_text(RECIPE + "seed: 1\n")
    found = verdict(run.recipe, run.run)
    assert (found.answer, found.outdated) == ("open", True)
    assert "the recipe's seed has changed since 'data'" in found.reasons[0]


def test_files_proved_again_stand_for_themselves_while_the_endpoint_waits(told: Callable[..., Told]) -> None:
    run = told()
    Path(f"{NAME}.yaml").write_text(RECIPE + "serve: {context: 512}\n")
    found = verdict(run.recipe, run.run)
    assert (found.answer, found.outdated, len(found.rows)) == ("open", False, 8)
    assert "the recipe's serve.context has changed since 'prove'" in found.reasons[0]


def test_another_port_or_window_changes_nothing_that_was_proved(told: Callable[..., Told]) -> None:
    run = told()
    Path(f"{NAME}.yaml").write_text(RECIPE + "serve: {ui: none, port: 8001}\n")
    assert verdict(run.recipe, run.run).answer == "yes"


def test_comparisons_that_are_gone_prove_nothing(told: Callable[..., Told]) -> None:
    run = told(*FILES)
    run.run.path("compare.jsonl").unlink()
    assert verdict(run.recipe, run.run).reasons[0].startswith("Nothing has been compared yet")


def test_a_stage_that_has_not_run_is_named(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    assert run.run.state("train", run.recipe).changed is None
    assert run.run.state("merge", run.recipe).changed == "'merge' has not run"
