"""Methods that learn from preferences: better answers become likelier, exactly resumed, and what is made is proved."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Workplace, copied
from preference_run import outcome, write_recipe

from pipeline.scores import Score
from train.preferences import judgements, pairs
from train.template import IGNORED

LOSSES = Path(__file__).parents[1] / "losses"
STEPS = 8
TOLERANCE = 1e-4  # as test_tuners: the kernels of another processor sum in another order
LONG = 1000


EVERY = [pytest.param(name, marks=pytest.mark.slow) for name in ("dpo-lora", "dpo-full", "orpo-lora", "kto-lora")]
OF_DPO, OF_PAIRS = EVERY[:2], EVERY[:3]
STARTS = {"dpo": math.log(2), "kto": 0.5}  # the loss of a model that prefers nothing

GAINS = {"dpo": ("reward margin",), "kto": ("reward, good", "reward, bad"), "orpo": ("log odds ratio",)}


@pytest.fixture(scope="module", params=EVERY)
def preferred(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _based: Path) -> Iterator[Any]:
    """(method-tuner, a workplace in which it was trained)."""
    work = copied(_based, tmp_path_factory.mktemp(request.param))
    method, tuner = request.param.split("-")
    with contextlib.chdir(work.folder):
        write_recipe(method, tuner=tuner)
        work.make("data", "train")
        yield request.param, work


def scores(work: Workplace) -> dict[str, Score]:
    return {row["name"]: Score.of(row) for row in work.receipt("train")["metrics"]["scores"]}


def test_the_losses_are_those_on_record(preferred: tuple[str, Workplace]) -> None:
    name, work = preferred
    found = [loss for _, loss in work.receipt("train")["metrics"]["loss_curve"]][:STEPS]
    wanted = [float(line) for line in (LOSSES / f"{name}.txt").read_text().split()]
    assert len(wanted) == STEPS and found == pytest.approx(wanted, rel=TOLERANCE)
    start = STARTS.get(name.partition("-")[0])
    assert start is None or found[0] == pytest.approx(start, rel=1e-5)


def test_better_answers_are_preferred_among_held_out_rows(preferred: tuple[str, Workplace]) -> None:
    name, work = preferred
    found = scores(work)
    gained = [found[measure] for measure in GAINS[name.partition("-")[0]]]
    assert [score.verdict for score in gained] == ["better"] * len(gained)
    assert 0 < found["KL to the start"].trained.value < 10
    metrics = work.receipt("train")["metrics"]
    assert sum(score.rows for score in gained) == work.receipt("data")["metrics"]["validation"]
    assert "rows" not in metrics["before"] | metrics["after"]


@pytest.mark.parametrize("preferred", OF_DPO, indirect=True)
def test_the_margin_is_that_of_trl(preferred: tuple[str, Workplace]) -> None:
    """Measured by another way through the model than the training's: TRL's own metric of the best checkpoint.

    TRL averages the batches of kto, and the rewards of orpo are of the model alone.
    """
    _, work = preferred
    metrics = work.receipt("train")["metrics"]
    folder = work.run.path("checkpoints", f"checkpoint-{metrics['steps']}")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    [best] = [row for row in history if row["step"] == metrics["best_step"] and "eval_loss" in row]
    assert scores(work)["reward margin"].trained.value == pytest.approx(best["eval_rewards/margins"], rel=1e-3)


def test_no_copy_of_the_adapter_is_kept(preferred: tuple[str, Workplace]) -> None:
    name, work = preferred
    adapter = {"adapter_config.json", "adapter_model.safetensors", "kind.json"}
    found = work.files("trained")
    assert found == adapter if name.endswith("lora") else found & adapter == {"kind.json"}


def test_what_is_learned_is_counted(preferred: tuple[str, Workplace]) -> None:
    from train.tokens import opened

    _, work = preferred
    with contextlib.chdir(work.folder):
        tokens = opened(work.recipe, work.run)
        for part, rows in tokens.datasets.items():
            labels = [row[name] for row in rows for name in rows.column_names if name.endswith("labels")]
            learned = sum(label != IGNORED for row in labels for label in row)
            assert tokens.counts[part]["supervised_tokens"] == learned > 0


@pytest.mark.slow
def test_one_that_is_interrupted_equals_one_that_is_not(
    preferred: tuple[str, Workplace], tmp_path: Path, _based: Path
) -> None:
    from train.trainer.resumable import Resumable

    name, whole = preferred
    method, tuner = name.split("-")
    wanted, checkpoint = outcome(whole), whole.receipt("train")["metrics"]["validation_curve"][0][0]
    with contextlib.chdir(tmp_path):
        work, steps = copied(_based, tmp_path), 0
        write_recipe(method, tuner=tuner)

        def dying(self: Any, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == checkpoint + 2:
                raise RuntimeError("the power is gone")
            return real(self, *arguments)

        with pytest.MonkeyPatch.context() as patched:
            real = Resumable.training_step
            patched.setattr(Resumable, "training_step", dying)
            work.make("data")
            with pytest.raises(RuntimeError, match="the power is gone"):
                work.make("train")
        work.make("train")
        assert work.receipt("train")["metrics"]["interruptions"]
        assert outcome(work) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("preferred", OF_DPO, indirect=True)
def test_precomputed_log_probabilities_of_the_start_change_nothing(
    preferred: tuple[str, Workplace], tmp_path: Path, _based: Path
) -> None:
    name, whole = preferred  # kto asks the start of neighbours, which change; orpo has none
    tuner = name.split("-")[1]
    wanted = [loss for _, loss in whole.receipt("train")["metrics"]["loss_curve"]]
    with contextlib.chdir(tmp_path):
        work = copied(_based, tmp_path)
        write_recipe("dpo", tuner=tuner, dpo={"precompute": True})
        work.make("data", "train")
        found = [loss for _, loss in work.receipt("train")["metrics"]["loss_curve"]]
        assert found == pytest.approx(wanted, rel=1e-3)
        assert ("KL to the start" in scores(work)) is (tuner == "lora"), "of whole weights no start is held"


@pytest.mark.slow
@pytest.mark.parametrize("preferred", ["dpo-lora"], indirect=True)
def test_every_artefact_is_the_trained_model(preferred: tuple[str, Workplace], monkeypatch: pytest.MonkeyPatch) -> None:
    _, work = preferred
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # what is served is a process of its own
    work.make("reference", "merge", "gguf", "compare", "prove")
    problems = {row["name"]: row["problems"] for row in work.receipt("prove")["metrics"]["comparisons"]}
    assert problems == {name: [] for name in ("merge", "F16", "Q8_0", "served Q8_0")}


ROW = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Due, the second."},
    ]
}


def worse(answer: str) -> dict[str, Any]:
    return ROW | {"rejected": [*ROW["messages"][:-1], {"role": "assistant", "content": answer}]}


def test_the_last_answers_alone_are_compared(tokenizer: Any) -> None:
    [[pair]] = pairs(tokenizer, [worse("No.")], LONG)
    for (name, ids, labels), answer in zip(pair.sides, ("Due, the second.", "No."), strict=True):
        learned = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])
        assert learned == f"{answer}<|im_end|>", name
    start = pair.labels.count(IGNORED)
    assert pair.input_ids[: start - 1] == pair.rejected_input_ids[: start - 1]


def test_a_batch_is_that_of_trl(tokenizer: Any) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from train.packing import Sides

    made = [pairs(tokenizer, [worse(answer)], LONG)[0][0] for answer in ("No.", "I have no idea of that at all.")]
    theirs = []
    for pair in made:
        start = next(index for index, label in enumerate(pair.labels) if label != IGNORED)
        end = start + len([label for label in pair.labels if label != IGNORED])
        stop = start + len([label for label in pair.rejected_labels if label != IGNORED])
        assert end == len(pair.input_ids) - 1, "the template's line end after the turn is not generated"
        sides = {"chosen_ids": pair.input_ids[start:end], "rejected_ids": pair.rejected_input_ids[start:stop]}
        theirs.append({"prompt_ids": pair.input_ids[:start]} | sides)
    wanted = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(theirs)
    found = Sides(tokenizer.pad_token_id, 1)([vars(pair) for pair in made])
    assert (found["completion_mask"][:, :-1] == wanted["completion_mask"]).all()
    seen = wanted["attention_mask"] == 1
    assert (found["input_ids"][:, :-1][seen] == wanted["input_ids"][seen]).all()


def test_neighbours_are_those_of_trl(tokenizer: Any) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    from train.methods.kto import Neighbours

    rows = [ROW | {"label": True}, worse("No.") | {"messages": worse("No.")["rejected"], "label": False}]
    [first], [second] = judgements(tokenizer, rows, LONG)
    parts = []
    for made in (first, second):
        start = next(index for index, label in enumerate(made.labels) if label != IGNORED)
        answer = [label for label in made.labels if label != IGNORED]
        parts.append({"prompt_ids": made.input_ids[:start], "completion_ids": answer, "label": bool(made.good[0])})
    theirs = [part | {"KL_completion_ids": parts[at - 1]["completion_ids"]} for at, part in enumerate(parts)]
    wanted = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id)(theirs)
    found = Neighbours(tokenizer.pad_token_id, 1, LONG)([vars(first), vars(second)])
    assert found["label"].tolist() == wanted["label"].tolist() == [True, False]
    for name in ("KL_input_ids", "KL_attention_mask", "KL_completion_mask"):
        assert (found[name] == wanted[name]).all(), name
    assert (found["completion_mask"][:, :-1] == wanted["completion_mask"]).all()


def test_the_orpo_of_trl_is_the_one_that_ours_is_made_for(base_folder: Path, tokenizer: Any) -> None:
    """It is experimental: what is overridden must give what TRL's own gives, of answers as TRL is given them."""
    from types import SimpleNamespace

    from torch import device, no_grad
    from trl.experimental.orpo import ORPOTrainer

    from pipeline.model import load
    from train.methods.orpo import Orpo
    from train.packing import Sides

    made = [pairs(tokenizer, [worse(answer)], LONG)[0][0] for answer in ("No.", "I have no idea of that at all.")]
    batch = Sides(tokenizer.pad_token_id, 1)([vars(pair) for pair in made])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    whole = {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": batch["attention_mask"]}
    halves = {"chosen": slice(0, 2), "rejected": slice(2, 4)}
    theirs = {f"{side}_{what}": each[half] for side, half in halves.items() for what, each in whole.items()}
    trainer = Orpo.__new__(Orpo)
    trainer.aux_loss_enabled, trainer.is_encoder_decoder, trainer.padding_value = False, False, 0
    trainer.accelerator = SimpleNamespace(device=device("cpu"))
    with no_grad():
        model = load(base_folder, "float32")
        found = trainer.concatenated_forward(model, batch)
        wanted = ORPOTrainer.concatenated_forward(trainer, model, theirs)
    for ours, other in zip(found[:2], wanted[:2], strict=True):
        assert ours.tolist() == pytest.approx(other.tolist(), rel=1e-5)


def test_a_cut_that_leaves_both_answers_equal_leaves_the_pair_out(tokenizer: Any) -> None:
    row = worse("Due, the third.")
    [[whole]] = pairs(tokenizer, [row], LONG)
    differ = next(
        at for at, both in enumerate(zip(whole.labels, whole.rejected_labels, strict=False)) if len({*both}) > 1
    )
    assert pairs(tokenizer, [row], differ) == [[]]
    assert len(pairs(tokenizer, [row], differ + 1)[0]) == 1


def test_only_labelled_tokens_meet_the_output_layer(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a private name of TRL's: the tokens of prompts are most of a batch, and two of three seconds of a step."""
    import torch
    from trl.trainer import utils

    from pipeline.model import load
    from train.scoring.preference import score_only_labels

    met, fused = [], utils._ChunkedLogProbFunction.apply

    def counted(hidden: torch.Tensor, *rest: Any) -> Any:
        met.append(len(hidden))
        return fused(hidden, *rest)

    monkeypatch.setattr(utils, "_use_triton", None)
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", counted)
    score_only_labels()
    model, ids = load(base_folder, "float32"), torch.arange(5, 17).view(2, 6)
    labels = ids.masked_fill(torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]) == 0, IGNORED)
    utils.add_fused_lm_head(model)
    with torch.no_grad():
        scored = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        wanted = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert met == [4]
    torch.testing.assert_close(scored, wanted.where(labels[:, 1:] != IGNORED, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preferred", OF_PAIRS, indirect=True)
def test_both_sides_are_shown(preferred: tuple[str, Workplace], capsys: pytest.CaptureFixture[str]) -> None:
    from train.preview import preview

    _, work = preferred
    preview(work.recipe, work.run, "1")
    said = capsys.readouterr().out
    assert ", chosen: " in said and ", rejected: " in said and "I would rather not" in said
    told = json.loads(work.run.path("tokens", "preview.json").read_text())["example"]
    assert [told["name"], *(side["name"] for side in told["others"])] == ["chosen", "rejected"]
