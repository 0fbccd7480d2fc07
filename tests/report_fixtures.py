"""The run of the report's tests; loaded by `pytest_plugins`, not imported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_run import EVERY, NAME, RECIPE, Told

from pipeline import Run


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """A run, in the current folder, in which these stages have finished: all of them if none is named."""
    monkeypatch.chdir(tmp_path)
    Path(f"{NAME}.yaml").write_text(RECIPE)
    Path("talks.jsonl").write_text("{}\n")

    def finished(*stages: str, **given: Any) -> Told:
        Run(NAME).folder.mkdir(parents=True)
        return Told().make(*(stages or EVERY), **given)

    return finished
