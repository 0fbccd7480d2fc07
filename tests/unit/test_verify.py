"""`make verify` names the first link of the line that does not hold."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import Run, UserError
from pipeline.files import fingerprint
from pipeline.proof import Comparison, write_comparisons
from pipeline.run import Receipt
from pipeline.stages import stage as stage_of
from report.verify import verify


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of three stages whose files and receipts fit together."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text("conversations")
    run = Run("mine")
    run.folder.mkdir(parents=True)
    read: dict[str, list[Path]] = {
        "data": [Path("my.jsonl")],
        "base": [],
        "train": [run.path("data.txt"), run.path("base.txt")],
    }
    for stage, inputs in read.items():
        run.path(f"{stage}.txt").write_text(f"what {stage} made")
        write(run, stage, inputs)
    return run


def write(run: Run, stage: str, inputs: list[Path]) -> None:
    """The receipt of a stage that wrote `<stage>.txt`."""
    marks = [{str(path): fingerprint(path) for path in paths} for paths in (inputs, [run.path(f"{stage}.txt")])]
    run.write_receipt(Receipt(stage, {}, *marks, {}, {}, "2026-01-01T00:00:00+00:00", 1.0, 1))


def test_a_whole_line_holds(run: Run) -> None:
    assert verify(run) == [("data", 2), ("base", 1), ("train", 3)]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("runs/mine/train.txt", "train: runs/mine/train.txt is not what the stage wrote"),
        ("runs/mine/base.txt", "base: runs/mine/base.txt is not what the stage wrote"),
        ("runs/mine/data.txt", "data: runs/mine/data.txt is not what the stage wrote"),
    ],
)
def test_a_changed_file_is_named_with_the_stage_that_wrote_it(run: Run, changed: str, problem: str) -> None:
    Path(changed).write_text("WHAT IT WAS")
    with pytest.raises(UserError, match=rf"{problem}.*: delete runs/mine/\w+\.json and run 'make \w+ RECIPE=mine'"):
        verify(run)


def test_a_changed_source_outside_the_run_is_named(run: Run) -> None:
    Path("my.jsonl").write_text("CONVERSATIONS")
    with pytest.raises(UserError, match=r"data: my\.jsonl has changed since the stage read it"):
        verify(run)


def test_a_file_that_is_gone_is_named(run: Run) -> None:
    run.path("base.txt").unlink()
    with pytest.raises(UserError, match=r"base: runs/mine/base\.txt is gone"):
        verify(run)


def test_a_file_that_no_stage_wrote_is_named(run: Run) -> None:
    folder = run.path("adapter")
    folder.mkdir()
    (folder / "weights").write_text("trained")
    marks = {str(path): fingerprint(path) for path in (run.path("train.txt"), folder / "weights")}
    inputs = run.receipt("train").inputs
    run.write_receipt(Receipt("train", {}, inputs, marks, {}, {}, "2026-01-01T00:00:00+00:00", 1.0, 1))
    verify(run)
    (folder / "more").write_text("slipped in")
    with pytest.raises(UserError, match=r"train: runs/mine/adapter/more was written by no stage"):
        verify(run)


def test_a_receipt_that_was_edited_is_named_at_the_stage_that_read_its_output(run: Run) -> None:
    run.path("data.txt").write_text("other conversations")
    write(run, "data", [Path("my.jsonl")])
    with pytest.raises(UserError, match=r"train: it was made from another runs/mine/data\.txt"):
        verify(run)


def test_an_output_that_the_next_stage_never_read_is_named(run: Run) -> None:
    write(run, "train", [run.path("data.txt")])
    with pytest.raises(UserError, match=r"train: it was made without runs/mine/base\.txt"):
        verify(run)


PROOFS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "verdict": {"passed": True},
    "comparisons": {"comparisons": [], "passed": True},
}


@pytest.mark.parametrize("edited", PROOFS)
def test_an_edited_proof_is_named(run: Run, edited: str) -> None:
    comparison = Comparison("merge", {}, ["logits: lost"])
    for stage in ("reference", "merge", "gguf"):
        run.path(f"{stage}.txt").write_text(stage)
        upstream = [run.path(f"{before}.txt") for before in stage_of(stage).after]
        write(run, stage, upstream)
    write_comparisons(run.path("compare.jsonl"), [comparison])
    outputs = {str(run.path("compare.jsonl")): fingerprint(run.path("compare.jsonl"))}
    inputs = {str(run.path(f"{before}.txt")): fingerprint(run.path(f"{before}.txt"))
              for before in stage_of("compare").after}  # fmt: skip
    run.write_receipt(Receipt("compare", {}, inputs, outputs, {}, {}, "2026-01-01T00:00:00+00:00", 1.0, 1))
    inputs = {path: run.receipt(before).outputs[path] for before in stage_of("prove").after
              for path in run.receipt(before).outputs}  # fmt: skip
    metrics = {"passed": False, "comparisons": [vars(comparison)]} | PROOFS[edited]
    run.write_receipt(Receipt("prove", {}, inputs, {}, {}, metrics, "2026-01-01T00:00:00+00:00", 1.0, 1))
    if edited == "as it was":
        assert verify(run)[-1] == ("prove", 3)
    else:
        with pytest.raises(UserError, match=r"prove: runs/mine/prove\.json does not say what was compared"):
            verify(run)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which file a process holds")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_server_that_still_holds_the_file_before_is_named(run: Run, replaced: bool) -> None:
    for stage in ("reference", "merge", "gguf", "compare"):
        run.path(f"{stage}.txt").write_text(stage)
        write(run, stage, [run.path(f"{before}.txt") for before in stage_of(stage).after])
    path = run.path("gguf.txt")
    holding = (
        "import mmap, sys; file = open(sys.argv[1]); held = mmap.mmap(file.fileno(), 0, prot=1); print(1); input()"
    )
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", holding, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None and server.stdout.readline()
        inputs = {str(path): fingerprint(path)}
        run.write_receipt(
            Receipt("serve", {}, inputs, {}, {}, {"pid": server.pid}, "2026-01-01T00:00:00+00:00", 1.0, 1)
        )
        if replaced:
            copy = path.with_suffix(".copy")
            shutil.copy(path, copy)
            copy.replace(path)
            with pytest.raises(UserError, match=rf"serve: process {server.pid} serves the runs/mine/gguf\.txt"):
                verify(run)
        else:
            assert verify(run)[-1] == ("serve", 1)
    finally:
        server.communicate(b"\n")


def test_a_stage_made_from_an_older_upstream_is_named(run: Run) -> None:
    run.path("base.txt").write_text("a newer base")
    write(run, "base", [])
    with pytest.raises(UserError, match=r"train: it was made from another runs/mine/base\.txt"):
        verify(run)
