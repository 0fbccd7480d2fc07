"""What ends a training badly is told with what to do, and the next start goes on: disk, memory, kills, damage."""

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Workplace

from pipeline import UserError
from pipeline.files import files_below, fingerprint
from train import run as stage
from train.trainer.checkpoints import MANIFEST, last_complete, open_folder
from train.trainer.journal import OUT_OF_MEMORY, Journal, is_shortage, recorded

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros, as after a loss of power": lambda content: bytes(len(content)),
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "one bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST])
def test_a_damaged_file_sets_its_checkpoint_aside(
    name: str, how: str, trained: Workplace, replace: Callable[[Path, bytes], None]
) -> None:
    folder = trained.run.path("checkpoints")
    last = folder / "checkpoint-10"
    replace(last / name, DAMAGES[how]((last / name).read_bytes()))
    assert last_complete(folder) == folder / "checkpoint-5"
    assert (folder / "checkpoint-10.incomplete").is_dir()


def test_what_was_being_written_is_set_aside(trained: Workplace) -> None:
    folder = trained.run.path("checkpoints")
    (folder / ".saving").mkdir()
    (folder / "checkpoint-10").rename(folder / ".saving/checkpoint-10")
    key = (folder / "training.key").read_text()
    assert open_folder(folder, key) == folder / "checkpoint-5"
    assert (folder / "checkpoint-10.incomplete").is_dir() and not (folder / ".saving").exists()
    assert open_folder(folder, key) == folder / "checkpoint-5" and not (folder / "checkpoint-10.incomplete").exists()


def test_a_lost_best_checkpoint_is_told_and_the_best_of_the_others_kept(
    trained: Workplace, caplog: pytest.LogCaptureFixture, replace: Callable[[Path, bytes], None]
) -> None:
    best, last = (trained.run.path("checkpoints", f"checkpoint-{step}") for step in (5, 10))
    state = json.loads((last / "trainer_state.json").read_text()) | {"best_global_step": 5}
    replace(last / "trainer_state.json", json.dumps(state).encode())
    manifest = json.loads((last / MANIFEST).read_text()) | {
        "trainer_state.json": fingerprint(last / "trainer_state.json")
    }
    replace(last / MANIFEST, json.dumps(manifest).encode())
    replace(best / "adapter_model.safetensors", b"")
    trained.run.receipt_path("train").unlink()
    with caplog.at_level(logging.INFO, "truetune"):
        trained.make("train")
    assert f"{best}, the best so far, is lost (adapter_model.safetensors has 0 of " in caplog.text
    assert trained.receipt("train")["metrics"]["best_step"] == 10


@pytest.fixture
def small_disk(based: Workplace) -> Iterator[Callable[[int], None]]:
    """Give the checkpoints a disk of their own, of so many bytes; again for more."""
    folder = based.run.path("checkpoints")
    open_folder(folder, stage.training_key(based.recipe, based.run))

    def mount(size: int) -> None:
        again = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-o", f"size={size}"]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this user may not mount a small disk")
        open_folder(folder, stage.training_key(based.recipe, based.run))

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_next_start_goes_on(
    based: Workplace, _trained: Path, small_disk: Callable, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one = sum(file.stat().st_size for file in files_below(_trained / "runs/line/checkpoints/checkpoint-10"))
    small_disk(int(1.7 * one))
    with pytest.raises(SystemExit) as ended:
        based.make("train")
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the disk of runs/line/checkpoints has ") and " checkpoint-10 needs " in said
    assert said.endswith(" MB: free some space, the same command resumes from the last checkpoint")
    assert [path.name for path in based.run.path("checkpoints").glob("*checkpoint*")] == ["checkpoint-5"]
    small_disk(4 * one)
    with caplog.at_level(logging.INFO, "truetune"):
        based.make("train")
    assert "resuming from runs/line/checkpoints/checkpoint-5" in caplog.text
    assert [step for step, _ in based.receipt("train")["metrics"]["loss_curve"]] == list(range(1, 11))


SHORTAGES = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_a_shortage_is_told_with_the_key_to_change(error: BaseException, based: Workplace) -> None:
    based.run.path("checkpoints").mkdir()
    recipe = replace(based.recipe, train=replace(based.recipe.train, batch_size=64, gradient_accumulation=3))
    with pytest.raises(UserError) as raised, recorded(recipe, based.run, None):
        raise error
    assert "set train.batch_size=1 train.gradient_accumulation=192: planned with " in str(raised.value)


def test_another_error_keeps_its_traceback(based: Workplace) -> None:
    based.run.path("checkpoints").mkdir()
    with pytest.raises(RuntimeError, match="a bug"), recorded(based.recipe, based.run, None):
        raise RuntimeError("a bug")
    assert not is_shortage(RuntimeError("a bug"))


def test_torch_without_memory_says_what_is_recognized() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_shortage(raised.value)


def test_knobs_of_memory_go_on_from_the_same_checkpoint(based: Workplace) -> None:
    def key(**knobs: Any) -> str:
        return stage.training_key(replace(based.recipe, train=replace(based.recipe.train, **knobs)), based.run)

    assert (
        key(batch_size=4)
        == key(batch_size=2, gradient_accumulation=2)
        == key(batch_size=4, gradient_checkpointing=True, stop_on_divergence=False)
    )
    assert key(batch_size=4) != key(batch_size=2)


def test_a_death_without_a_word_is_told(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    assert first.start(0) is None
    first.beat(7)
    second = Journal(tmp_path)
    assert second.start(5) == "it was killed"
    assert second.interruptions() == [{"step": 7, "why": "it was killed"}]
    second.end("SIGTERM")
    third = Journal(tmp_path)
    assert third.start(5) is None, "it could say how it ended"
    assert third.interruptions()[1:] == [{"step": 5, "why": "SIGTERM"}]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"boot": "another"}, "the machine was restarted"),
        ({"out_of_memory_kills": -1}, OUT_OF_MEMORY),
    ],
)
def test_the_journal_tells_why(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(0)
    line = json.loads(journal.path.read_text()) | change
    journal.path.write_text(json.dumps(line) + "\n")
    assert Journal(tmp_path).start(0) == why


def test_a_process_that_held_nearly_all_memory_was_short_of_it(
    tmp_path: Path, based: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(based.run.path("checkpoints"))
    journal.path.parent.mkdir()
    journal.start(0)
    journal.beats.write_text(json.dumps({"step": 3, "resident_bytes": 95, "free_bytes": 5}))
    with recorded(based.recipe, based.run, None):
        pass
    assert "the last training ended without a word, out of memory: use a base of at most " in caplog.text


def test_a_cut_journal_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(0)
    journal.end("finished")
    with journal.path.open("a") as file:
        file.write('{"event": "sta')
    assert [event["event"] for event in Journal(tmp_path).events()] == ["start", "finished"]
