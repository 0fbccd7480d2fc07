"""The data stage: every bad line with its place, and a split that is the same for the same conversations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe import Run, UserError, load
from recipe.rows import heldout
from recipe.rows import rows as written
from train.data import Row, conversation, data, question, read, split

REPOSITORY = Path(__file__).parent.parent
USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})
SHAPE = 'not a conversation: a row is {"messages": [{"role": ..., "content": ...}, ...]}'
FACTS = "'facts' must be a list of strings that a right answer contains, like [\"make serve\"]"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def messages(*given: object, **more: object) -> str:
    return json.dumps({"messages": list(given), **more})


def problems_of(content: str | bytes, check: Callable = conversation) -> list[str]:
    Path("bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    problems: list[str] = []
    read(Path("bad.jsonl"), check, problems)
    return problems


BAD = {
    "not JSON": ('{"messages": [', "not JSON at column 15 (Expecting value): write one JSON object a line"),
    "two objects on a line": (
        GOOD + GOOD,
        f"not JSON at column {len(GOOD) + 1} (Extra data): write one JSON object a line",
    ),
    "not UTF-8": (b'{"messages": "caf\xe9"}', "not UTF-8 at byte 18: save the file as UTF-8"),
    "UTF-16": ("x".encode("utf-16"), "not UTF-8 at byte 1: save the file as UTF-8"),
    "zero byte": ("\0", "not JSON at column 1 (Expecting value): write one JSON object a line"),
    "nested too deeply": ("[" * 99_999, "nested too deeply: a row is an object with a list `messages`"),
    "no object": ("7", SHAPE),
    "null": ("null", SHAPE),
    "a list": (json.dumps([USER, ASSISTANT]), SHAPE),
    "no messages": ('{"prompt": "ping", "completion": "pong"}', SHAPE),
    "messages no list": ('{"messages": "ping"}', SHAPE),
    "messages empty": (messages(), "'messages' is empty: write the turns of the conversation"),
    "message no object": (messages("ping"), "messages[0] is not an object with 'role' and 'content'"),
    "no role": (
        messages({"content": "x"}),
        "messages[0]: unknown role None: choose one of: system, user, assistant",
    ),
    "unknown role": (
        messages(USER, {"role": "gpt", "content": "x"}),
        "messages[1]: unknown role 'gpt': choose one of: system, user, assistant",
    ),
    "role no text": (
        messages({"role": ["user"], "content": "x"}),
        "messages[0]: unknown role ['user']: choose one of: system, user, assistant",
    ),
    "system not first": (
        messages(USER, {"role": "system", "content": "x"}, ASSISTANT),
        "messages[1]: role 'system' must be the first message",
    ),
    "no content": (messages({"role": "user"}), "messages[0]: 'content' must be text, it is NoneType"),
    "content no text": (
        messages(USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}),
        "messages[1]: 'content' must be text, it is list",
    ),
    "content empty": (
        messages(USER, {"role": "assistant", "content": ""}),
        "messages[1]: 'content' of role 'assistant' is empty",
    ),
    "content only spaces": (
        messages({"role": "user", "content": " \n"}, ASSISTANT),
        "messages[0]: 'content' of role 'user' is empty",
    ),
    "broken surrogate": (
        '{"messages": [{"role": "user", "content": "cut \\ud83d"}, {"role": "assistant", "content": "x"}]}',
        "messages[0]: 'content' has a broken surrogate pair (a cut emoji): mend it",
    ),
    "no assistant": (
        messages(USER),
        "no turn of role 'assistant': there is nothing to learn from it, add the answer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_told_with_its_place(case: str) -> None:
    line, problem = BAD[case]
    line = line if isinstance(line, bytes) else line.encode()
    assert problems_of(f"{GOOD}\n\n".encode() + line + b"\n" + GOOD.encode()) == [f"bad.jsonl:3: {problem}"]


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
    "answer no text": (messages(USER, facts=["x"], answer=1), "'answer' must be text"),
    "broken surrogate in a fact": (
        messages(USER, facts=["\ud83d"]),
        "'facts' or 'answer' has a broken surrogate pair (a cut emoji): mend it",
    ),
    "broken surrogate in the answer": (
        messages(USER, facts=["x"], answer="\ud83d"),
        "'facts' or 'answer' has a broken surrogate pair (a cut emoji): mend it",
    ),
    "no conversation": ("{}", SHAPE),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_bad_question_is_told(case: str) -> None:
    line, problem = BAD_QUESTIONS[case]
    assert problems_of(line, question) == [f"bad.jsonl:1: {problem}"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\n \t"])
def test_an_empty_file_is_told(content: bytes) -> None:
    assert problems_of(content) == ["bad.jsonl: is empty: write one conversation a line"]


def test_a_file_of_bad_lines_is_not_called_empty() -> None:
    assert len(problems_of("7\n7\n")) == 2


def test_a_missing_file_is_told() -> None:
    problems: list[str] = []
    read(Path("none.jsonl"), conversation, problems)
    assert problems == ["none.jsonl: no such file: correct the path in the recipe's `data` section"]


def test_a_folder_is_told() -> None:
    problems: list[str] = []
    read(Path(), conversation, problems)
    assert problems == [".: is a folder: name the JSONL file(s) in it"]


def test_a_file_below_a_file_is_told() -> None:
    Path("talks.jsonl").write_text(GOOD)
    problems: list[str] = []
    read(Path("talks.jsonl/more"), conversation, problems)
    said = "cannot be read (Not a directory): correct the path or the file's permissions"
    assert problems == [f"talks.jsonl/more: {said}"]


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf%b\n", b"%b\r\n", b"\xef\xbb\xbf%b\r\n%b\r\n", b"%b", b"\n  %b  \n\n"]
)
def test_byte_order_marks_windows_line_ends_and_blank_lines_are_accepted(content: bytes) -> None:
    Path("good.jsonl").write_bytes(content.replace(b"%b", GOOD.encode()))
    problems: list[str] = []
    rows = read(Path("good.jsonl"), conversation, problems)
    assert problems == []
    assert [row.value for row in rows] == [{"messages": [USER, ASSISTANT]}] * content.count(b"%b")


def test_a_line_separator_inside_a_text_ends_no_line() -> None:
    answer = {"role": "assistant", "content": "one\u2028two\x85three\u2029four"}
    line = json.dumps({"messages": [USER, answer]}, ensure_ascii=False)
    Path("good.jsonl").write_text(line, encoding="utf-8")
    problems: list[str] = []
    rows = read(Path("good.jsonl"), conversation, problems)
    assert (problems, [row.value for row in rows]) == ([], [{"messages": [USER, answer]}])


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert conversation({"messages": [USER, ASSISTANT, USER]}) == {"messages": [USER, ASSISTANT]}


def test_an_empty_system_prompt_is_kept() -> None:
    system = {"role": "system", "content": ""}
    assert conversation({"messages": [system, USER, ASSISTANT]}) == {"messages": [system, USER, ASSISTANT]}


def test_keys_that_training_does_not_use_are_left_out() -> None:
    assert conversation({"messages": [USER | {"name": "x"}, ASSISTANT], "id": 1}) == {"messages": [USER, ASSISTANT]}


def write_recipe(train: str, heldout: str | None = None, **more: object) -> None:
    Path("talks.jsonl").write_text(train)
    given = {"train": "talks.jsonl", **more}
    if heldout is not None:
        Path("questions.jsonl").write_text(heldout)
        given["heldout"] = "questions.jsonl"
    Path("r.yaml").write_text(json.dumps({"data": given}))


def test_all_problems_of_all_files_come_at_once() -> None:
    write_recipe("7\n" + GOOD + "\n8\n", "{}\n")
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    assert raised.value.problems == (
        f"talks.jsonl:1: {SHAPE}",
        f"talks.jsonl:3: {SHAPE}",
        f"questions.jsonl:1: {SHAPE}",
    )


def test_problems_beyond_twenty_are_counted() -> None:
    write_recipe("7\n" * 25)
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    expected = [f"talks.jsonl:{line}: {SHAPE}" for line in range(1, 21)]
    assert list(raised.value.problems) == [*expected, "and 5 more problems like these"]


def test_twenty_problems_are_all_shown() -> None:
    write_recipe("7\n" * 20)
    with pytest.raises(UserError) as raised:
        data(load("r.yaml"), Run("r"))
    assert len(raised.value.problems) == 20


def test_bad_data_writes_nothing() -> None:
    write_recipe("7\n")
    with pytest.raises(UserError):
        data(load("r.yaml"), Run("r"))
    assert not Path("runs").exists()


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
    made = data(load("r.yaml"), Run("r"))
    folder = Path("runs/r/data")
    parts = {part: list(written(folder, part)) for part in ("train", "validation")} | {"heldout": heldout(folder)}
    assert sorted(row["source"] for row in parts["train"] + parts["validation"]) == sorted(places(rows))
    assert parts["heldout"] == [{"messages": [USER], "answer": "", "facts": ["x|y"], "source": "questions.jsonl:1"}]
    assert made.metrics == {name: len(part) for name, part in parts.items()} | {"duplicates": 0}
    assert list(made.inputs) == ["talks.jsonl", "questions.jsonl"]
    assert made.outputs == [Path("runs/r/data")]


def test_the_split_is_deterministic() -> None:
    assert split(numbered(*range(99)), 0.2, 0) == split(numbered(*range(99)), 0.2, 0)


def test_the_split_depends_on_the_seed() -> None:
    first, second = (places(split(numbered(*range(99)), 0.2, seed)[0]) for seed in (0, 1))
    assert first != second


def test_the_split_has_about_the_share_that_was_asked_for() -> None:
    validation, train = split(numbered(*range(1000)), 0.2, 0)
    assert len(validation) + len(train) == 1000
    assert 150 < len(validation) < 250


def test_a_conversation_stays_on_its_side_when_others_are_added() -> None:
    few, many = split(numbered(*range(50)), 0.2, 0), split(numbered(*range(200)), 0.2, 0)
    assert few[0] and set(places(few[0])) <= set(places(many[0]))
    assert set(places(few[1])) <= set(places(many[1]))


def test_the_order_of_the_file_does_not_move_a_conversation() -> None:
    forth, back = split(numbered(*range(50)), 0.2, 0), split(numbered(*reversed(range(50))), 0.2, 0)
    assert set(places(forth[0])) == set(places(back[0]))


def test_duplicates_stay_on_one_side() -> None:
    rows = [Row(row.value, f"{row.place} {copy}") for copy in range(3) for row in numbered(*range(50))]
    validation, train = split(rows, 0.2, 0)
    assert validation and train
    assert not {str(row.value) for row in validation} & {str(row.value) for row in train}


def test_a_share_of_zero_holds_nothing_back() -> None:
    assert split(numbered(1, 2), 0, 0) == ([], numbered(1, 2))


def test_a_small_file_still_gives_both_sides() -> None:
    validation, train = split(numbered(1, 2, 3), 0.001, 0)
    assert (len(validation), len(train)) == (1, 2)


@pytest.mark.parametrize("rows", [numbered(1), numbered(1, 1)])
def test_nothing_left_to_train_on_is_told(rows: list[Row]) -> None:
    with pytest.raises(UserError) as raised:
        split(rows, 0.1, 0)
    assert str(raised.value) == (
        f"{len(rows)} conversation(s) leave nothing to train on after the split (data.validation=0.1): "
        "add conversations or set data.validation=0"
    )


def shipped(name: str, check: Callable) -> list[Row]:
    problems: list[str] = []
    rows = read(REPOSITORY / "train" / name, check, problems)
    assert problems == []
    return rows


def test_the_shipped_conversations_pass_and_are_enough() -> None:
    rows = shipped("assistant.jsonl", conversation)
    assert len({json.dumps(row.value) for row in rows}) >= 240
    assert any(len(row.value["messages"]) > 3 for row in rows), "conversations of several turns"
    assert any(row.value["messages"][0]["role"] == "system" for row in rows), "system prompts"


def test_the_shipped_questions_pass_and_are_enough() -> None:
    rows = shipped("assistant.heldout.jsonl", question)
    assert len({row.value["messages"][-1]["content"] for row in rows}) >= 40
    assert all(row.value["answer"].strip() for row in rows)


def test_the_reference_answers_contain_their_own_facts() -> None:
    from recipe.score import has_fact

    missing = [
        (row.place, fact)
        for row in shipped("assistant.heldout.jsonl", question)
        for fact in row.value["facts"]
        if not has_fact(row.value["answer"], fact)
    ]
    assert missing == []


def test_no_held_out_question_stands_in_the_training_file() -> None:
    def plain(text: str) -> str:
        return "".join(character for character in text.casefold() if character.isalnum())

    learned = {
        plain(message["content"])
        for row in shipped("assistant.jsonl", conversation)
        for message in row.value["messages"]
        if message["role"] == "user"
    }
    asked = [row.value["messages"][-1]["content"] for row in shipped("assistant.heldout.jsonl", question)]
    assert [text for text in asked if plain(text) in learned] == []
