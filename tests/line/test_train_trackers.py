"""Where a training is logged: TensorBoard's curves have no step twice, W&B and MLflow stay on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Workplace

from pipeline import Run, UserError
from train import trackers
from train.trainer.checkpoints import step_of

REPOSITORY = Path(__file__).parents[2]


def logged(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return [(event.step, round(event.value, 3)) for event in shown.Scalars("train/loss")]


@pytest.mark.parametrize("clock", ["right", "set back"])
def test_a_step_that_is_taken_again_is_shown_once(clock: str, tmp_path: Path) -> None:
    from train.trainer.metrics import Curves

    def train(first: int, last: int, loss: float) -> None:
        curves, state = Curves(tmp_path), SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False)
        state.global_step, state.log_history = first, [{"loss": 2.0, "step": step} for step in range(1, first + 1)]
        curves.on_train_begin(SimpleNamespace(to_json_string=str), state, None)
        for state.global_step in range(first + 1, last + 1):
            curves.on_log(None, state, None, {"loss": loss})
        curves.on_train_end(None, state, None)

    train(0, 7, 2.0)  # killed two steps after the checkpoint of step 5
    if clock == "set back":
        [file] = tmp_path.iterdir()
        file.rename(file.with_name(file.name.replace("tfevents.1", "tfevents.9")))
    train(5, 8, 1.0)
    train(5, 9, 1.0)
    assert logged(tmp_path) == [(step, 2.0) for step in range(1, 6)] + [(step, 1.0) for step in range(6, 10)]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, both trackers are there, and what is set is put back."""
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("clean")
def test_without_a_login_wandb_writes_below_the_run_folder(tmp_path: Path) -> None:
    assert trackers.prepare("wandb", Run("line", tmp_path), "0123456789abcdef0") == ["wandb"]
    assert os.environ["WANDB_MODE"] == "offline" and os.environ["WANDB_RUN_ID"] == "0123456789abcdef"
    assert os.environ["WANDB_DIR"] == str(tmp_path / "line/logs/wandb")


@pytest.mark.usefixtures("clean")
def test_a_login_or_a_wish_of_the_user_stands(tmp_path: Path) -> None:
    os.environ |= {"WANDB_API_KEY": "secret", "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    trackers.prepare("wandb", Run("line", tmp_path), "0")
    trackers.prepare("mlflow", Run("line", tmp_path), "0")
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_the_others_need_nothing(tracker: str, tmp_path: Path) -> None:
    before = dict(os.environ)
    assert trackers.prepare(tracker, Run("line", tmp_path), "0") == []
    assert os.environ == before and not (tmp_path / "line").exists()


@pytest.mark.usefixtures("clean")
def test_an_installation_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for code, left in ((1, True), (0, False)):
        python.write_text(f"#!/bin/sh\necho $* >> pip.log\nexit {code}\n")
        python.chmod(0o755)
        if code:
            trackers.unfinished(Path("mlflow.txt")).touch()
            with pytest.raises(UserError, match=r"train.tracker=mlflow is not installed: \d+ packages of mlflow.txt"):
                trackers.prepare("mlflow", Run("line", tmp_path), "0")
        else:
            trackers.prepare("mlflow", Run("line", tmp_path), "0")
        assert trackers.unfinished(Path("mlflow.txt")).exists() == left
    trackers.prepare("mlflow", Run("line", tmp_path), "0")
    assert (tmp_path / "pip.log").read_text().count("mlflow.txt") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("tracker", "written"), [("wandb", "*/offline-run-*/*.wandb"), ("mlflow", "*/*/metrics/loss")])
def test_a_run_is_written_offline_and_goes_on_as_the_same(
    tracker: str, written: str, based: Workplace, tmp_path: Path
) -> None:
    """Installed from its own lock, aside from this environment."""
    aside = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", aside]
    done = subprocess.run([*install, "-r", REPOSITORY / f"setup/locks/{tracker}.txt"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no package index in reach")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}
    for rows in (1, 2):  # another value of a key that goes on from the same checkpoint
        if rows == 2:  # as killed before its last checkpoint: the last step is taken twice
            last = max(based.run.path("checkpoints").glob("checkpoint-*"), key=step_of)
            shutil.rmtree(last)
            based.run.receipt_path("train").unlink()
        done = subprocess.run(
            [sys.executable, "-m", "train.run", "line.yaml", f"train.tracker={tracker}", "train.epochs=1",
             "train.checkpoint_minutes=0.001", f"train.batch_size={rows}", f"train.gradient_accumulation={2 // rows}"],
            env={**clean, "HOME": str(tmp_path), "PYTHONPATH": f"{REPOSITORY}:{aside}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    files = list(based.run.path("logs", tracker).glob(written))
    assert files, sorted(based.run.path("logs").rglob("*"))[:20]
    runs = {file.parent.name.rpartition("-")[2] if tracker == "wandb" else file.parts[-3] for file in files}
    assert len(runs) == 1, runs
    if tracker == "mlflow":
        told = [line.split() for line in files[0].read_text().splitlines()]  # time, loss, step
        assert [int(step) for _, _, step in told] == list(range(1, step_of(last) + 1))
    assert list(based.run.path("logs").glob("*/events.*")), "TensorBoard's files are written too"
