"""Several processes learn what one does, stop together, and leave none behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Workplace

from pipeline import UserError, load
from train.launch import Launch, arguments, launch, variables

REPOSITORY = Path(__file__).parents[2]
HOSTS = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
SECONDS = 300  # two processes that share a core with others start slowly


@pytest.mark.parametrize(
    ("keys", "gpus", "environment", "wanted"),
    [
        ([], 0, {}, Launch(1)),
        ([], 1, {}, Launch(1)),
        ([], 8, {}, Launch(8)),  # all of them, without being asked
        (["launch.gpus=4"], 8, {}, Launch(4)),
        (["launch.gpus=4"], 8, {"NPROC": "2"}, Launch(2)),
        ([], 0, {"NPROC": "2"}, Launch(2)),
        (["launch.gpus=8"], 0, {"NPROC": "1"}, Launch(1)),
        (["launch.nodes=2"], 8, HOSTS, Launch(8, 2, 1, "10.0.0.1")),
        (["launch.nodes=2"], 8, HOSTS | {"MASTER_PORT": "4000"}, Launch(8, 2, 1, "10.0.0.1", 4000)),
    ],
)
def test_how_many_processes(keys: list[str], gpus: int, environment: dict[str, str], wanted: Launch) -> None:
    assert launch(load("tiny", keys), gpus, environment) == wanted


@pytest.mark.parametrize(
    ("keys", "gpus", "environment", "problem"),
    [
        (["launch.gpus=9"], 8, {}, "9 processes, here are 8 GPUs: set launch.gpus=all"),
        ([], 2, {"NPROC": "3"}, "3 processes, here are 2 GPUs"),
        (["launch.gpus=2"], 0, {}, "launch.gpus=2, here is none: set it to all, or NPROC=2 for the processor"),
        ([], 2, {"NPROC": "two"}, "NPROC=two: give a whole number"),
        (["launch.strategy=zero3"], 0, {}, "launch.strategy=zero3 needs NVIDIA GPUs, here is none"),
        (["train.tuner=qlora", "launch.strategy=fsdp"], 2, {}, "fsdp does not share the 4 bits of qlora"),
        (["launch.nodes=2"], 8, {}, "run the same command on each host, with NODE_RANK=0"),
        (["launch.nodes=2"], 8, HOSTS | {"NODE_RANK": "2"}, "NODE_RANK=2: with launch.nodes=2 the last host is 1"),
        (["launch.nodes=2"], 8, HOSTS | {"MASTER_PORT": "x"}, "MASTER_PORT=x: give a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_start_is_refused(keys: list[str], gpus: int, environment: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        launch(load("tiny", keys), gpus, environment)


def test_a_recipe_says_how_many_or_all() -> None:
    assert [load("tiny", [f"launch.gpus={given}"]).launch.gpus for given in ("all", "8")] == ["all", 8]
    for wrong in ("some", "0", "null"):
        with pytest.raises(UserError, match=r"launch\.gpus"):
            load("tiny", [f"launch.gpus={wrong}"])


def test_torchrun_is_asked_for_one_host_on_loopback_and_for_several_by_their_address() -> None:
    task = Path("runs/tiny/launch/task.json")
    common = ["--nproc-per-node=2", "--shutdown-timeout=5", "--max-restarts=0", "--signals-to-handle=SIGQUIT"]
    worker = ["-m", "train.run", str(task)]
    loopback = ["--rdzv-id=tiny", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    assert arguments(Launch(2), "tiny", task) == [*common, *loopback, *worker]
    hosts = ["--rdzv-id=tiny", "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"]
    assert arguments(Launch(2, 2, 1, "10.0.0.1"), "tiny", task) == [*common, *hosts, *worker]


def test_the_processes_share_the_cores_and_speak_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.launch.cores", lambda: 9)
    monkeypatch.setattr(sys, "platform", "linux")
    assert variables(load("tiny", []), Launch(2), 0) == {
        "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    sharded = variables(load("tiny", ["launch.strategy=fsdp"]), Launch(8, 2, 0, "10.0.0.1"), 8)
    assert sharded == {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }  # fmt: skip


def test_one_process_that_sees_several_gpus_is_refused(based: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit):
        based.make("train")


def started(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`train.run` in a session of its own, as `make train NPROC=2` starts it."""
    given = os.environ | {"PYTHONPATH": str(REPOSITORY), "GOMP_SPINCOUNT": "1000"} | environment
    command = [sys.executable, "-m", "train.run", "line.yaml", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=given, stdout=pipe, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(status, what it told)."""
    told, _ = process.communicate(timeout=SECONDS)
    return process.returncode, told


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below it, by rank."""
    with suppress(psutil.NoSuchProcess):
        found = [child for child in psutil.Process(process.pid).children() if "train.run" in child.cmdline()]
        return sorted(found, key=lambda child: int(child.environ()["RANK"]))
    return []


def until(there: Callable[[], Any]) -> Any:
    """What `there` finds, once it finds something."""
    last = time.monotonic() + SECONDS
    while not (found := there()):
        assert time.monotonic() < last
        time.sleep(0.02)
    return found


def in_training(folder: Path) -> bool:
    """Whether the first step is done."""
    return (folder / "runs/line/checkpoints/heartbeat.json").exists()


def curve(folder: Path) -> list[float]:
    metrics = json.loads((folder / "runs/line/train.json").read_text())["metrics"]
    return [loss for name in ("loss_curve", "validation_curve") for _, loss in metrics[name]]


@pytest.fixture
def twins(based: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two copies of the workplace, with an odd number of packed rows, to train in one process and in two."""
    recipe = based.folder / "line.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 1e-2", "learning_rate: 1e-3"))
    other = shutil.copytree(based.folder, tmp_path_factory.mktemp("other"), symlinks=True, dirs_exist_ok=True)
    yield based.folder, other


def assert_one_learned_what_two_did(one: Path, two: Path) -> None:
    assert curve(two) == pytest.approx(curve(one), abs=2e-4)
    receipts = [json.loads((folder / "runs/line/train.json").read_text()) for folder in (one, two)]
    for name in ("tokens", "supervised_tokens", "trainable_parameters", "steps", "best_step"):
        assert receipts[0]["metrics"][name] == receipts[1]["metrics"][name], name
    from safetensors.torch import load_file

    files = [next((folder / "runs/line/trained").glob("*.safetensors")) for folder in (one, two)]
    mine, theirs = (load_file(file) for file in files)
    assert mine.keys() == theirs.keys()
    assert all((mine[name] - theirs[name]).abs().max() < 2e-3 for name in mine)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(twins: tuple[Path, Path]) -> None:
    """Though they do not share the last rows of an epoch evenly: Accelerate repeats some, which must not count."""
    one, two = twins
    status, told = ended(started(one, "train.batch_size=2", "train.gradient_accumulation=2"))
    assert status == 0, told
    status, told = ended(started(two, "train.batch_size=2", "launch.strategy=ddp", NPROC="2"))
    assert status == 0, told
    assert "error" not in told.lower() and "warning" not in told.lower(), told
    assert_one_learned_what_two_did(one, two)


@pytest.mark.slow
def test_one_that_is_killed_ends_all_and_the_next_start_resumes(twins: tuple[Path, Path]) -> None:
    one, killed = twins
    words = ("train.tuner=full", "train.batch_size=1", "train.epochs=4", "train.early_stopping_patience=0")
    status, told = ended(started(one, *words, "train.gradient_accumulation=2"))
    assert status == 0, told
    sharded = (*words, "launch.strategy=fsdp")
    process = started(killed, *sharded, NPROC="2")
    checkpoints = killed / "runs/line/checkpoints"
    until(lambda: any(checkpoints.glob("checkpoint-*")))
    both = workers(process)
    both[1].kill()
    status, told = ended(process)
    assert status == 1, told
    assert (
        "error: process 1 of 2 was killed by SIGKILL: the others were ended, 'make train RECIPE=line.yaml' resumes"
        in told
    )
    assert "Traceback" not in told and "exitcode" not in told
    assert not any(each.is_running() for each in both)
    status, told = ended(started(killed, *sharded, NPROC="2"))
    assert status == 0, told
    assert "resuming from" in told and "warning" not in told.lower(), told
    assert_one_learned_what_two_did(one, killed)


@pytest.mark.slow
def test_a_signal_stops_both_after_the_same_step(twins: tuple[Path, Path]) -> None:
    folder, _ = twins
    process = started(folder, "train.epochs=50", NPROC="2")
    until(lambda: in_training(folder))
    both = workers(process)
    process.send_signal(signal.SIGINT)
    status, told = ended(process)
    assert status == 130, told
    assert "its checkpoint is saved: 'make train RECIPE=line.yaml' resumes from there" in told
    assert told.count("saving a checkpoint after this step") == 1
    assert not any(each.is_running() for each in both)


@pytest.mark.slow
def test_two_hosts_train_one_model(twins: tuple[Path, Path]) -> None:
    folder, _ = twins
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hosts = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [started(folder, "launch.nodes=2", NODE_RANK=str(node), **hosts) for node in (1, 0)]
    (joined, told), (status, first) = map(ended, both)
    assert (joined, status) == (0, 0), told + first
    assert "train: 2 processes, ddp" in first
    assert len(curve(folder)) > 2
    assert "receipt" in first and "receipt" not in told


@pytest.mark.slow
def test_no_process_outlives_the_command(twins: tuple[Path, Path]) -> None:
    folder, _ = twins
    process = started(folder, "train.epochs=50", NPROC="2")
    until(lambda: in_training(folder))
    both = workers(process)
    process.kill()
    ended(process)  # once none of them holds its output open
    gone, alive = psutil.wait_procs(both, timeout=20)
    assert len(gone) == 2 and not alive
