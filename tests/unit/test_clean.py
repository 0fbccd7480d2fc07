"""Cleaning: what is fixed, what must stay as it is to the byte, and which rows are rejected by which step."""

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Clean
from train.cleaning.clean import characters, clean, encoding
from train.reading.row import Rejection

REPOSITORY = Path(__file__).parents[2]
OFF = Clean(unicode=False, encoding=False, empty_turns=False)


def talk(*said: str, **more: Any) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    return {"messages": turns, **more}


RIGHT = {
    "plain": "How do I train a model?",
    "white space": "a\tb\n\n  c\r\n",
    "typographic quotes": "“Curly” and ‘single’, it’s — don’t… „Gänsefüßchen“ «guillemets»",
    "straight quotes": "\"quoted\" and 'single', it's -- don't...",
    "html": "&amp; &lt;b&gt; <b>é</b> &eacute;",
    "ligatures and widths": "ﬁne ﬂoor, ＬＯＵＤ, ﾊﾝｶｸ",
    "French": "Où est l’été à Noël\u00a0? Ça va, façade, cœur",
    "capitals with accents": "VOILÀ, ESPAÑA, IRMÃ, MÜNCHEN, ÃO",
    "a letter that mangled text often has": "Ã is a letter of Portuguese: São, IRMÃ",
    "Vietnamese": "Tiếng Việt có dấu",
    "Greek, Cyrillic, Hebrew": "Ελλάδα, Привет, שלום",
    "Arabic with direction marks": "\u202bمرحبا\u202c \u200fabc\u200e",
    "Persian with a zero-width non-joiner": "می\u200cخواهم",
    "Hindi with a zero-width joiner": "क्\u200dष",
    "Thai with zero-width spaces": "สวัสดี\u200bครับ",
    "Chinese, Japanese, Korean": "你好, 世界。今日は、ハンカク 한국어",
    "emoji": "👩\u200d👩\u200d👧 🇫🇷 ❤\ufe0f 👍🏽 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "signs": "€5, £3, ½, 10³, µm, ©2020®™, π ≈ 3.14 → ∞, │ ─ ┌┐",
    "line separators": "one\u2028two\u2029three",
    "a soft hyphen": "Donau\u00addampf",
    "a replacement character": "a \ufffd b",
    "mangled text in a code mark": "`Ã©` is `é` in Latin-1",
    "mangled text in a code block": "Repair it:\n```python\nassert fix('donâ€™t') == 'don’t'\n```\n",
    "mangled text in a code block that is cut": "```\nâ€™",
}
WRONG = {
    "one letter": ("fiancÃ©", "fiancé"),
    "German": ("schÃ¶n, grÃ¼ÃŸe", "schön, grüße"),
    "a quote": ("donâ€™t", "don’t"),
    "Windows quotes read as Latin-1": ("\x93quoted\x94 it\x92s", "“quoted” it’s"),
    "Cyrillic": ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
    "Japanese": ("æ—¥æœ¬", "日本"),
    "emoji": ("ðŸ˜€ ok", "😀 ok"),
    "twice": ("ÃƒÂ©", "é"),
    "in one line of two": ("café\nfiancÃ©", "café\nfiancé"),
    "a byte that ends a line elsewhere": ("Ã\x85ngstrom", "Ångstrom"),
    "a lost no-break space among others": ("dÃ©jÃ  vu", "déjà vu"),
    "beside a code mark": ("cafÃ© `Ã©`", "café `Ã©`"),
}
CHARACTERS = {
    "composed": ("cafe\u0301", "café"),
    "Hangul": ("\u1112\u1161\u11ab", "한"),
    "zero byte": ("a\0b", "ab"),
    "bell and escape": ("\x07a\x1bb", "ab"),
    "terminal colours": ("\x1b[1;31mred\x1b[0m", "red"),
    "delete": ("a\x7f", "a"),
    "a byte order mark": ("\ufeffa", "a"),
    "form feed": ("one\x0ctwo", "one\ntwo"),
    "next line": ("one\x85two", "one\ntwo"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_text_stays_as_it_is_to_the_byte(case: str) -> None:
    assert unicodedata.is_normalized("NFC", RIGHT[case]), "or the table is wrong"
    value = talk(RIGHT[case], RIGHT[case])
    assert clean(value, Clean()) == (value, [])


@pytest.mark.parametrize("case", WRONG)
def test_mangled_text_is_mended(case: str) -> None:
    wrong, right = WRONG[case]
    assert encoding(wrong) == right


@pytest.mark.parametrize("case", WRONG)
def test_mended_text_is_right(case: str) -> None:
    right = WRONG[case][1]
    assert encoding(right) == right


@pytest.mark.parametrize("case", CHARACTERS)
def test_characters_are_composed_and_controls_dropped(case: str) -> None:
    given, expected = CHARACTERS[case]
    assert characters(given) == expected == characters(expected)


def test_every_text_of_a_row_is_mended_and_nothing_else() -> None:
    call = {"id": "Ã©", "type": "function", "function": {"name": "Ã©", "arguments": {"Ã©": ["fiancÃ©", 1, None]}}}
    fixed = {"id": "Ã©", "type": "function", "function": {"name": "Ã©", "arguments": {"Ã©": ["fiancé", 1, None]}}}
    answer = {"role": "assistant", "content": "", "reasoning_content": "schÃ¶n", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "x", "description": "fiancÃ©"}}]
    opening, rejected = talk("schÃ¶n")["messages"], talk("x", "schÃ¶n")["messages"]
    value, steps = clean({"messages": [*opening, answer], "rejected": rejected, "tools": tools}, Clean())
    assert value == {
        "messages": [
            {"role": "user", "content": "schön"},
            {"role": "assistant", "content": "", "reasoning_content": "schön", "tool_calls": [fixed]},
        ],
        "rejected": talk("x", "schön")["messages"],
        "tools": tools,
    }
    assert steps == ["encoding"]


