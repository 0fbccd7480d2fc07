"""Divergence: what goes astray is stopped with its step and conversations, what only varies is left alone."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workplace

from train.trainer.journal import STEPS_ABOVE, Watch


def seen(losses: list[float], base_loss: float | None = None) -> int | None:
    """The step at which the watch stops this training, None if it does not."""
    watch = Watch(base_loss)
    return next((step for step, loss in enumerate(losses, 1) if watch.see(loss, 1.0)), None)


def falling(steps: int, noise: float, start: float = 2.5, end: float = 1.2) -> list[float]:
    """A training that learns: an exponential fall with noise, the same each time."""
    dice = random.Random(0)
    return [end + (start - end) * math.exp(-5 * step / steps) + dice.gauss(0, noise) for step in range(steps)]


HEALTHY = {
    "quiet": falling(200, 0.01),
    "loud": falling(200, 0.4),
    "few steps": falling(12, 0.2),
    "random weights": falling(100, 0.2, 10.9, 7.0),
    "a hard batch now and then": [loss + 6 * (step % 17 == 3) for step, loss in enumerate(falling(200, 0.1))],
    "a spike from which it recovers": [loss + 5 * (100 <= step < 106) for step, loss in enumerate(falling(200, 0.1))],
    "easy rows first": [0.8 + 0.01 * step for step in range(200)],
    "overfitted epochs": [2.0] * 50 + [1.0] * 50 + [0.2] * 50,
}


@pytest.mark.parametrize("curve", HEALTHY)
def test_a_healthy_training_is_left_alone(curve: str) -> None:
    losses = HEALTHY[curve]
    assert seen(losses, base_loss=max(losses[0], losses[-1])) is None


ASTRAY = {
    "no number": ([*falling(30, 0.1), math.nan], 31),
    "infinite": ([*falling(30, 0.1), math.inf], 31),
    "a rise that stays": ([*falling(100, 0.1), *[9.0] * 20], 100 + STEPS_ABOVE),
    "a rise that grows": ([*falling(100, 0.1), *(2.5 + step for step in range(20))], 100 + STEPS_ABOVE),
    "too large a rate from the start": ([2.5, 4.0, 7.0, *[9.5] * 20], 1 + STEPS_ABOVE),
}


@pytest.mark.parametrize("curve", ASTRAY)
def test_a_training_that_goes_astray_is_stopped(curve: str) -> None:
    losses, step = ASTRAY[curve]
    assert seen(losses, base_loss=2.5) == step


def test_a_gradient_that_is_no_number_is_told() -> None:
    assert Watch(None).see(2.0, math.nan) == "the gradient's norm is nan"


def test_a_resumed_watch_is_as_one_that_never_stopped() -> None:
    whole, resumed = Watch(2.5), Watch(2.5)
    losses = ASTRAY["a rise that stays"][0]
    for loss in losses[:104]:
        whole.see(loss, 1.0)
    resumed.learn(losses[:104])
    assert (resumed.limit(), resumed.above) == (whole.limit(), whole.above)


@pytest.fixture
def poisoned(based: Workplace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A training whose loss is no number at one step."""
    from train.methods.sft import Sft

    def poison(step: int) -> None:
        real = Sft.compute_loss

        def poisoned_loss(self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
            loss = real(self, model, *arguments, **more)
            return loss * math.nan if model.training and self.state.global_step + 1 == step else loss

        monkeypatch.setattr(Sft, "compute_loss", poisoned_loss)

    return poison


def test_it_is_told_with_its_step_and_its_conversations(
    based: Workplace, poisoned: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(7)
    with pytest.raises(SystemExit) as ended:
        based.make("train")
    assert ended.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "diverged at step 7: the loss is nan (loss nan, gradient norm " in said[0]
    assert "checkpoint-5 is the last good checkpoint): set train.learning_rate=0.003 or lower" in said[0]
    places = said[1].removeprefix("error: step 7: its conversations are ").split(", ")
    talks = Path("talks.jsonl").read_text().splitlines()
    assert places and all(1 <= int(place.removeprefix("talks.jsonl:")) <= len(talks) for place in places), said[1]
    assert [path.name for path in based.run.path("checkpoints").glob("checkpoint-*")] == ["checkpoint-5"]


def test_the_knob_switches_it_off(based: Workplace, poisoned: Callable) -> None:
    Path("line.yaml").write_text(
        Path("line.yaml").read_text().replace("epochs: 2", "epochs: 2, stop_on_divergence: false")
    )
    poisoned(7)
    based.make("train")
    metrics = based.receipt("train")["metrics"]
    assert metrics["steps"] == 10 and metrics["best_step"] == 5
    assert [step for step, _ in metrics["loss_curve"]] == [1, 2, 3, 4, 5, 6], "a curve has numbers only"
