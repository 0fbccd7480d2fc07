"""`make verify` names the first link of the line that does not hold."""

from pathlib import Path

import pytest

from recipe import Run, UserError
from recipe.files import fingerprint
from recipe.run import Receipt
from recipe.verify import verify


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
    with pytest.raises(UserError, match=problem):
        verify(run)


def test_a_changed_source_outside_the_run_is_named(run: Run) -> None:
    Path("my.jsonl").write_text("CONVERSATIONS")
    with pytest.raises(UserError, match=r"data: my\.jsonl has changed since the stage read it"):
        verify(run)


def test_a_file_that_is_gone_is_named(run: Run) -> None:
    run.path("base.txt").unlink()
    with pytest.raises(UserError, match=r"base: runs/mine/base\.txt is gone"):
        verify(run)


def test_a_stage_made_from_an_older_upstream_is_named(run: Run) -> None:
    run.path("base.txt").write_text("a newer base")
    write(run, "base", [])
    with pytest.raises(UserError, match=r"train: it was made from another runs/mine/base\.txt"):
        verify(run)
