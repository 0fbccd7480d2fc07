"""Whether a row has a held-out question in it, which would be learned instead of answered.

A question is found by two rules: a user's turn that nearly equals it (Jaccard similarity of runs of 5 characters), and,
anywhere in the row, more than half of its phrases of 8 words (the rule of Tülu 3, Lambert et al. 2024, section 3.2).
Either way its numbers have to be there: with others it is another question, as in GSM8K.
What more than half of the questions have in common is their template and tells nothing, so it is not looked at.
"""

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from train.reading.row import Rejection, Row, texts

RUN, PHRASE, QUOTED = 5, 8, 0.5
FEW = 3  # so many questions have no template
LONG = 2  # a turn so much longer than every question equals none, unless it repeats itself
WORD, NUMBER = re.compile(r"\w+"), re.compile(r"\d+")


@dataclass(frozen=True)
class Index:
    """Which questions have a feature, which features each question has, and which are but their template's."""

    questions: dict[Hashable, tuple[int, ...]]
    features: list[set[Hashable]]
    template: set[Hashable]


@dataclass(frozen=True)
class Questions:
    """The held-out questions, made ready to be looked for; cheap to send to another process."""

    places: list[str]
    numbers: list[set[str]]
    turns: set[int]
    longest: int
    runs: Index
    phrases: Index
    edges: set[tuple[str, str]]
    similarity: float


def questions(rows: list[Row], similarity: float) -> Questions:
    """The questions of the held-out rows: all turns of the user, which the last one may need to be understood."""
    turns = {_plain(asked): (len(asked), row.place) for row in reversed(rows) if (asked := _asked(row.value))}
    phrases = _index([_phrases(text) for text in turns])
    return Questions(
        places=[place for _, place in turns.values()],
        numbers=[set(NUMBER.findall(text)) for text in turns],
        turns={count for count, _ in turns.values()},
        longest=max(map(len, turns), default=0),
        runs=_index([_runs(text) for text in turns]),
        phrases=phrases,
        edges={(phrase[0], phrase[-1]) for phrase in phrases.questions if isinstance(phrase, tuple)},
        similarity=similarity,
    )


def check(value: dict[str, Any], held_out: Questions) -> None:
    """Raises a Rejection if the row has one of the questions in it."""
    found = _asks(value, held_out)
    found = _quotes(value, held_out) if found is None else found
    if found is not None:
        raise Rejection(f"has the held-out question of {held_out.places[found]} in it", "contamination")


def _asks(value: dict[str, Any], held_out: Questions) -> int | None:
    """The question that some of the user's turns nearly equal."""
    asked, index, least = _asked(value), held_out.runs, held_out.similarity
    for count in held_out.turns:
        for start in range(len(asked) - count + 1):
            text = _plain(asked[start : start + count])
            if len(text) * least > LONG * held_out.longest:
                continue
            own = _runs(text) - index.template
            known = [index.questions[run] for run in own if run in index.questions]
            lacking = int((1 - least) * len(own)) - (len(own) - len(known))
            # A question that is near enough lacks so few runs that it has one of these, which few questions have.
            rarest = sorted(known, key=len)[: lacking + 1] if lacking >= 0 else []
            for number in {number for having in rarest for number in having}:
                features = index.features[number]
                if not least * len(own) <= len(features) <= len(own) / least:
                    continue
                shared = len(own & features)
                alike = shared >= least * (len(own) + len(features) - shared)
                if alike and held_out.numbers[number] == set(NUMBER.findall(text)):
                    return number
    return None


def _quotes(value: dict[str, Any], held_out: Questions) -> int | None:
    """The question more than half of whose phrases stand in one text of the row."""
    for text in texts(value):
        words = WORD.findall(text.casefold())
        ends = zip(words, words[PHRASE - 1 :], strict=False)
        starts = [start for start, edge in enumerate(ends) if edge in held_out.edges]
        found = {tuple(words[start : start + PHRASE]) for start in starts}
        for number in {number for phrase in found for number in held_out.phrases.questions.get(phrase, ())}:
            phrases = held_out.phrases.features[number]
            if len(phrases & found) > QUOTED * len(phrases) and held_out.numbers[number] <= set(NUMBER.findall(text)):
                return number
    return None


def _index(features: list[set[Hashable]]) -> Index:
    counts = Counter(feature for own in features for feature in own)
    most = max(FEW, len(features) / 2)
    template = {feature for feature, count in counts.items() if count > most}
    having: dict[Hashable, list[int]] = {}
    for number, own in enumerate(features):
        for feature in own - template:
            having.setdefault(feature, []).append(number)
    return Index(
        {feature: tuple(numbers) for feature, numbers in having.items()},
        [own - template for own in features],
        template,
    )


def _asked(value: dict[str, Any]) -> list[str]:
    return [message["content"] for message in value.get("messages", ()) if message["role"] == "user"]


def _plain(turns: list[str]) -> str:
    return " ".join(WORD.findall(" ".join(turns).casefold()))


def _runs(text: str) -> set[Hashable]:
    return {text[start : start + RUN] for start in range(max(1, len(text) - RUN + 1))}


def _phrases(text: str) -> set[Hashable]:
    words = text.split()
    return {tuple(words[start : start + PHRASE]) for start in range(len(words) - PHRASE + 1)}
