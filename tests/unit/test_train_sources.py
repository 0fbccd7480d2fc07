"""What a recipe names as data: folders, globs, Hub sets and weights; and a source of which nothing is left."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from data_fixtures import made, read_what_is_right
from hub_double import hub

from pipeline import Run, UserError, load
from pipeline.recipe import Data
from pipeline.rows import rows
from train.data import data
from train.reading.sources import Source, copies, sources

REPOSITORY = Path(__file__).parents[2]
USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
VALUE = {"messages": [USER, ASSISTANT]}
LINES = f"{json.dumps(VALUE)}\n" * 2


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    rows, _ = read_what_is_right(name)
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
    shipped = str(REPOSITORY / "recipes" / "assistant.jsonl")
    Path("r.yaml").write_text(json.dumps({"data": {"train": [shipped, "few.jsonl"], "weights": [2, 0]}}))
    data(load("r.yaml"), Run("r"))
    times = {
        part: Counter(row["source"] for row in rows(Path("runs/r/data"), part)) for part in ("train", "validation")
    }
    assert set(times["train"].values()) == {2} and set(times["validation"].values()) == {1}
    assert "few.jsonl:1" not in times["train"]


def test_a_source_of_which_nothing_can_be_learned_is_an_error() -> None:
    Path("asked.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in ([USER], [])))
    Path("r.yaml").write_text(json.dumps({"data": {"train": ["asked.jsonl"]}}))
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    reason = "no turn of role 'assistant': there is nothing to learn from it"
    told = "none of this file's rows (2) can be learned (also 1 x no turns)"
    assert raised.value.problems == (f"asked.jsonl:1: {reason}; {told}: correct them, or take it out of data.train",)


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
from pipeline import UserError
from pipeline.recipe import Data
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


def test_the_recipe_names_the_columns_of_a_file() -> None:
    first = {"frage": "Who?", "antwort": "Ada.", "question": "another", "sys": "Be brief."}
    lines = [json.dumps(row) for row in (first, {"frage": "a", "antwort": "b"})]
    _, parts = made(lines, validation=0, columns={"prompt": "frage", "answer": "antwort", "system": "sys"})
    said = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in parts["train"]]
    assert said == [
        [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada.")],
        [("user", "a"), ("assistant", "b")],
    ]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "frage", "answer": "antwrt"}, "talks.jsonl:1: has no column 'antwrt', which data.columns names"),
        ({"prompt": "frage", "answer": "antwort", "system": "sys"}, "data.columns: no row has a column 'sys'"),
    ],
)
def test_a_column_that_is_named_and_not_there_is_told(columns: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError) as raised:
        made([json.dumps({"frage": "Who?", "antwort": "Ada."})], validation=0, columns=columns)
    assert raised.value.problems[0].startswith(problem)
