"""The whole line under make: from nothing, killed on the way, and again where nothing or one thing changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import MODEL_FILES

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
RECIPE = """
base_model: random
data: {train: talks.jsonl, validation: 0.2}
train: {epochs: 3, learning_rate: 1e-3, max_length: 64, max_new_tokens: 4,
        evals_per_epoch: 2, early_stopping_patience: 0}
gguf: {types: [Q8_0]}
"""
RECEIPTS = {"data", "base", "train", "reference", "merge", "gguf"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRUETUNE")}
    return subprocess.Popen(
        ["make", *arguments, "RECIPE=mine.yaml"],
        cwd=folder,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(folder: Path, *arguments: str) -> str:
    """What a make that succeeds says on stderr."""
    with start(folder, *arguments) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def state(folder: Path, *parts: str) -> dict[str, tuple[int, bytes]]:
    """Time and content of the receipts, or of the files below a folder of the run."""
    run = folder / "runs/mine"
    files = (
        [file for part in parts for file in (run / part).rglob("*") if file.is_file()] if parts else run.glob("*.json")
    )
    return {str(file.relative_to(run)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def content(found: dict[str, tuple[int, bytes]]) -> dict[str, bytes]:
    return {name: text for name, (_, text) in found.items()}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which `make gguf` was killed while it trained, and then run again."""
    folder = tmp_path_factory.mktemp("line")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    # This environment under another name, complete: make must not set it up again.
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/.complete").touch()
    (folder / ".cache").symlink_to(REPOSITORY / ".cache")
    (folder / "mine.yaml").write_text(RECIPE)
    with (folder / "talks.jsonl").open("w") as talks:
        for number in range(10):
            messages = [("user", f"What is {number}?"), ("assistant", f"A number, {number}.")]
            talks.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}) + "\n")

    checkpoints, end = folder / "runs/mine/checkpoints", time.monotonic() + 240
    with start(folder, "gguf") as process:
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    (folder / "killed").write_text("\n".join(sorted(state(folder))))
    (folder / "said").write_text(make(folder, "gguf"))
    return folder


@pytest.fixture
def again(line: Path, tmp_path: Path) -> Path:
    """A copy of the finished line, for a test that changes it; times and links are kept."""

    def link_or_copy(here: str, there: str) -> None:
        os.link(here, there) if here.endswith((".safetensors", ".gguf")) else shutil.copy2(here, there)

    return shutil.copytree(line, tmp_path / "line", copy_function=link_or_copy, symlinks=True)


def test_a_killed_make_leaves_the_receipts_of_what_was_done(line: Path) -> None:
    assert (line / "killed").read_text().split() == ["base.json", "data.json"]


def test_make_after_a_kill_goes_on_from_the_last_checkpoint(line: Path) -> None:
    said = (line / "said").read_text()
    assert "resuming from runs/mine/checkpoints/checkpoint-" in said
    assert "base: up to date" in said or "base: " not in said, "what was done is not done again"


def test_a_killed_training_has_every_step_once(line: Path) -> None:
    metrics = json.loads((line / "runs/mine/train.json").read_text())["metrics"]
    assert [step for step, _ in metrics["loss_curve"]] == list(range(1, metrics["steps"] + 1))


def test_there_is_a_receipt_a_stage(line: Path) -> None:
    assert {Path(name).stem for name in state(line)} == RECEIPTS


def test_the_receipts_chain(line: Path) -> None:
    receipts = {name: json.loads(text) for name, text in content(state(line)).items()}
    made = {path: mark for receipt in receipts.values() for path, mark in receipt["outputs"].items()}
    used = {path: mark for receipt in receipts.values() for path, mark in receipt["inputs"].items()}
    assert {path for path in used if path not in made} == {"talks.jsonl", "smollm2-135m"}
    assert all(made[path] == mark for path, mark in used.items() if path in made)


def test_the_run_has_these_files(line: Path) -> None:
    files = set(state(line, "data", "base", "trained", "merged", "gguf"))
    assert files == {
        *(f"data/{name}" for name in ("train.arrow", "validation.arrow", "heldout.jsonl", "rejected.jsonl")),
        *(f"base/{name}" for name in MODEL_FILES),
        "trained/adapter_config.json",
        "trained/adapter_model.safetensors",
        "trained/kind.json",
        *(f"merged/{name}" for name in MODEL_FILES),
        "gguf/mine-F16.gguf",
        "gguf/mine-Q8_0.gguf",
    }


def test_nothing_half_made_is_left(line: Path) -> None:
    hidden = {path.name for path in (line / "runs/mine").rglob(".*")}
    assert hidden == {".lock"}


def test_a_second_make_changes_nothing(again: Path) -> None:
    before = state(again)
    assert make(again, "gguf") == ""
    assert state(again) == before


def test_a_touched_data_file_is_checked_and_changes_no_artefact(again: Path) -> None:
    receipts, artefacts = state(again), state(again, "data", "base", "trained", "merged", "gguf")
    os.utime(again / "talks.jsonl")
    said = make(again, "gguf")
    assert "data: up to date" in said and ": done in" not in said
    assert content(state(again)) == content(receipts)
    assert state(again, "data", "base", "trained", "merged", "gguf") == artefacts


def test_a_changed_port_reruns_nothing(again: Path) -> None:
    before = state(again)
    (again / "mine.yaml").write_text(RECIPE + "serve: {port: 8123}\n")
    assert make(again, "gguf") == ""
    assert state(again) == before


def test_a_changed_quantization_reruns_gguf_only(again: Path) -> None:
    before = state(again)
    (again / "mine.yaml").write_text(RECIPE.replace("Q8_0", "Q6_K"))
    make(again, "gguf")
    after = state(again)
    assert {name for name in after if after[name] != before[name]} == {"gguf.json"}
    assert set(state(again, "gguf")) == {"gguf/mine-F16.gguf", "gguf/mine-Q6_K.gguf", "gguf/imatrix.gguf"}


def test_bad_data_stops_make_with_one_line(again: Path) -> None:
    before = state(again)
    (again / "talks.jsonl").write_text('{"messages": []}\n')
    with start(again, "gguf") as process:
        stdout, stderr = process.communicate(timeout=60)
    errors = [text for text in stderr.splitlines() if text.startswith("error: ")]
    assert process.returncode == 2
    assert len(errors) == 1 and errors[0].startswith("error: talks.jsonl:1: no turns; none of this file's rows (1)")
    assert "Traceback" not in stderr + stdout
    assert state(again) == before


def test_no_process_is_left(line: Path) -> None:
    there = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours to look at
            there += [process.name] * ((process / "cwd").readlink() == line)
    assert there == []