def test_plain_text_is_mended() -> None:
    assert clean({"text": "schÃ¶n e\u0301"}, Clean()) == ({"text": "schön é"}, ["encoding", "unicode"])


@pytest.mark.parametrize(("step", "text"), [("encoding", "fiancÃ©"), ("unicode", "e\u0301\0")])
def test_a_step_can_be_switched_off(step: str, text: str) -> None:
    assert clean(talk(text, "x"), Clean())[1] == [step]
    assert clean(talk(text, "x"), Clean(**{step: False})) == (talk(text, "x"), [])


def test_cleaning_twice_is_cleaning_once() -> None:
    for text in (*RIGHT.values(), *(pair[0] for pair in (WRONG | CHARACTERS).values())):
        once, _ = clean(talk(text, text), Clean())
        assert clean(once, Clean()) == (once, [])


def test_the_shipped_conversations_are_clean() -> None:
    for line in (REPOSITORY / "recipes" / "assistant.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert clean(row, Clean()) == (row, [])


SYSTEM = {"role": "system", "content": ""}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "x", "arguments": {}}}]}
EMPTY_RESULT = {"role": "tool", "content": ""}


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (talk("a", "b"), talk("a", "b")),
        (talk("a", "b", "c", ""), talk("a", "b")),
        (talk("a", "b", " \n", "d"), talk("a", "b")),
        (talk("a", "b", "c", "\u200b"), talk("a", "b")),
        ({"messages": [SYSTEM, *talk("a", "b")["messages"]]}, {"messages": [SYSTEM, *talk("a", "b")["messages"]]}),
        (
            {"messages": [talk("a")["messages"][0], CALLING, EMPTY_RESULT, talk("a", "b")["messages"][1]]},
            {"messages": [talk("a")["messages"][0], CALLING, EMPTY_RESULT, talk("a", "b")["messages"][1]]},
        ),
        ({"text": "a"}, {"text": "a"}),
    ],
)
def test_a_conversation_ends_before_its_first_empty_turn(value: dict[str, Any], left: dict[str, Any]) -> None:
    assert clean(value, Clean()) == (left, [] if left == value else ["empty_turns"])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (talk("a", ""), "messages[1] of role 'assistant' is empty"),
        (talk("", "b", "c", "d"), "messages[0] of role 'user' is empty"),
        (talk("a", "b", "c", "", rejected=talk("a", "b", "c", "d")["messages"]), "messages[3] of role 'assistant'"),
        (talk("a", "b", "c", "", label=True), "messages[3] of role 'assistant' is empty"),
        ({"text": " \n"}, "the text is empty"),
    ],
)
def test_a_row_without_an_answer_is_rejected(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejection) as raised:
        clean(value, Clean())
    assert raised.value.step == "empty_turns" and raised.value.reason.startswith(reason)
    assert clean(value, OFF) == (value, [])


