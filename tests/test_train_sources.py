"""Files of every kind, whole and damaged, folders, globs, Hub sets and weights: the rows or the one line they give."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import read_what_is_right

from recipe import Run, UserError, load
from recipe.rows import rows
from recipe.schema import Data
from tests.hub_double import hub
from train.data import data, told
from train.reading.sources import Source, chunks, copies, sources

REPOSITORY = Path(__file__).parent.parent
USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
VALUE = {"messages": [USER, ASSISTANT]}
GOOD = json.dumps(VALUE)
LINES = f"{GOOD}\n{GOOD}\n"
MANY = (GOOD + "\n") * 20_000
INDENTED = json.dumps(VALUE, indent=2)
ARRAY = json.dumps([VALUE, VALUE], indent=2)
TABLE = "question,answer\nping,pong\nping,pong\n"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_file(name: str, content: str | bytes | None = None) -> tuple[list[Any], list[str]]:
    """(the rows, what is told) of a file with that content."""
    if content is not None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    rows, problems = read_what_is_right(name)
    return rows, told(problems)


def packed(text: str, codec: str) -> bytes:
    with pyarrow.BufferOutputStream() as buffer:
        with pyarrow.CompressedOutputStream(buffer, codec) as file:
            file.write(text.encode())
        return bytes(buffer.getvalue())


def arrow(kind: str) -> bytes:
    table = pyarrow.Table.from_pylist([VALUE, VALUE])
    buffer = pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, buffer)
    else:
        opened = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with opened(buffer, table.schema) as writer:
            writer.write_table(table)
    return bytes(buffer.getvalue())


# File → its content and the lines (of tables that have none, the rows) of its two conversations.
KINDS: dict[str, tuple[str | bytes, list[int]]] = {
    "lines.jsonl": (LINES, [1, 2]),
    "windows.jsonl": (b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(), [1, 2]),
    "blank-lines.jsonl": (f"\n  {GOOD}  \n\n{GOOD}", [2, 4]),
    "lines.json": (LINES, [1, 2]),
    "array.json": (ARRAY, [2, 14]),
    "array-on-a-line.json": (json.dumps([VALUE, VALUE]), [1, 1]),
    "array.jsonl": (ARRAY, [2, 14]),
    "marked-array.json": (b"\xef\xbb\xbf" + ARRAY.encode(), [2, 14]),
    "objects.json": (f"{INDENTED}\n{INDENTED}\n", [1, 13]),
    "object-around.json": (json.dumps({"version": 1, "data": [VALUE, VALUE]}, indent=2), [4, 16]),
    "object-around-on-a-line.json": (json.dumps({"data": [VALUE, VALUE], "n": 2}), [1, 1]),
    "lists.jsonl": (f"{json.dumps(VALUE['messages'])}\n" * 2, [1, 2]),
    "lists.json": (json.dumps([VALUE["messages"]] * 2), [1, 1]),
    "table.csv": (TABLE, [2, 3]),
    "marked-table.csv": (b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(), [2, 3]),
    "table.tsv": (TABLE.replace(",", "\t"), [2, 3]),
    "semicolons.csv": (TABLE.replace(",", ";"), [2, 3]),
    "turns-in-a-cell.csv": ('messages\n"' + json.dumps(VALUE["messages"]).replace('"', '""') + '"\n', [2]),
    "named-wrongly.txt": (TABLE, [2, 3]),
    "named-wrongly.jsonl": (TABLE, [2, 3]),
    "named-wrongly.csv": (LINES, [1, 2]),
    "named-wrongly.parquet": (LINES, [1, 2]),
    "without-ending": (arrow("parquet"), [1, 2]),
    "table.parquet": (arrow("parquet"), [1, 2]),
    "file.arrow": (arrow("file"), [1, 2]),
    "stream.arrow": (arrow("stream"), [1, 2]),
    "lines.jsonl.gz": (gzip.compress(LINES.encode()), [1, 2]),
    "table.csv.gz": (gzip.compress(TABLE.encode()), [2, 3]),
    "lines.jsonl.zst": (packed(LINES, "zstd"), [1, 2]),
    "lines.jsonl.bz2": (bz2.compress(LINES.encode()), [1, 2]),
    "lines.jsonl.xz": (lzma.compress(LINES.encode()), [1, 2]),
    "not-packed.jsonl.gz": (LINES, [1, 2]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_what_its_content_is(name: str) -> None:
    content, places = KINDS[name]
    rows, problems = read_file(name, content)
    assert problems == []
    assert [row.value for row in rows] == [VALUE] * len(places)
    assert [row.place for row in rows] == [f"{name}:{place}" for place in places]


# File → its content, and what is told of it after `file:`.
DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "cut.jsonl": (LINES + GOOD[:40], "3: not JSON at column 41 (Expecting ':' delimiter): write one JSON object a"),
    "two-on-a-line.jsonl": (LINES + GOOD + GOOD, f"3: not JSON at column {len(GOOD) + 1} (Extra data): write one"),
    "cut.json": (ARRAY[:-40], "14: the file ends before its JSON does: it was cut off, get it again"),
    "no-comma.json": (ARRAY.replace("},\n  {", "}\n  {"), "14: not JSON (',' is missing here): mend it"),
    "no-quotes.json": (ARRAY.replace('"pong"', "pong"), "10: not JSON (Expecting value): mend it, or write one"),
    "latin-1.jsonl": (LINES.encode() + b'{"text": "caf\xe9"}', "3: not UTF-8 at byte 14: save the file as UTF-8"),
    "latin-1.json": (ARRAY.encode().replace(b"ping", b"caf\xe9"), "6: not UTF-8 at byte 24: save the file as UTF-8"),
    "latin-1.csv": (b"question,answer\na,caf\xe9\n", "2: not UTF-8 at byte 6: save the file as UTF-8"),
    "latin-1.txt": (b"one\ncaf\xe9\n", "2: not UTF-8 at byte 4: save the file as UTF-8"),
    "utf-16.jsonl": (GOOD.encode("utf-16"), "1: UTF-16, not UTF-8: save the file as UTF-8"),
    "zeros.jsonl": (LINES + "\0" * 9, "3: has a zero byte: the file is damaged, or no text and no Parquet or Arrow"),
    "late-zeros.jsonl": (MANY + "\0", "20001: has a zero byte at 1: the file is damaged here, get it again"),
    "binary.jsonl": (bytes(range(256)), "1: has a zero byte: the file is damaged, or no text and no Parquet or Arrow"),
    "twice.jsonl": ('{"text": "a", "text": "b"}', "1: the key 'text' stands twice in one object: keep one"),
    "twice.json": ('[{"text": "a", "text": "b"}]', "1: the key 'text' stands twice in one object: keep one"),
    "deep.jsonl": (LINES + '{"a":' * 99_999, "3: nested too deeply: a row is an object of a few levels"),
    "deep.json": ("[" * 99_999, "1: nested too deeply"),
    "digits.jsonl": (LINES + '{"a": %s}' % ("7" * 5000), "3: Exceeds the limit (4300 digits) for integer string"),
    "surrogate.jsonl": ('{"text": "cut \\ud83d"}', "1: 'text' has a broken surrogate pair (a cut emoji): mend it"),
    "nothing.jsonl": ("", " is empty: write one conversation a line"),
    "blank.jsonl": ("\ufeff\n \r\n", " is empty: write one conversation a line"),
    "nothing.csv": ("question,answer\n", " is empty: write one conversation a line"),
    "nothing.json": ("[]", " is empty: write one conversation a line"),
    "ragged.csv": (TABLE + "a,b,c\n", "4: 3 cells where the first line names 2: quote cells that contain ','"),
    "open-quote.csv": (TABLE + '"a,b\n', "4: not a table's row (unexpected end of data): close the quotes"),
    "no-header.csv": ("Who are you?,A model.\nWhy?,So.\n", "2: no format has the columns Who are you?, A model."),
    "one-name-twice.csv": ("answer,answer\na,b\n", "1: the first line of a table names its columns, each once"),
    "cut.parquet": (arrow("parquet")[:-9], " the Parquet or Arrow file is damaged or cut off (Parquet magic bytes"),
    "cut.arrow": (arrow("file")[:-99], " the Parquet or Arrow file is damaged or cut off (Not an Arrow file)"),
    "cut-stream.arrow": (arrow("stream")[:-99], " the Parquet or Arrow file is damaged or cut off (Expected to"),
    "cut.jsonl.gz": (gzip.compress(MANY.encode())[:-99], "11157: its compressed data is damaged or cut off (Comp"),
    "cut.jsonl.zst": (packed(MANY, "zstd")[:-9], "11157: its compressed data is damaged or cut off (Truncated"),
    "no.jsonl.gz": (b"\x1f\x8bnonsense", " its compressed data is damaged or cut off (Unknown compression method)"),
    "archive.zip": (b"PK\x03\x04...", " is a ZIP archive or a spreadsheet: unpack it, or save it as CSV"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\n", " is only Git LFS's note of the file"),
    "page.json": ("<!DOCTYPE html>", " is a web page: download the file itself"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_with_its_place(name: str) -> None:
    content, problem = DAMAGED[name]
    _, problems = read_file(name, content)
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}:{problem}")


def test_a_line_without_end_is_told_and_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.reading.chunks.LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr("train.reading.chunks.BYTES_A_CHUNK", 500)
    _, problems = read_file("long.jsonl", LINES + '{"text": "' + "x" * 4000 + '"}\n')
    assert problems == ["long.jsonl:3: longer than 0 MiB: write one row a line"]


def test_what_pandas_writes_for_nothing_counts_as_nothing() -> None:
    rows, problems = read_file("nan.jsonl", '{"score": NaN, "system": NaN, ' + GOOD[1:])
    assert ([row.value for row in rows], problems) == ([VALUE], [])


def test_a_line_separator_inside_a_text_ends_no_line() -> None:
    said = "one\u2028two\x85three\u2029four"
    rows, _ = read_file("separators.jsonl", json.dumps({"text": said}, ensure_ascii=False))
    assert [row.value for row in rows] == [{"text": said}]


def test_a_text_file_is_cut_between_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.reading.tables.PIECE_CHARACTERS", 35)
    rows, _ = read_file("book.txt", "# One\n\nfirst line\nsecond line\n\nlast line\n")
    assert [(row.value["text"], row.place) for row in rows] == [
        ("# One\n\nfirst line\nsecond line", "book.txt:1"),
        ("last line", "book.txt:6"),
    ]


LARGE = {
    "lines": MANY,
    "array": f"[{MANY.strip().replace(chr(10), ',')}]",
    "table": "text\n" + ("word " * 60 + "\n") * 8000,
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_file_is_never_in_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.reading.chunks.BYTES_A_CHUNK", 1 << 14)
    monkeypatch.setattr("train.reading.chunks.ROWS_A_CHUNK", 10)
    monkeypatch.setattr("train.reading.jsonstream.CHARACTERS", 1 << 14)
    size = Path("large").write_text(LARGE[kind])
    tracemalloc.start()
    chunk_count = sum(1 for _ in chunks(Source("large")))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunk_count > 100
    assert most < size / 4  # 2 MB in chunks of 16 kB; what is read first to know the kind is 64 kB


def test_parquet_is_read_a_batch_at_a_time() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 2500}), "many.parquet")
    assert [(chunk.first, len(chunk.content)) for chunk in chunks(Source("many.parquet"))] == [
        (1, 1000),
        (1001, 1000),
        (2001, 500),
    ]


def test_keys_that_arrow_filled_with_null_are_not_in_tools_and_calls() -> None:
    def talk(name: str, **arguments: int) -> dict[str, Any]:
        function = {"name": name, "parameters": {"properties": {key: {"type": "integer"} for key in arguments}}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [{"type": "function", "function": function}],
        }

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([talk("f", x=1), talk("g", y=2)]), "tools.parquet")
    rows, _ = read_file("tools.parquet")
    assert [row.value["tools"] for row in rows] == [talk("f", x=1)["tools"], talk("g", y=2)["tools"]]
    called = [row.value["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert called == [{"x": 1}, {"y": 2}]


def names(*given: str) -> list[str]:
    return [source.name for source in sources(Data(train=given))]


def write(*files: str) -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(LINES)


def test_a_folder_gives_its_data_files_and_no_other() -> None:
    write(
        "talks/b.jsonl", "talks/deep/a.json", "talks/README.md", "talks/.hidden.jsonl", "talks/x.png", "talks/note.txt"
    )
    assert names("talks") == ["talks/b.jsonl", "talks/deep/a.json"]


def test_a_folder_of_texts_gives_them() -> None:
    write("books/a.txt", "books/b.md", "books/README.md", "books/cover.jpg")
    assert names("books") == ["books/a.txt", "books/b.md"]


@pytest.mark.parametrize("test", ["data/test-00000.jsonl", "validation.jsonl", "dev/x.jsonl"])
def test_files_named_for_testing_are_not_trained_on(test: str) -> None:
    write("set/data/train-00000.jsonl", f"set/{test}")
    assert names("set") == ["set/data/train-00000.jsonl"]


def test_files_named_for_testing_are_taken_where_nothing_else_is_there() -> None:
    write("set/test.jsonl")
    assert names("set") == ["set/test.jsonl"]


def test_an_unpacked_chat_export_gives_its_conversations() -> None:
    write("export/conversations.json", "export/user.json", "export/message_feedback.json")
    assert names("export") == ["export/conversations.json"]


def test_a_glob_gives_what_it_matches_in_order() -> None:
    write("b1.jsonl", "a1.jsonl", "c.jsonl", "deep/d/a2.jsonl")
    assert names("*1.jsonl", "**/a2.jsonl", "c.jsonl") == ["a1.jsonl", "b1.jsonl", "deep/d/a2.jsonl", "c.jsonl"]


@pytest.mark.parametrize("parts", [None, ["train", "test"]])
def test_what_datasets_saved_is_read(parts: list[str] | None) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"question": "ping", "answer": "pong"}])
    (made if parts is None else datasets.DatasetDict(dict.fromkeys(parts, made))).save_to_disk("saved")
    (name,) = names("saved")
    rows, _ = read_file(name)
    assert [row.value for row in rows] == [VALUE]


def dangling() -> None:
    os.symlink("nowhere.jsonl", "link.jsonl")


MISSING: dict[str, tuple[Callable[[], None] | None, str]] = {
    "none.jsonl": (None, "no such file: correct the path in the recipe's `data` section"),
    "folder/none.jsonl": (None, "no such file: correct the path in the recipe's `data` section"),
    "*.none": (None, "no such file: correct the path in the recipe's `data` section"),
    "link.jsonl": (dangling, "is a link to a file that is missing: correct the path in the recipe's `data` section"),
    "pictures": (lambda: write("pictures/a.png"), "no data file in this folder: it needs one that ends in .csv, "),
    "talks.jsonl/more": (lambda: write("talks.jsonl"), "no such file: correct the path in the recipe's `data`"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_told(name: str) -> None:
    prepare, problem = MISSING[name]
    if prepare:
        prepare()
    with pytest.raises(UserError) as raised:
        names(name)
    assert str(raised.value).startswith(f"{name}: {problem}")


def test_everything_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(UserError) as raised:
        names("a.jsonl", "b.jsonl")
    assert len(raised.value.problems) == 2


def test_each_source_has_its_weight() -> None:
    write("a.jsonl", "folder/b.jsonl", "folder/c.jsonl")
    found = sources(Data(train=("a.jsonl", "folder"), weights=(2.0, 0.5)))
    assert [(source.name, source.weight) for source in found] == [
        ("a.jsonl", 2.0),
        ("folder/b.jsonl", 0.5),
        ("folder/c.jsonl", 0.5),
    ]


def test_a_weight_takes_rows_as_often_as_it_says_by_what_they_are() -> None:
    values = [{"text": str(number)} for number in range(2000)]
    taken = [copies(Source("x", 1.5), value, seed=0) for value in values]
    assert set(taken) == {1, 2}
    assert 0.45 < taken.count(2) / len(taken) < 0.55  # 4.5 standard deviations
    assert taken == [copies(Source("x", 1.5), value, seed=0) for value in values]
    assert taken != [copies(Source("x", 1.5), value, seed=1) for value in values]
    assert {copies(Source("x", 2.0), value, seed=0) for value in values} == {2}
    assert {copies(Source("x", 0.0), value, seed=0) for value in values} == {0}


def test_weights_repeat_rows_for_training_and_for_nothing_else() -> None:
    Path("few.jsonl").write_text('{"text": "Some words that stand in no other row."}\n')
    shipped = str(REPOSITORY / "train" / "assistant.jsonl")
    Path("r.yaml").write_text(json.dumps({"data": {"train": [shipped, "few.jsonl"], "weights": [2, 0]}}))
    data(load("r.yaml"), Run("r"))
    times = {
        part: Counter(row["source"] for row in rows(Path("runs/r/data"), part)) for part in ("train", "validation")
    }
    assert set(times["train"].values()) == {2} and set(times["validation"].values()) == {1}
    assert "few.jsonl:1" not in times["train"]


def test_a_source_of_which_nothing_can_be_learned_is_an_error() -> None:
    Path("asked.jsonl").write_text(json.dumps({"messages": [USER]}) + "\n")
    Path("r.yaml").write_text(json.dumps({"data": {"train": ["asked.jsonl"]}}))
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    reason = "no turn of role 'assistant': there is nothing to learn from it"
    assert raised.value.problems == (f"asked.jsonl: nothing in it can be learned: 1 x {reason}",)


def test_what_is_left_out_stands_in_a_file_with_its_reason() -> None:
    Path("talks.jsonl").write_text(LINES.replace("ping", "pong", 1) + json.dumps({"messages": [USER]}) + "\n")
    Path("r.yaml").write_text(json.dumps({"data": {"train": ["talks.jsonl"]}}))
    data(load("r.yaml"), Run("r"))
    lost = [json.loads(line) for line in Path("runs/r/data/rejected.jsonl").read_text().splitlines()]
    assert {"source": "talks.jsonl:3", "step": "format", "row": {"messages": [USER]}} | {
        "reason": "no turn of role 'assistant': there is nothing to learn from it"
    } in lost


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: socratic
  data_files: socratic/train.jsonl
---
"""
ASKING = """
import json, sys
from recipe import UserError
from recipe.schema import Data
from train.reading.chunks import records
from train.reading.sources import chunks, sources
for name in sys.argv[1:]:
    try:
        (source,) = sources(Data(train=(name,)))
        print(json.dumps([pair for chunk in chunks(source) for pair in records(chunk)]))
    except UserError as error:
        print(error)
"""


