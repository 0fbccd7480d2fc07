"""The data stage: every bad line with its place, and a split that is the same for the same conversations."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import made, read

from pipeline import Run, UserError, load
from pipeline.rows import heldout
from pipeline.rows import rows as written
from train.data import data, read_questions
from train.reading.row import Problem, Row, told

REPOSITORY = Path(__file__).parents[2]
USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})
SHAPE = 'not a question: a held-out row is {"messages": [{"role": ..., "content": ...}, ...], ...}'
FACTS = "'facts' must be a list of strings that a right answer contains, like [\"make serve\"]"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def messages(*given: object, **more: object) -> str:
    return json.dumps({"messages": list(given), **more})


BAD_QUESTIONS = {
    "ends with the assistant": (
        messages(USER, ASSISTANT, facts=["x"]),
        "ends with role 'assistant': a held-out row ends with the user's question",
    ),
    "no facts": (messages(USER), FACTS),
    "facts empty": (messages(USER, facts=[]), FACTS),
    "facts no list": (messages(USER, facts="x"), FACTS),
    "a fact that is no text": (messages(USER, facts=["x", 1]), FACTS),
    "a fact that is blank": (messages(USER, facts=[" "]), FACTS),
    "answer no text": (messages(USER, facts=["x"], answer=1), "'answer' must be text, it is int"),
    "broken surrogate in a fact": (
        messages(USER, facts=["\ud83d"]),
        "'facts' has a broken surrogate pair (a cut emoji): fix it",
    ),
    "broken surrogate in the answer": (
        messages(USER, facts=["x"], answer="\ud83d"),
        "'answer' has a broken surrogate pair (a cut emoji): fix it",
    ),
    "no conversation": ("{}", SHAPE),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_bad_question_is_told(case: str) -> None:
    line, problem = BAD_QUESTIONS[case]
    Path("bad.jsonl").write_text(line)
    problems: list[Problem | str] = []
    read_questions("bad.jsonl", problems)
    assert list(map(str, problems)) == [f"bad.jsonl:1: {problem}"]


def write_recipe(train: str, heldout: str | None = None, **more: object) -> None:
    Path("talks.jsonl").write_text(train)
    given = {"train": "talks.jsonl", **more}
    if heldout is not None:
        Path("questions.jsonl").write_text(heldout)
        given["heldout"] = "questions.jsonl"
    Path("r.yaml").write_text(json.dumps({"data": given}))


def test_all_problems_of_all_files_come_at_once() -> None:
    write_recipe("7\n" + GOOD + "\n{\n", "{}\n")
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    assert [problem.partition(" (")[0].partition(": name")[0] for problem in raised.value.problems] == [
        "talks.jsonl:1: not an object with named columns but int",
        "talks.jsonl:3: not JSON at column 2",
        f"questions.jsonl:1: {SHAPE}",
    ]


def test_the_same_problem_of_many_lines_is_told_once() -> None:
    same = [Problem(f"a.jsonl:{line}", "is odd") for line in range(1, 26)]
    lines = told([*same, Problem("b.jsonl:1", "is odd"), "c.jsonl: no such file"])
    assert lines == [
        "a.jsonl:1: is odd (and 24 more such lines, up to a.jsonl:25)",
        "b.jsonl:1: is odd",
        "c.jsonl: no such file",
    ]


def test_a_file_of_which_no_row_has_a_format_is_told_once() -> None:
    write_recipe('{"sentence": "x", "tag": 1}\n' * 30)
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    (problem,) = raised.value.problems
    assert problem.startswith("talks.jsonl:1: no format has the columns sentence, tag: set in the recipe what they are")
    assert problem.endswith(" (and 29 more such lines, up to talks.jsonl:30)")


def test_problems_beyond_twenty_are_counted() -> None:
    different = [Problem(f"a.jsonl:{line}", f"{line} is odd") for line in range(25)]
    assert told(different) == [*map(str, different[:20]), "and 5 more problems like these"]


def test_twenty_problems_are_all_shown() -> None:
    different = [Problem(f"a.jsonl:{line}", f"{line} is odd") for line in range(20)]
    assert told(different) == list(map(str, different))


def test_bad_data_writes_nothing() -> None:
    write_recipe("7\n")
    with pytest.raises(UserError):
        data(load("r.yaml"), Run("r"))
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


def numbered(*numbers: int) -> list[Row]:
    return [
        Row({"messages": [{"role": "user", "content": f"{number}?"}, ASSISTANT]}, f"talks.jsonl:{number}")
        for number in numbers
    ]


def places(rows: list[Row]) -> list[str]:
    return [row.place for row in rows]


def test_the_stage_writes_every_conversation_once_with_its_place() -> None:
    rows = numbered(*range(1, 41))
    write_recipe("".join(json.dumps(row.value) + "\n" for row in rows), messages(USER, facts=["x|y"]) + "\n")
    result = data(load("r.yaml"), Run("r"))
    folder = Path("runs/r/data")
    parts = {part: list(written(folder, part)) for part in ("train", "validation")} | {"heldout": heldout(folder)}
    assert sorted(row["source"] for row in parts["train"] + parts["validation"]) == sorted(places(rows))
    assert parts["heldout"] == [{"messages": [USER], "answer": "", "facts": ["x|y"], "source": "questions.jsonl:1"}]
    assert result.metrics == {name: len(part) for name, part in parts.items()} | {
        "changed": {},
        "rejected": {},
        "sources": [
            {
                "source": "talks.jsonl",
                "format": "OpenAI messages",
                "columns": ("messages",),
                "weight": 1.0,
                "rows": 40,
                "rejected": {},
                "changes": {},
            }
        ],
    }
    assert list(result.inputs) == ["talks.jsonl", "questions.jsonl"]
    assert result.outputs == [Path("runs/r/data")]


def stage(*rows: Row, **more: object) -> dict[str, list[dict[str, Any]]]:
    return made([json.dumps(row.value) for row in rows], **more)[1]


def test_a_rejected_row_is_written_with_its_place_step_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = numbered(1, 2, 3, 4, 5)
    lines = [json.dumps(row.value) for row in rows]
    write_recipe("\n".join([*lines, lines[0], messages(USER, {"role": "assistant", "content": " "})]), validation=0)
    result = data(load("r.yaml"), Run("r"))
    assert [json.loads(line) for line in Path("runs/r/data/rejected.jsonl").read_text().splitlines()] == [
        {
            "source": "talks.jsonl:7",
            "step": "empty_turns",
            "reason": "messages[1] of role 'assistant' is empty",
            "row": {"messages": [USER, {"role": "assistant", "content": " "}]},
        },
        {
            "source": "talks.jsonl:6",
            "step": "duplicates",
            "reason": "repeats talks.jsonl:1",
            "row": rows[0].value,
        },
    ]
    assert result.metrics["rejected"] == {"empty_turns": 1, "duplicates": 1}
    assert "data: 7 rows, 0 changed, 2 (empty_turns 1, duplicates 1) rejected" in caplog.text


def test_a_held_out_question_is_not_trained_on() -> None:
    rows = numbered(*range(20))
    asked = {"role": "user", "content": "How many recipes does the project bring along?"}
    lines = [json.dumps(row.value) for row in rows] + [messages(asked, ASSISTANT)]
    write_recipe("\n".join(lines), messages(asked, facts=["4"]))
    result = data(load("r.yaml"), Run("r"))
    assert result.metrics["rejected"] == {"contamination": 1}


def test_each_row_is_in_one_part_or_told_as_rejected() -> None:
    parts = stage(*numbered(*range(50), *range(10)))
    assert sorted(row["source"] for part in parts.values() for row in part) == sorted(
        f"talks.jsonl:{line}" for line in range(1, 61)
    )
    assert len(parts["rejected"]) == 10


def test_a_share_of_zero_holds_nothing_back() -> None:
    parts = stage(*numbered(1, 2), validation=0)
    assert [len(rows) for rows in parts.values()] == [2, 0, 0]


def test_nothing_left_to_train_on_is_told() -> None:
    with pytest.raises(UserError) as raised:
        stage(*numbered(1))
    assert str(raised.value) == (
        "1 conversation(s) leave nothing to train on after the split (data.validation=0.1): "
        "add conversations or set data.validation=0"
    )


def test_a_file_of_which_nothing_is_left_is_told() -> None:
    with pytest.raises(UserError) as raised:
        stage(*numbered(1, 2), clean={"min_turns": 3})
    assert str(raised.value) == (
        "2 conversation(s) leave nothing to train on, since all are rejected (talks.jsonl:1, length: 2 turns, "
        "below 3): correct the rows or the recipe's data.clean"
    )


def shipped(name: str) -> list[Row]:
    problems: list[Problem | str] = []
    path = REPOSITORY / "recipes" / name
    rows = read_questions(str(path), problems) if "heldout" in name else read(path)
    assert problems == []
    return rows


PAIR = {"prompt": "ping", "chosen": "pong", "rejected": "bang"}
NO_PAIR = "is no pair of a better and a worse answer ('chosen', 'rejected') to the same question"
USELESS_PAIRS = {
    "equal": (PAIR | {"rejected": "pong "}, "the chosen and the rejected answer are equal"),
    "equal once cleaned": (
        PAIR | {"chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        "the chosen and the rejected answer",
    ),
    "an empty text": (PAIR | {"rejected": ""}, "'chosen' or 'rejected' is empty"),
    "an empty turn": (PAIR | {"rejected": [{"role": "assistant", "content": " "}]}, "the rejected answer is empty"),
    "no prompt": ({"chosen": "pong", "rejected": "bang"}, "has no prompt, only texts"),
    "answers to two questions": (
        {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "bing"}, ASSISTANT]},
        NO_PAIR,
    ),
}


@pytest.mark.parametrize("case", USELESS_PAIRS)
def test_a_pair_of_which_nothing_is_learned_is_left_out_with_its_place(case: str) -> None:
    row, why = USELESS_PAIRS[case]
    first = {name: PAIR.get(name, "bing") for name in row} if "prompt" in row else row
    lines = [first, row] if "prompt" in row else [row]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("r.yaml").write_text("data: {train: pairs.jsonl, validation: 0}\ntrain: {method: dpo}\n")
    if "prompt" not in row:
        with pytest.raises(UserError) as raised:
            data(load("r.yaml"), Run("r"))
        assert str(raised.value).startswith(f"pairs.jsonl:1: {why}")
        return
    data(load("r.yaml"), Run("r"))
    [left_out] = [json.loads(line) for line in Path("runs/r/data/rejected.jsonl").read_text().splitlines()]
    assert left_out["source"] == "pairs.jsonl:2" and left_out["reason"].startswith(why)


def test_conversations_are_no_preferences() -> None:
    Path("talks.jsonl").write_text(f"{GOOD}\n" * 3)
    Path("r.yaml").write_text("data: {train: talks.jsonl}\ntrain: {method: dpo}\n")
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    wanted = f"talks.jsonl:1: {NO_PAIR}; none of this file's rows (3) can be learned"
    assert str(raised.value).startswith(wanted)


def judged(*labels: bool) -> None:
    lines = [
        json.dumps({"prompt": f"ping {at}", "completion": "pong", "label": good}) for at, good in enumerate(labels)
    ]
    Path("judged.jsonl").write_text("\n".join(lines))
    Path("r.yaml").write_text("data: {train: judged.jsonl, validation: 0}\ntrain: {method: kto, batch_size: 2}\n")


@pytest.mark.parametrize(("good", "kind", "other"), [(True, "good", "bad"), (False, "bad", "good")])
def test_answers_of_one_label_are_refused(good: bool, kind: str, other: str) -> None:
    judged(good, good)
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    wanted = f"judged.jsonl:1: its answer is labelled as a {kind} one, and so are all others: "
    assert str(raised.value) == f"{wanted}kto learns to tell good from bad, add {other} ones"


def test_answers_of_both_labels_are_kept() -> None:
    judged(True, False)
    data(load("r.yaml"), Run("r"))
    assert [row["label"] for row in written(Path("runs/r/data"), "train")] == [True, False]


def test_an_answer_without_a_label_is_not_judged() -> None:
    judged(True, False)
    Path("judged.jsonl").write_text(f"{GOOD}\n")
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    assert str(raised.value).startswith("judged.jsonl:1: has no 'label' that says whether its answer is a good one")


def test_the_shipped_conversations_pass_and_are_enough() -> None:
    rows = shipped("assistant.jsonl")
    assert len({json.dumps(row.value) for row in rows}) >= 240
    assert any(len(row.value["messages"]) > 3 for row in rows), "conversations of several turns"
    assert any(row.value["messages"][0]["role"] == "system" for row in rows), "system prompts"


def test_the_shipped_questions_pass_and_are_enough() -> None:
    rows = shipped("assistant.heldout.jsonl")
    assert len({row.value["messages"][-1]["content"] for row in rows}) >= 40
    assert all(row.value["answer"].strip() for row in rows)


def test_the_reference_answers_contain_their_own_facts() -> None:
    from pipeline.scores import has_fact

    missing = [
        (row.place, fact)
        for row in shipped("assistant.heldout.jsonl")
        for fact in row.value["facts"]
        if not has_fact(row.value["answer"], fact)
    ]
    assert missing == []


def test_no_held_out_question_stands_in_the_training_file() -> None:
    def plain(text: str) -> str:
        return "".join(character for character in text.casefold() if character.isalnum())

    learned = {
        plain(message["content"])
        for row in shipped("assistant.jsonl")
        for message in row.value["messages"]
        if message["role"] == "user"
    }
    asked = [row.value["messages"][-1]["content"] for row in shipped("assistant.heldout.jsonl")]
    assert [text for text in asked if plain(text) in learned] == []