@pytest.mark.parametrize(
    ("settings", "value", "reason"),
    [
        ({"min_answer_characters": 3}, talk("long question", "no"), "2 characters to learn, below 3"),
        ({"min_answer_characters": 3}, {"text": "no"}, "2 characters to learn, below 3"),
        ({"max_characters": 9}, talk("12345", "67890"), "10 characters, above 9"),
        ({"max_characters": 9}, {"text": "1234567890"}, "10 characters, above 9"),
        ({"min_turns": 3}, {"messages": [SYSTEM, *talk("a", "b")["messages"]]}, "2 turns, below 3"),
        ({"max_turns": 3}, talk("a", "b", "c", "d"), "4 turns, above 3"),
    ],
)
def test_a_row_that_is_too_short_or_too_long_is_rejected(
    settings: dict[str, int], value: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Rejection) as raised:
        clean(value, Clean(**settings))
    assert (raised.value.step, raised.value.reason) == ("length", reason)
    assert clean(value, Clean()) == (value, [])
    [(key, bound)] = settings.items()
    at_the_bound = bound - 1 if key.startswith("min") else bound + 1
    assert clean(value, Clean(**{key: at_the_bound})) == (value, [])


def test_both_texts_of_a_pair_without_a_prompt_are_mended() -> None:
    value, steps = clean({"text": "fiancÃ©", "rejected": "schÃ¶n"}, Clean())
    assert (value, steps) == ({"text": "fiancé", "rejected": "schön"}, ["encoding"])


def matches(parsed: Any, dice: random.Random) -> str:
    """A text that this part of a parsed pattern matches."""
    text = ""
    for kind, what in parsed:
        name = str(kind)
        if name == "LITERAL":
            text += chr(what)
        elif name == "RANGE":
            text += chr(dice.randint(*what))
        elif name == "IN":
            text += matches([dice.choice(what)], dice) if str(what[0][0]) != "NEGATE" else "\n"
        elif name == "BRANCH":
            text += matches(dice.choice(what[1]), dice)
        elif name == "MAX_REPEAT":
            text += matches(what[2], dice) * dice.randint(what[0], min(what[1], 2))
        elif name in ("ANY", "CATEGORY"):
            text += " " if what == re._constants.CATEGORY_SPACE else "e"  # type: ignore[attr-defined]
        else:
            assert name == "AT", name
    return text


def test_no_broken_encoding_that_ftfy_finds_is_passed_over() -> None:
    """The cheap test before ftfy's is none of its own: it finds whatever any branch of ftfy's pattern does."""
    from ftfy.badness import BADNESS_RE

    from train.cleaning.clean import _suspect

    dice = random.Random(0)
    # What `re` itself reads a pattern into; it has no public name.
    [(_, (_, branches))] = re._parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags)  # type: ignore[attr-defined]
    assert len(branches) > 30
    for branch in branches:
        for text in {matches(branch, dice) for _ in range(1000)}:
            assert BADNESS_RE.search(text) and _suspect().search(text), (text, branch)


def test_what_is_only_read_keeps_its_place_when_the_words_before_it_change() -> None:
    answer = {"role": "assistant", "content": "cafe\u0301\x00 bad good", "only_read": [[7, 11]]}
    row = {"messages": [{"role": "user", "content": "?"}, answer]}
    [_, cleaned] = clean(row, Clean())[0]["messages"]
    assert cleaned["content"] == "caf\u00e9 bad good"
    [[first, last]] = cleaned["only_read"]
    assert cleaned["content"][first:last] == "bad "
    with pytest.raises(Rejection, match="across the bounds of what is learned"):
        clean({"messages": [row["messages"][0], answer | {"only_read": [[0, 4]]}]}, Clean())
