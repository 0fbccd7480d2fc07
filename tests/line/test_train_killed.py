"""A training that is killed at any moment, as often as you like, ends as the one that was left alone."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workplace

from train.trainer.checkpoints import last_complete

KILLS = 4
LONGER = (
    "epochs: 2",
    "epochs: 9, early_stopping_patience: 0, lora: {dropout: 0.1}",
)  # with dropout the dice too must go on
CURVES = ("loss_curve", "validation_curve", "steps", "best_step", "tokens", "supervised_tokens", "after")


def train(folder: str) -> None:
    with contextlib.chdir(folder):
        Workplace(Path(folder)).make("train")


@pytest.fixture(scope="module")
def start() -> Callable[[Path], Any]:
    """Start a training in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train.run", "train.methods.sft", "datasets", "tensorboard"])

    def starting(folder: Path) -> Any:
        process = context.Process(target=train, args=(str(folder),))
        process.start()
        return process

    return starting


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: the curves, and the bytes of what was trained."""
    with contextlib.chdir(folder):
        receipt = Workplace(folder).receipt("train")
    weights = {path: mark for path, mark in receipt["outputs"].items() if path.endswith(".safetensors")}
    return {"trained": weights} | {name: receipt["metrics"][name] for name in CURVES}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    based: Workplace, tmp_path_factory: pytest.TempPathFactory, start: Callable
) -> None:
    """Of an adapter; whole weights are killed in test_train_launch."""
    recipe = Path("line.yaml")
    recipe.write_text(recipe.read_text().replace(*LONGER))
    alone, killed = (
        shutil.copytree(based.folder, tmp_path_factory.mktemp(name), symlinks=True, dirs_exist_ok=True)
        for name in ("alone", "killed")
    )
    left_alone = start(alone)
    left_alone.join()
    assert left_alone.exitcode == 0

    dice = random.Random(0)
    checkpoints = killed / "runs/line/checkpoints"
    for kill in range(KILLS):
        whole = set(checkpoints.glob("checkpoint-*"))
        process = start(killed)
        # In turn: while a checkpoint is written, and anywhere up to some steps after one was completed.
        while process.is_alive() and not (
            (checkpoints / ".saving").exists() if kill % 2 else set(checkpoints.glob("checkpoint-*")) - whole
        ):
            time.sleep(0.001)
        process.join(dice.uniform(0, 0.1 if kill % 2 else 0.3))
        assert process.is_alive(), "too few steps for so many kills"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert outcome(killed) == outcome(alone)


@pytest.mark.parametrize(("wish", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_ends(
    wish: signal.Signals, code: int, based: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.trainer.resumable import Resumable

    recipe = Path("line.yaml")
    recipe.write_text(recipe.read_text().replace(*LONGER))
    steps_done = 0

    def signalled(self: Any, *arguments: Any) -> Any:
        nonlocal steps_done
        steps_done += 1
        if steps_done == 3:
            signal.raise_signal(wish)
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        real = Resumable.training_step
        patched.setattr(Resumable, "training_step", signalled)
        with pytest.raises(SystemExit) as ended:
            based.make("train")
    assert ended.value.code == code
    said = "stopped at step 3 of 45, its checkpoint is saved: 'make train RECIPE=line.yaml' resumes from there\n"
    assert capsys.readouterr().err.endswith(said)
    assert last_complete(based.run.path("checkpoints")) == based.run.path("checkpoints/checkpoint-3")


@pytest.mark.parametrize("step", [5, 10])
@pytest.mark.slow
def test_a_signal_ends_a_validation_which_the_next_start_does_first(
    step: int, based: Workplace, _trained: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from train.trainer.resumable import Resumable

    batches = 0

    def signalled(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal batches
        if not self.apart and self.state.global_step == step:
            batches += 1
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        real = Resumable.prediction_step
        patched.setattr(Resumable, "prediction_step", signalled)
        with pytest.raises(SystemExit) as ended:
            based.make("train")
        assert (ended.value.code, batches) == (143, 1)
        assert last_complete(based.run.path("checkpoints")) == based.run.path(f"checkpoints/checkpoint-{step}")
        with pytest.raises(SystemExit):  # once more, in the validation that comes first
            based.make("train")
        assert batches == 2
    assert f"stopped at step {step} of 10, its checkpoint is saved" in capsys.readouterr().err
    based.make("train")
    assert outcome(based.folder) == outcome(_trained)
