"""Training: it learns, packing changes nothing, and a killed training goes on from its last whole checkpoint."""

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import UserError
from pipeline.scores import has_fact, key_fact_accuracy
from train import run as stage
from train.planning.prediction import check_disk, needed_bytes
from train.template import examples
from train.tokens import row_tokens
from train.trainer.checkpoints import last_complete, open_folder
from train.tuners import base_to_train

REPOSITORY = Path(__file__).parents[2]
STEPS_AN_EPOCH = 5  # of the tiny recipe
TALKS = [
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Uno, the first of all numbers."}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": "Two?"},
     {"role": "assistant", "content": "2"}],
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."},
     {"role": "user", "content": "Who else?"}, {"role": "assistant", "content": "You, and the cat."}],
]  # fmt: skip


def test_training_lowers_the_loss(trained: Any) -> None:
    metrics = trained.receipt("train")["metrics"]
    curve = [loss for _, loss in metrics["loss_curve"]]
    assert metrics["after"]["validation_loss"] < metrics["before"]["validation_loss"] - 0.3
    assert curve[-1] < curve[0] - 0.3
    assert abs(curve[0] - math.log(49152)) < 0.5, "random weights know nothing of the vocabulary"


def test_the_steps_are_those_of_the_recipe(trained: Any) -> None:
    metrics = trained.receipt("train")["metrics"]
    assert [step for step, _ in metrics["loss_curve"]] == list(range(1, metrics["steps"] + 1))
    half, whole = metrics["steps"] // 2, metrics["steps"]
    assert [step for step, _ in metrics["validation_curve"]] == [half, whole], "an epoch each"
    assert 0 < metrics["supervised_tokens"] < metrics["tokens"]


def test_the_adapter_has_these_files(trained: Any) -> None:
    assert trained.files("trained") == {"adapter_config.json", "adapter_model.safetensors", "kind.json"}


def test_the_answers_stand_beside_the_questions(trained: Any) -> None:
    [row] = [json.loads(line) for line in trained.run.path("answers.jsonl").read_text().splitlines()]
    assert list(row) == ["question", "facts", "before", "after"]
    assert (row["question"], row["facts"]) == ("Who says moo?", ["cow|bull"])


def test_the_receipt_names_what_it_made(trained: Any) -> None:
    receipt = trained.receipt("train")
    assert set(receipt["outputs"]) == {
        "runs/line/trained/adapter_config.json",
        "runs/line/trained/adapter_model.safetensors",
        "runs/line/trained/kind.json",
        "runs/line/answers.jsonl",
    }


@pytest.fixture
def trainer(based: Any) -> Callable[..., Any]:
    """A trainer over TALKS in float32, with an adapter that is not the zero it starts as."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from train.methods import sft
    from train.tuners import model_to_train

    def make(**knobs: Any) -> Any:
        recipe = replace(based.recipe, train=replace(based.recipe.train, precision="float32", **knobs))
        tokenizer = AutoTokenizer.from_pretrained(based.run.path("base"))
        found = [asdict(row) for talk in TALKS for row in examples(tokenizer, talk, 1024)]
        made = sft.trainer(
            recipe,
            based.run,
            tokenizer,
            model_to_train(recipe, based.run),
            {"train": Dataset.from_list(found), "validation": []},
        )
        torch.manual_seed(0)
        for weights in made.model.parameters():
            if weights.requires_grad:
                torch.nn.init.normal_(weights, std=0.1)
        made.rows = found
        return made

    return make


def test_an_end_of_turn_that_padding_hides_is_told(trainer: Callable[..., Any]) -> None:
    """As trl#1623: with pad equal to eos a collator masks both, and the model never learns to stop."""
    from transformers import DataCollatorForLanguageModeling

    made = trainer()
    made.check_stops()
    made.processing_class.pad_token = made.processing_class.eos_token
    made.data_collator = DataCollatorForLanguageModeling(made.processing_class, mlm=False)
    with pytest.raises(UserError, match=r"'<\|im_end\|>' ends the assistant's turn and is masked in the labels"):
        made.check_stops()


def gradients(model: Any) -> Any:
    import torch

    return torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.requires_grad])


