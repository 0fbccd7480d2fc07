"""The rows of the data stage come back as they were written, in order, and never all at once."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.rows import ROWS_A_BATCH, RowWriter, count, picked, row_batch, rows

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]


def row(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "é\u2028\x00🙂"}]
    return {"messages": turns} | ({"tools": TOOLS} if number % 3 == 0 else {})


def write(folder: Path, *numbers: int, part: str = "train") -> None:
    with RowWriter(folder / f"{part}.arrow") as writer:
        texts = [json.dumps(row(number), ensure_ascii=False) for number in numbers]
        writer.write(row_batch(texts, [f"talks.jsonl:{number}" for number in numbers]))


@pytest.mark.parametrize("many", [0, 1, ROWS_A_BATCH, ROWS_A_BATCH + 1, 2 * ROWS_A_BATCH])
def test_every_row_comes_back_with_its_source(tmp_path: Path, many: int) -> None:
    write(tmp_path, *range(many))
    assert list(rows(tmp_path, "train")) == [row(n) | {"source": f"talks.jsonl:{n}"} for n in range(many)]
    assert count(tmp_path, "train") == many


@pytest.mark.parametrize(("first", "given"), [(0, 0), (3, 3), (ROWS_A_BATCH + 2, ROWS_A_BATCH + 2), (9999, 1500)])
def test_the_first_rows_alone_can_be_asked_for(tmp_path: Path, first: int, given: int) -> None:
    write(tmp_path, *range(1500))
    assert [found["source"] for found in rows(tmp_path, "train", first)] == [f"talks.jsonl:{n}" for n in range(given)]


def test_rows_are_picked_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, *range(1500))
    found = picked(tmp_path, "train", [1400, 3, 3, 999, 1000])
    assert [item["messages"][0]["content"] for item in found] == ["1400?", "3?", "3?", "999?", "1000?"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, *range(1500))
    write(tmp_path, *range(1500), part="validation")
    assert (tmp_path / "train.arrow").read_bytes() == (tmp_path / "validation.arrow").read_bytes()


def test_the_library_of_datasets_maps_the_file(tmp_path: Path) -> None:
    from datasets import Dataset

    write(tmp_path, 1, 2)
    assert Dataset.from_file(str(tmp_path / "train.arrow"))["source"][:] == ["talks.jsonl:1", "talks.jsonl:2"]


def test_large_rows_make_small_batches_so_that_reading_holds_few(tmp_path: Path) -> None:
    import pyarrow

    text = json.dumps({"text": "x" * (1 << 20)})
    with RowWriter(tmp_path / "train.arrow") as writer:
        writer.write(row_batch([text] * 40, list(map(str, range(40)))))
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    most = max(pyarrow.total_allocated_bytes() for _ in rows(tmp_path, "train")) - before
    assert most < 12 << 20 and tracemalloc.get_traced_memory()[1] < 24 << 20, "of 40 MiB, a few batches of 4"
    tracemalloc.stop()
