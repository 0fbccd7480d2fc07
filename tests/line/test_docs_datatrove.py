"""The datatrove pipeline of docs/ keeps and drops the rows that `make data` keeps and drops."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import Run, load
from pipeline.rows import rows
from train.data import data

REPOSITORY = Path(__file__).parents[2]
pytest.importorskip("datatrove")


def talk(question: str, answer: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def written(folder: str) -> list[dict[str, Any]]:
    """The lines of every file below, task after task."""
    files = sorted(Path("out", folder).iterdir())
    return [json.loads(line) for file in files for line in gzip.open(file, "rt", encoding="utf-8")]


@pytest.mark.slow
def test_the_pipeline_keeps_and_drops_what_make_data_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    question = "How many recipes does the project bring along?"
    files = {
        "c.jsonl": [talk(f"{number % 40}?") for number in range(60)],
        "a.jsonl": [talk("7?"), talk("große Frage?", "schÃ¶n"), talk(question), talk("empty?", " "), talk("7?")],
        "b.csv": [{"question": "39?", "answer": "Yes."}, {"question": "new?", "answer": "Nö 🙂"}],
    }
    for name, found in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        lines = lines if name.endswith("l") else ["question,answer", *(",".join(row.values()) for row in found)]
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    asked = {"messages": [{"role": "user", "content": question}], "facts": ["4"]}
    Path("heldout.jsonl").write_text(json.dumps(asked) + "\n")
    Path("r.yaml").write_text(json.dumps({"data": {"train": list(files), "heldout": "heldout.jsonl", "validation": 0}}))
    data(load("r.yaml"), Run("r"))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "docs.datatrove_pipeline", "r.yaml", "out", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    kept = [
        {key: value for key, value in row.items() if key != "source"} for row in rows(Run("r").path("data"), "train")
    ]
    assert sorted(map(json.dumps, written("kept"))) == sorted(map(json.dumps, kept))
    rejected = [json.loads(line) for line in Path("runs/r/data/rejected.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rejected} == {"duplicates", "contamination", "empty_turns"}
    drops = [[(row["source"], row["step"]) for row in found] for found in (written("rejected"), rejected)]
    assert sorted(drops[0]) == sorted(drops[1])