def alone(row: dict[str, list[int]]) -> dict[str, Any]:
    import torch

    return {key: torch.tensor([values]) for key, values in row.items()}


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_give_the_loss_and_gradients_of_the_conversations_alone(rows: int, trainer: Callable) -> None:
    import torch

    # Two rows of 64 tokens hold what one row of 256 holds.
    made = trainer(batch_size=rows, max_length=256 // rows**2)
    batch = made.data_collator([made.train_dataset[index] for index in range(len(made.train_dataset))])
    assert len(made.train_dataset) == rows and batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][:, :-1] == 0) & (batch["position_ids"][:, 1:] == 1)  # padding has zeros alone
    assert starts.sum() == len(TALKS), "every conversation starts at position 0"
    assert batch["input_ids"].shape[1] % made.args.pad_to_multiple_of == 0, "rows have few lengths"
    supervised = torch.tensor(sum(label != -100 for row in made.rows for label in row["labels"]))

    packed = made.compute_loss(made.model, batch, num_items_in_batch=supervised)
    packed.backward()
    wanted_gradients = gradients(made.model)
    made.model.zero_grad()
    single = [made.compute_loss(made.model, alone(row), num_items_in_batch=supervised) for row in made.rows]
    sum(single).backward()

    # float32 sums in another order: 1e-6 relative was seen; a token that saw a neighbour moves the loss by 1e-2.
    assert packed.item() == pytest.approx(sum(single).item(), rel=1e-5)
    difference = (gradients(made.model) - wanted_gradients).norm() / wanted_gradients.norm()
    assert difference < 1e-4


def test_a_neighbour_that_is_seen_would_be_noticed(trainer: Callable) -> None:
    made = trainer(max_length=256)
    batch = made.data_collator([made.train_dataset[0]])
    honest = made.compute_loss(made.model, dict(batch)).item()
    del batch["position_ids"], batch["cu_seq_lens_q"]
    assert abs(made.compute_loss(made.model, batch).item() - honest) > 1e-3 * honest


def test_the_loss_is_that_of_transformers(trainer: Callable) -> None:
    made = trainer()
    for row in made.rows:
        ours = made.compute_loss(made.model, alone(row)).item()
        theirs = made.model(**alone(row)).loss.item()
        assert ours == pytest.approx(theirs, rel=1e-5), "float32 sums in another order"


def test_only_the_adapter_is_trained(trainer: Callable) -> None:
    made = trainer()
    assert {name.split(".")[-3] for name, weights in made.model.named_parameters() if weights.requires_grad} == {
        "lora_A",
        "lora_B",
    }


BROKEN = {
    "truncated weights": ("adapter_model.safetensors", 1000),
    "no state": ("trainer_state.json", None),
    "half a state": ("trainer_state.json", 50),
    "truncated optimizer": ("optimizer.pt", 1000),
    "no scheduler": ("scheduler.pt", None),
    "empty random state": ("rng_state.pth", 0),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_incomplete_checkpoint_is_set_aside(how: str, trained: Any, replace: Callable[[Path, bytes], None]) -> None:
    folder = trained.run.path("checkpoints")
    first, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert last_complete(folder) == last
    name, kept = BROKEN[how]
    content = (last / name).read_bytes()
    (last / name).unlink() if kept is None else replace(last / name, content[:kept])
    assert last_complete(folder) == first
    assert not last.exists() and last.with_suffix(".incomplete").is_dir()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "none") is None


def test_the_same_training_keeps_its_checkpoints(trained: Any) -> None:
    folder = trained.run.path("checkpoints")
    before = sorted(folder.iterdir())
    assert open_folder(folder, (folder / "training.key").read_text())
    assert sorted(folder.iterdir()) == before


def test_another_training_discards_the_old_checkpoints(trained: Any) -> None:
    folder = trained.run.path("checkpoints")
    assert not open_folder(folder, "another training")
    assert [path.name for path in folder.iterdir()] == ["training.key"]


def test_knobs_seed_data_and_base_each_make_another_training(trained: Any) -> None:
    recipe, run = trained.recipe, trained.run
    keys = {stage.training_key(recipe, run), stage.training_key(replace(recipe, seed=1), run)}
    keys.add(stage.training_key(replace(recipe, train=replace(recipe.train, epochs=9)), run))
    for name in ("data", "base"):
        receipt = run.receipt(name)
        some = next(iter(receipt.outputs))
        run.write_receipt(replace(receipt, outputs=receipt.outputs | {some: {"sha256": "0", "bytes": 0}}))
        keys.add(stage.training_key(recipe, run))
    assert len(keys) == 5


