"""Many rows: the same files on any number of cores, in memory that does not grow, and a broken run leaves nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from data_fixtures import made, read

from pipeline import Run, UserError, load
from pipeline.rows import rows
from train import data, pool
from train.reading import chunks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunks, "BYTES_A_CHUNK", 4000)  # of this process, which cuts the files for all workers


def talks(many: int) -> list[str]:
    """Rows of which some repeat others, nearly repeat them, need fixing, or are of no use."""
    dice, lines = random.Random(0), []
    for number in range(many):
        turns = [
            {"role": "user", "content": f"Frage {dice.random()} größer?"},
            {"role": "assistant", "content": "Nö 🙂"},
        ]
        if number % 7 == 0:
            turns[1]["content"] = "schÃ¶n"
        if number % 11 == 0:
            turns[1]["content"] = " "
        line = json.dumps({"messages": turns}, ensure_ascii=bool(number % 2))
        lines += [line, *(lines[-3:-2] if number % 5 == 0 else [])]
    return lines


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("runs/r/data").iterdir())}


@pytest.mark.slow
def test_the_number_of_cores_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ALONE", 0)
    found = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(data, "cores", lambda workers=workers: workers)
        result, parts = made(talks(300))
        found.append((result.metrics, files()))
        assert {part: len(rows) > 20 for part, rows in parts.items()} == dict.fromkeys(parts, True)
    assert found[0] == found[1] == found[2]


def test_the_stage_is_that_of_each_step_alone() -> None:
    """The same rows by the plain functions: read, clean, sign, decide; in one process, in lists."""
    from train.cleaning.clean import clean
    from train.cleaning.duplicates import sides, signatures
    from train.reading.row import Rejection

    _, parts = made(talks(300))
    recipe = load("r.yaml")
    cleaned, lost = [], 0
    for row in read("talks.jsonl"):
        try:
            cleaned.append((clean(row.value, recipe.data.clean)[0], row.place))
        except Rejection:
            lost += 1
    first, held = sides(signatures([value for value, _ in cleaned], recipe.seed), recipe.data)
    wanted: dict[str, list[Any]] = {"train": [], "validation": [], "rejected": []}
    for number, (value, place) in enumerate(cleaned):
        part = "rejected" if first[number] != number else "validation" if held[number] else "train"
        wanted[part].append(value | {"source": place})
    for part in ("train", "validation"):
        assert parts[part] == wanted[part]
    repeated = [row for row in parts["rejected"] if row["step"] == "duplicates"]
    assert [row["row"] | {"source": row["source"]} for row in repeated] == wanted["rejected"]
    assert len(parts["rejected"]) == lost + len(repeated) and lost > 20 and len(repeated) > 20


def test_weights_take_rows_often_in_training_alone() -> None:
    lines = talks(200)
    plain = made(lines)[1]
    result, parts = made(lines, weights=[3])
    assert parts["train"] == [row for row in plain["train"] for _ in range(3)]
    assert parts["validation"] == plain["validation"]
    assert result.metrics["train"] == len(parts["train"])


def test_problems_of_many_chunks_come_with_their_lines_in_order() -> None:
    lines = talks(200)
    lines[20], lines[150] = "{", "7"
    lines[90] = "[]"
    with pytest.raises(UserError) as raised:
        made(lines)
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [f"talks.jsonl:{n}" for n in (21, 91, 151)]
    assert not list(Path("runs/r").iterdir())


def test_a_broken_run_leaves_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made(talks(100))
    before = files()

    def broken(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "divide", broken)
    with pytest.raises(OSError, match="No space"):
        made(talks(200))
    assert files() == before
    assert [path.name for path in Path("runs/r").iterdir()] == ["data"]


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_leaves_no_process_and_nothing_half_written(sent: str) -> None:
    with Path("talks.jsonl").open("w") as file:
        for number in range(60_000):
            turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "word " * 200}]
            file.write(json.dumps({"messages": turns}) + "\n")
    Path("r.yaml").write_text("data: {train: talks.jsonl}\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "train.data", "r.yaml"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (workers := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < end:
            time.sleep(0.05)
        assert workers or len(os.sched_getaffinity(0)) == 1
        process.send_signal(getattr(signal, sent))
        assert process.wait(30) == 130
        assert process.stderr and "stopped: the same command resumes from here" in process.stderr.read()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert [path.name for path in Path("runs/r").iterdir()] == [".lock"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows() -> None:
    """Of a row some 300 bytes stay in memory, its signature above all; the row itself has ten thousand."""
    found = {}
    for many in (1_000, 5_000):
        with Path("talks.jsonl").open("w") as file:
            for number in range(many):
                turns = [
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": f"{number} " * 1500},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
        Path("r.yaml").write_text("data: {train: talks.jsonl}\n")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-m", "train.data", "r.yaml"], env=environment, check=True)
        found[many] = json.loads(Path("runs/r/data.json").read_text())["peak_rss_bytes"]
        assert sum(1 for _ in rows(Run("r").path("data"), "train")) + 1 > 0.8 * many
    assert found[5_000] - found[1_000] < 25e6, "of 40 MB more data"
