"""Every tuner through the line: its losses are those on record, and what it trained is what is merged and converted."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from conftest import MODEL_FILES, REPOSITORY, Workplace, copied

from pipeline.model import Trained
from pipeline.recipe import Train
from train.tuners import TUNERS

LOSSES = Path(__file__).parents[1] / "losses"
STEPS = 8
# One thread and two give the same five decimals; the kernels of another processor sum in another order.
TOLERANCE = 1e-4
TYPE = "Q8_0"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "kind.json"}
FILES = {tuner: ADAPTER for tuner in TUNERS} | {"full": MODEL_FILES | {"kind.json"}}


@pytest.fixture(
    scope="module",
    params=[pytest.param(tuner, marks=pytest.mark.slow) for tuner in TUNERS],
)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _based: Path) -> Iterator[Any]:
    """(the tuner, a workplace in which it went through the line)."""
    work = copied(_based, tmp_path_factory.mktemp(request.param))
    recipe = work.folder / "line.yaml"
    tuner = f"train: {{tuner: {request.param}, precision: float32, "
    types = "types: [Q8_0, F16, Q4_K_M, Q8_0]", f"types: [{TYPE}]"
    recipe.write_text(recipe.read_text().replace("train: {", tuner).replace("1e-2", "1e-3").replace(*types))
    with contextlib.chdir(work.folder), pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(REPOSITORY))  # what is served is a process of its own
        work.make("train", "reference", "merge", "gguf", "compare", "prove")
        yield request.param, work


def test_the_losses_are_those_on_record(tuned: tuple[str, Workplace]) -> None:
    tuner, work = tuned
    found = [loss for _, loss in work.receipt("train")["metrics"]["loss_curve"]][:STEPS]
    wanted = [float(line) for line in (LOSSES / f"sft-{tuner}.txt").read_text().split()]
    assert len(wanted) == STEPS and found == pytest.approx(wanted, rel=TOLERANCE)


def test_it_leaves_what_it_trained(tuned: tuple[str, Workplace]) -> None:
    tuner, work = tuned
    assert work.files("trained") == FILES[tuner]
    kind = "weights" if tuner == "full" else "adapter"
    assert Trained.read(work.run.path("trained")) == Trained(kind, tuner, True)
    metrics = work.receipt("train")["metrics"]
    assert (metrics["trainable_parameters"] == work.receipt("base")["metrics"]["parameters"]) is (tuner == "full")
    assert metrics["after"]["validation_loss"] < metrics["before"]["validation_loss"] - 0.3


def test_every_artefact_is_the_trained_model(tuned: tuple[str, Workplace]) -> None:
    _, work = tuned
    merge = work.receipt("merge")["metrics"]
    assert merge["relative_error"] < merge["relative_error_bound"] < merge["effect_of_training"]
    proved = work.receipt("prove")["metrics"]
    problems = {row["name"]: row["problems"] for row in proved["comparisons"]}
    assert problems == {name: [] for name in ("merge", "F16", TYPE, f"served {TYPE}")}


def test_base_and_trained_are_told_apart(tuned: tuple[str, Workplace]) -> None:
    """As `make eval` asks them; the base of a QLoRA is the one in 4 bits."""
    from pipeline.model import load, load_trained, logits
    from train.evaluate import Pair

    tuner, work = tuned
    ids = list(range(1, 33))
    base, trained = Pair(work.recipe, work.run).ask(lambda model, _: logits(model, ids))
    exact = 1e-5 if tuner != "qlora" else 0.2
    for found, wanted in (
        (base, logits(load(work.run.path("base"), "float32"), ids)),
        (trained, logits(load_trained(work.run, "float32"), ids)),
    ):
        assert (found - wanted).norm() / wanted.norm() < exact
    assert (base - trained).norm() / base.norm() > 0.2


def test_the_recipe_knows_the_tuners() -> None:
    assert set(get_args(get_type_hints(Train)["tuner"])) == set(TUNERS)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["full"], indirect=True)
def test_bfloat16_is_rounded_from_whole_weights(tuned: tuple[str, Workplace], tmp_path: Path) -> None:
    from safetensors import safe_open

    _, work = tuned
    other = copied(work.folder, tmp_path)
    with contextlib.chdir(tmp_path):
        Path("line.yaml").write_text(Path("line.yaml").read_text() + "merge: {precision: bfloat16}\n")
        other.make("merge")
        with safe_open(other.run.path("merged", "model.safetensors"), "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("tuned", ["lora"], indirect=True)
def test_an_adapter_that_no_weights_can_take_is_refused(tuned: tuple[str, Workplace], tmp_path: Path) -> None:
    from convert.merge import merge
    from pipeline import UserError

    tuner, work = tuned
    other = copied(work.folder, tmp_path)
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=f"^train.tuner={tuner} leaves an adapter that no"):
        Trained("adapter", tuner, mergeable=False).write(other.run.path("trained"))
        merge(other.recipe, other.run)
