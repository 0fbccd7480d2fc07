"""Files of every kind, whole and damaged: the rows or the one line that they give."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import read, read_what_is_right

from train.reading.row import told
from train.reading.sources import Source, chunks

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
    "from-pandas.csv": (",question,answer\n0,ping,pong\n1,ping,pong\n", [2, 3]),
    "one-row-with-a-list.json": (json.dumps({"question": "ping", "answer": "pong", "cited": [{"text": "x"}]}), [1]),
    "one-talk-of-exchanges.json": (
        json.dumps({"conversation": [{"human": "ping", "assistant": "pong"}]}, indent=2),
        [1],
    ),
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
    "two-streams.jsonl.gz": (gzip.compress(LINES.encode()[:9]) + gzip.compress(LINES.encode()[9:]), [1, 2]),
    "two-streams.jsonl.zst": (packed(LINES[:9], "zstd") + packed(LINES[9:], "zstd"), [1, 2]),
    "two-streams.jsonl.bz2": (bz2.compress(LINES.encode()[:9]) + bz2.compress(LINES.encode()[9:]), [1, 2]),
    "two-streams.jsonl.xz": (lzma.compress(LINES.encode()[:9]) + bytes(8) + lzma.compress(LINES.encode()[9:]), [1, 2]),
    "not-packed.jsonl.gz": (LINES, [1, 2]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_what_its_content_is(name: str) -> None:
    content, places = KINDS[name]
    rows, problems = read_file(name, content)
    assert problems == []
    assert [row.value for row in rows] == [VALUE] * len(places)
    assert [row.place for row in rows] == [f"{name}:{place}" for place in places]


LENGTHS = bytes((4, 0, 0, 0, 8, 0, 0, 0))  # where "ping" and "pong" end in Arrow; damaged, they crashed the process

# File → its content, and what is told of it after `file:`.
DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "cut.jsonl": (LINES + GOOD[:40], "3: not JSON at column 41 (Expecting ':' delimiter): write one JSON object a"),
    "two-on-a-line.jsonl": (LINES + GOOD + GOOD, f"3: not JSON at column {len(GOOD) + 1} (Extra data): write one"),
    "cut.json": (ARRAY[:-40], "22: the file ends before its JSON does: it was cut off, get it again"),
    "no-comma.json": (ARRAY.replace("},\n  {", "}\n  {"), "14: not JSON (',' is missing here): fix it"),
    "no-quotes.json": (ARRAY.replace('"pong"', "pong"), "10: not JSON (Expecting value): fix it, or write one"),
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
    "surrogate.jsonl": ('{"text": "cut \\ud83d"}', "1: 'text' has a broken surrogate pair (a cut emoji): fix it"),
    "nothing.jsonl": ("", " is empty: write one conversation a line"),
    "blank.jsonl": ("\ufeff\n \r\n", " is empty: write one conversation a line"),
    "nothing.csv": ("question,answer\n", " is empty: write one conversation a line"),
    "nothing.json": ("[]", " is empty: write one conversation a line"),
    "ragged.csv": (TABLE + "a,b,c\n", "4: 3 cells where the first line names 2: quote cells that contain ','"),
    "open-quote.csv": (TABLE + '"a,b\n', "4: not a table's row (unexpected end of data): close the quotes"),
    "no-header.csv": ("Who are you?,A model.\nWhy?,So.\n", "2: no format has the columns Who are you?, A model."),
    "one-name-twice.csv": ("answer,answer\na,b\n", "1: the first line of a table names its columns, each once"),
    "words.parquet": (
        "just some words\n",
        " is text, no Parquet or Arrow file: save it as one, or name it by what it is",
    ),
    "cut.parquet": (arrow("parquet")[:-9], " the Parquet or Arrow file is damaged or cut off (Parquet magic bytes"),
    "cut.arrow": (arrow("file")[:-99], " the Parquet or Arrow file is damaged or cut off (Not an Arrow file)"),
    "cut-stream.arrow": (arrow("stream")[:-99], " the Parquet or Arrow file is damaged or cut off (Expected to"),
    "cut.jsonl.gz": (gzip.compress(MANY.encode())[:-99], "11157: its compressed data is damaged or cut off (Comp"),
    "cut.jsonl.zst": (packed(MANY, "zstd")[:-9], "11157: its compressed data is damaged or cut off (Truncated"),
    "no.jsonl.gz": (b"\x1f\x8bnonsense", " its compressed data is damaged or cut off (Unknown compression method)"),
    "cut.jsonl.bz2": (bz2.compress(LINES.encode())[:-9], " its compressed data is damaged or cut off (it ends before"),
    "cut.jsonl.xz": (lzma.compress(LINES.encode())[:-9], " its compressed data is damaged or cut off (it ends before"),
    "junk.jsonl.gz": (gzip.compress(LINES.encode()) + b"junk", " its compressed data is damaged or cut off (Not a"),
    "junk.jsonl.bz2": (bz2.compress(LINES.encode()) + b"junk", " its compressed data is damaged or cut off (Invalid"),
    "junk.jsonl.xz": (lzma.compress(LINES.encode()) + b"junk" * 9, " its compressed data is damaged or cut off (In"),
    "junk.json": (json.dumps([VALUE]) + " junk", "1: not JSON (Expecting value): fix it, or write one JSON object a"),
    "header-again.csv": (TABLE + TABLE, "4: repeats the first line, as where tables were put together: remove it"),
    "lengths.arrow": (
        arrow("file").replace(b"\x04\0\0\0\x08\0\0\0", b"\x04\0\0\0\x08\0\0\x7f"),
        " the Parquet or Arrow",
    ),
    "document.pdf": ("%PDF-1.7\n", " is a PDF: save its text as .txt"),
    "archive.tar.gz": (gzip.compress(bytes(257) + b"ustar" + bytes(250)), " is a tar archive: unpack it"),
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
    monkeypatch.setattr("train.reading.records.PIECE_CHARACTERS", 35)
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
    monkeypatch.setattr("train.reading.records.CHARACTERS", 1 << 14)
    size = Path("large").write_text(LARGE[kind])
    tracemalloc.start()
    chunk_count = sum(1 for _ in chunks(Source("large")))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunk_count > 100
    assert most < size / 4  # 2 MB in chunks of 16 kB; what is read first to know the kind is 64 kB


@pytest.mark.parametrize("kind", ["array", "text"])
def test_long_rows_come_few_in_a_chunk(kind: str) -> None:
    """A worker holds some copies of a chunk: it is no larger for long rows than for short ones."""
    rows = [{"text": f"{row} " + "word " * 12_000} for row in range(100)]
    text = json.dumps(rows) if kind == "array" else "\n\n".join(row["text"] for row in rows)
    Path("long.json" if kind == "array" else "long.txt").write_text(text)
    [path] = Path().glob("long.*")
    sizes = [sum(len(record["text"]) for _, record in chunk.content) for chunk in chunks(Source(str(path)))]
    assert len(sizes) > 4 and max(sizes) < 1.2e6
    assert sum(sizes) > 0.95 * len(text)


def test_parquet_is_read_a_batch_at_a_time() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 2500}), "many.parquet")
    assert [(chunk.first, len(chunk.content)) for chunk in chunks(Source("many.parquet"))] == [
        (1, 1000),
        (1001, 1000),
        (2001, 500),
    ]


def test_large_rows_of_parquet_are_read_few_at_a_time() -> None:
    rows = [f"{row} " + "word " * 40_000 for row in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), "large.parquet", write_batch_size=1)  # a page a row
    size, before, most, seen = sum(map(len, rows)), pyarrow.total_allocated_bytes(), 0, 0
    del rows
    for chunk in chunks(Source("large.parquet")):
        assert (chunk.first, len(chunk.content) < 30) == (seen + 1, True)
        most = max(most, pyarrow.total_allocated_bytes() - before)
        seen += len(chunk.content)
    assert seen == 200
    assert most < size / 2  # 40 MB in chunks of 4, which lie there twice: as they were read, and cut


def test_large_rows_of_arrow_are_handed_on_few_at_a_time() -> None:
    table = pyarrow.table({"text": ["word " * 40_000] * 200})
    with pyarrow.ipc.new_stream("large.arrow", table.schema) as writer:
        writer.write_table(table)
    assert {len(chunk.content) < 30 for chunk in chunks(Source("large.arrow"))} == {True}


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


TURNS = [{"role": b"user", "content": b"ping"}, {"role": b"assistant", "content": "pöng".encode()}]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_bytes_that_are_utf_8_are_text_at_any_depth(ending: str) -> None:
    name, table = f"talks.{ending}", pyarrow.table({"messages": [TURNS], "thumb": [b"\xff\xd8"]})
    if ending == "parquet":
        pyarrow.parquet.write_table(table, name)
    else:
        with pyarrow.ipc.new_file(name, table.schema) as file:
            file.write_table(table)
    [row] = read(name)
    assert [turn["content"] for turn in row.value["messages"]] == ["ping", "pöng"]


def test_a_column_of_other_bytes_is_named() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": [b"\xff"]}), "talks.parquet")
    _, [problem] = read_what_is_right("talks.parquet")
    assert str(problem).startswith("talks.parquet: the column 'completion' holds bytes that are not UTF-8 text")