def ask_hub(address: str, *given: str) -> list[str]:
    """What a process says of each name whose Hub is at that address; the libraries read both once, when imported."""
    home = str(Path("home").absolute())
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-c", ASKING, *given]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_set_of_the_hub_is_read_by_name_configuration_and_split_then_from_the_cache() -> None:
    row = '{"question": "%s", "answer": "x"}\n'
    files = {"README.md": CARD, "main/train.jsonl": row % "a", "main/test.jsonl": row % "b"}
    files["socratic/train.jsonl"] = row % "c"
    with hub("owner/sums", files) as address:
        said = ask_hub(
            address,
            "owner/sums:main",
            "owner/sums@v1:main:test",
            "owner/sums:socratic",
            "owner/sums",
            "owner/sums:main:dev",
            "owner/other",
        )
    questions = [json.loads(line) for line in said[:3]]
    assert questions == [
        [["owner/sums:main:1", {"question": "a", "answer": "x"}]],
        [["owner/sums@v1:main:test:1", {"question": "b", "answer": "x"}]],
        [["owner/sums:socratic:1", {"question": "c", "answer": "x"}]],
    ]
    assert "available configs: ['main', 'socratic']" in said[3]
    assert said[4] == "owner/sums: no split 'dev': name one of train, test, as in owner/sums:main:train"
    assert said[5].startswith("owner/other: neither a file here nor a set that the Hugging Face Hub gives (")

    cached, never = ask_hub("http://127.0.0.1:9", "owner/sums:main", "owner/never")
    assert json.loads(cached) == questions[0]
    assert never.startswith("owner/never: neither a file here nor a set that the Hugging Face Hub gives (")