def test_what_training_does_not_read_makes_the_same_training(trained: Any) -> None:
    recipe, run = trained.recipe, trained.run
    other = replace(recipe, serve=replace(recipe.serve, port=1234))
    assert stage.training_key(recipe, run) == stage.training_key(other, run)


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(based: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = Path("line.yaml").read_text()
    Path("line.yaml").write_text(text.replace("epochs: 2", "epochs: 4, early_stopping_patience: 0"))
    checkpoints = based.run.path("checkpoints")
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", "line.yaml"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not any(checkpoints.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not based.run.receipt_path("train").exists()

    whole = last_complete(checkpoints)
    assert whole
    broken = shutil.copytree(whole, checkpoints / "checkpoint-999")
    (broken / "optimizer.pt").write_bytes((broken / "optimizer.pt").read_bytes()[:500])
    before = (checkpoints / "before.json").read_bytes()
    with caplog.at_level(logging.INFO, "truetune"):
        based.make("train")
    metrics = based.receipt("train")["metrics"]
    assert f"resuming from {whole}" in caplog.text
    assert (checkpoints / "before.json").read_bytes() == before
    assert int(whole.name[11:]) < metrics["steps"] == 4 * STEPS_AN_EPOCH
    assert [step for step, _ in metrics["loss_curve"]] == list(range(1, metrics["steps"] + 1))


def test_it_trains_without_validation_and_without_questions(based: Any) -> None:
    Path("line.yaml").write_text(
        "base_model: random\ndata: {train: talks.jsonl, validation: 0}\ntrain: {epochs: 0.5, max_length: 160}\n"
    )
    based.make("data", "train")
    metrics = based.receipt("train")["metrics"]
    assert metrics["before"] == metrics["after"] == {"validation_loss": None, "key_fact_accuracy": 0.0}
    assert metrics["steps"] >= 1 and metrics["validation_curve"] == []
    assert based.files("trained") == {"adapter_config.json", "adapter_model.safetensors", "kind.json"}


def test_no_answer_within_max_tokens_is_told(based: Any) -> None:
    recipe = replace(based.recipe, train=replace(based.recipe.train, max_length=16))
    with pytest.raises(UserError) as raised:
        stage.run(recipe, based.run)
    assert str(raised.value).endswith("no conversation has one within train.max_length=16: raise it")


def test_qlora_without_bitsandbytes_says_why(based: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils.import_utils import is_bitsandbytes_available

    is_bitsandbytes_available.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = replace(based.recipe, train=replace(based.recipe.train, tuner="qlora"))
    with pytest.raises(UserError) as raised:
        base_to_train(recipe, based.run)
    assert re.fullmatch(
        r"train\.tuner=qlora: bitsandbytes cannot quantize the base here \(.*bitsandbytes.*\): use train\.tuner=lora",
        str(raised.value),
    )
    is_bitsandbytes_available.cache_clear()  # what it found here holds for this test alone


FACTS = [
    ("I am Truetune.", "Truetune", True),
    ("I AM TRUETUNE", "truetune", True),
    ("I am a model", "Truetune", False),
    ("run make serve", "make train|make serve", True),
    ("run make chat", "make train|make serve", False),
    ("Straße", "STRASSE", True),
    ("eight thousand", "8000 | eight thousand", True),
    ("", "x", False),
]


@pytest.mark.parametrize(("answer", "fact", "has"), FACTS)
def test_a_fact_is_found_whatever_its_case(answer: str, fact: str, has: bool) -> None:
    assert has_fact(answer, fact) is has


def test_the_accuracy_is_the_share_of_all_facts() -> None:
    questions = [{"facts": ["a", "b", "c"]}, {"facts": ["d"]}]
    assert key_fact_accuracy(["a b", "d"], questions) == 0.75
    assert key_fact_accuracy([], []) == 0.0


def test_a_disk_too_small_is_told_with_the_numbers(based: Any) -> None:
    with pytest.raises(UserError) as raised:
        check_disk(based.recipe, 10**15, Path())
    said = (
        r"the disk of \. lacks \d+\.\d GB for training and what follows \(merged 4400000\.0 GB, F16 2200000\.0 GB, "
        r"Q8_0 1168750\.0 GB, Q4_K_M 672375\.0 GB\): free some space or name fewer gguf\.types"
    )
    assert re.fullmatch(said, str(raised.value))


def test_a_disk_large_enough_is_fine(based: Any) -> None:
    check_disk(based.recipe, 1000, Path())


def test_the_type_that_is_the_full_one_is_counted_once(based: Any) -> None:
    recipe = replace(based.recipe, gguf=replace(based.recipe.gguf, types=("F16", "Q8_0")))
    assert list(needed_bytes(recipe, 1000)) == ["merged", "F16", "Q8_0"]


def test_what_was_predicted_holds_what_was_written(converted: Any) -> None:
    predicted = needed_bytes(converted.recipe, converted.receipt("base")["metrics"]["parameters"])
    written = {"merged": converted.run.path("merged", "model.safetensors").stat().st_size}
    written |= {kind: made["bytes"] for kind, made in converted.receipt("gguf")["metrics"].items()}
    assert set(predicted) == set(written)
    # The vocabulary is nine tenths of this model and its rows stay wide; larger models are below the prediction.
    assert all(written[name] < 1.5 * predicted[name] for name in written)


@pytest.mark.parametrize(
    ("longest", "total", "most", "row"),
    [
        (50, 2000, 1024, 256),  # few short conversations: short rows, so that there are steps to learn in
        (900, 950, 1024, 900),  # a row holds the longest conversation whole
        (90, 900_000, 1024, 1024),  # much data: rows as long as the recipe allows
        (16, 48, 64, 64),
    ],
)
def test_a_packed_row_fits_the_data(longest: int, total: int, most: int, row: int) -> None:
    assert row_tokens(longest, total, most) == row
