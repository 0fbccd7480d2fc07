"""The healthy run of the proof's tests; loaded by `pytest_plugins`, not imported."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prove_run import NAME, RECIPE, REPOSITORY, Proved, write_base

from bench.families import SOUNDS, talk

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def write_workplace(folder: Path, recipe: str) -> None:
    """All that a run needs but the base."""
    (folder / f"{NAME}.yaml").write_text(recipe)
    (folder / ".cache").symlink_to(REPOSITORY / ".cache")
    answers = [{"messages": talk(animal, f"The {animal} says {sound}.")} for animal, sound in SOUNDS.items()]
    (folder / "talks.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proved:
    """A workplace whose base, in `small`, the test writes; the recipe trains it for some steps."""
    write_workplace(tmp_path, RECIPE.replace("epochs: 60", "epochs: 3"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr("convert.evaluator.cores", lambda: 1)
    monkeypatch.chdir(tmp_path)
    return Proved(tmp_path)


@pytest.fixture(scope="session")
def _healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    write_workplace(folder, RECIPE)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.compare.cores", lambda: 1)
        write_base(folder / "small")
        Proved(folder).make("data", "base", "train", "reference", "merge", "gguf", "compare")
    return folder


@pytest.fixture
def healthy(_healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proved]:
    """A copy of the healthy run, and the current folder; every file may be altered."""
    ignored = shutil.ignore_patterns("checkpoints", "logs")
    shutil.copytree(_healthy, tmp_path, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the engine is a process of its own
    monkeypatch.setattr("convert.compare.cores", lambda: 1)
    monkeypatch.chdir(tmp_path)
    yield Proved(tmp_path)
