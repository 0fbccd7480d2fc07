"""Files of labelled sentences, or pairs of them, in the columns of GLUE, and the question that each row becomes.

Read are JSONL, CSV and TSV with a header as GLUE's own files and its Hub sets have it, and CoLA's without one.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import UserError

PROBLEMS_SHOWN = 20
MOST_LABELS = 200  # more are no classification, and their confusion matrices fill the memory
# Of each task, the columns of its text: SST-2 and CoLA; RTE, MNLI, STS-B, WNLI; the Hub's MNLI; QQP; QNLI; MRPC.
TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
         ("#1 String", "#2 String"), ("sentence",), ("text",))  # fmt: skip
LABELS = ("label", "gold_label", "Quality", "is_duplicate")
COLA = ("source", "label", "mark", "sentence")  # CoLA's files have no header
PROMPT = "{texts}\n\nWhich label fits: {labels}? Answer with the label alone."
FORMATS = {".jsonl": "one object a line", ".csv": "a header line and commas", ".tsv": "a header line and tabs"}


@dataclass(frozen=True)
class Labelled:
    """A file's rows as prompts, and for each the index of its label in `labels`."""

    name: str
    labels: tuple[str, ...]
    prompts: list[str]
    wanted: list[int]


def path_of(entry: str) -> str:
    """The path of an entry of `eval.classification`: what stands before the names of its labels."""
    return entry.partition("=")[0]


def labelled(entries: tuple[str, ...]) -> list[Labelled]:
    """Every file of `eval.classification`: `PATH`, or `PATH=first|second` where its labels are the numbers 0, 1, ...

    Raises:
        UserError: every problem of every file, with its line.
    """
    problems: list[str] = []
    found = [read(entry, problems) for entry in entries]
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        raise UserError(*problems[:PROBLEMS_SHOWN], *([f"and {more} more problems like these"] if more > 0 else []))
    return [each for each in found if each]


def read(entry: str, problems: list[str]) -> Labelled | None:
    """One file; what is wrong with it is appended to `problems`."""
    path, _, given = entry.partition("=")
    before = len(problems)
    rows = list(_rows(Path(path), problems))
    columns = _columns(path, rows, problems) if rows else None
    if columns is None:
        if len(problems) == before:
            problems.append(f"{path}: has no rows: write {FORMATS.get(Path(path).suffix, 'some')}")
        return None
    texts, column = columns
    taken = [(place, row) for place, row in rows if _has(row, place, (*texts, column), problems)]
    numbered = all(_number(row[column]) is not None for _, row in taken)
    names = tuple(name.strip() for name in given.split("|")) if given else ()
    labels = names or tuple(sorted({str(row[column]).strip() for _, row in taken}))
    wanted: list[int] = []
    for place, row in taken:
        found = _index(row[column], labels, numbered)
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
        else:
            wanted.append(found)
    if len(problems) == before and numbered and not names:
        problems.append(_unnamed(path, column, [row[column] for _, row in taken]))
    elif len(problems) == before and len(labels) < 2:
        problems.append(f"{path}: has the one label {labels[0]!r}: there is nothing to tell apart")
    elif len(problems) == before and len(labels) > MOST_LABELS:
        told = f"has {len(labels):,} labels in {column}, and at most {MOST_LABELS} compete"
        problems.append(f"{path}: {told}: name another file in eval.classification")
    if len(problems) > before:
        return None
    prompts = [prompt_of(texts, row, labels) for _, row in taken]
    return Labelled(Path(path).name, labels, prompts, wanted)


def _index(value: Any, labels: tuple[str, ...], numbered: bool) -> int | str:
    """Which of the labels it is, by name or by number; else what is wrong with it."""
    text, number = str(value).strip(), _number(value)
    if number == -1 and numbered:
        return "label -1, as in GLUE's test files, is a hidden one: use the validation file, or leave the row out"
    if text in labels:
        return labels.index(text)
    if number is not None and numbered and 0 <= number < len(labels):
        return number
    return f"label {text!r} is none of {', '.join(labels)}: name every label, in order"


def prompt_of(texts: tuple[str, ...], row: dict[str, Any], labels: tuple[str, ...]) -> str:
    """The user's words: each text after the name of its column, then the labels to choose from."""
    shown = [spoken(label) for label in labels]
    lines = [f"{name.lstrip('#').strip().capitalize()}: {str(row[name]).strip()}" for name in texts]
    return PROMPT.format(texts="\n".join(lines), labels=f"{', '.join(shown[:-1])} or {shown[-1]}")


def spoken(label: str) -> str:
    """A label as the assistant would say it: not_entailment is two words."""
    return label.replace("_", " ")


def _rows(path: Path, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, row) of each row."""
    if path.suffix not in FORMATS:
        problems.append(f"{path}: a file for classification ends with {', '.join(FORMATS)}")
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path}: no such file: correct the path in eval.classification")
        return []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as UTF-8 text ({error})")
        return []
    if path.suffix == ".jsonl":
        return _json_rows(path, text, problems)
    lines = io.StringIO(text, newline="\n")  # not splitlines: it also splits at U+2028 within a text
    if path.suffix == ".csv":
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)  # GLUE's texts have quotes of their own
    found, header = [], None
    try:
        for cells in reader:
            if header is None:
                header = cells
                if not _is_cola(cells):
                    continue
                header = list(COLA)
            place = f"{path}:{reader.line_num}"
            if len(cells) < len(header):
                problems.append(f"{place}: has {len(cells)} columns of {len(header)}: fix the line")
            else:
                found.append((place, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        problems.append(f"{path}:{reader.line_num}: not CSV ({error}): fix the quotes")
    return found


def _json_rows(path: Path, text: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON ({error}): write one object a line")
            continue
        if isinstance(row, dict):
            found.append((f"{path}:{number}", row))
        else:
            problems.append(f'{path}:{number}: is no object: write {{"sentence": ..., "label": ...}}')
    return found


def _is_cola(cells: list[str]) -> bool:
    return len(cells) == len(COLA) and cells[1] in ("0", "1") and cells[2] in ("", "*")


def _columns(path: str, rows: list[Any], problems: list[str]) -> tuple[tuple[str, ...], str] | None:
    """The columns of the text and of the label."""
    present = set(rows[0][1])
    texts = next((names for names in TEXTS if present.issuperset(names)), None)
    label = next((name for name in LABELS if name in present), None)
    if texts and label and not _is_regression(rows, label):
        return texts, label
    if texts and ("score" in present or label):
        problems.append(
            f"{path}: its labels are scores on a scale, as STS-B's: a regression, which make eval does not measure"
        )
    elif texts:
        problems.append(f"{path}: has no column of labels: name one {' or '.join(LABELS)}, or use the validation file")
    else:
        known = "; ".join(" and ".join(names) for names in TEXTS)
        problems.append(f"{path}: has no column of text among {', '.join(map(str, present))}: name them {known}")
    return None


def _is_regression(rows: list[Any], label: str) -> bool:
    """Whether the labels are numbers and some of them are not whole."""
    values = [row.get(label) for _, row in rows]
    try:
        return any(float(value) % 1 for value in values if value is not None and not isinstance(value, bool))
    except (TypeError, ValueError):
        return False


def _has(row: dict[str, Any], place: str, columns: tuple[str, ...], problems: list[str]) -> bool:
    missing = [name for name in columns if row.get(name) is None or not str(row[name]).strip()]
    if missing:
        problems.append(f"{place}: {' and '.join(map(repr, missing))} is missing or empty")
    return not missing


def _number(value: Any) -> int | None:
    """A whole number, also as 1.0: so pandas writes a column that once had a gap."""
    try:
        return int(str(value).strip().removesuffix(".0"))
    except ValueError:
        return None


def _unnamed(path: str, column: str, values: list[Any]) -> str:
    found = sorted({number for value in values if (number := _number(value)) is not None})
    example = "|".join(f"name of {number}" for number in range(found[-1] + 1))
    return f"{path}: {column} has the numbers {', '.join(map(str, found))}: name them in order, as '{path}={example}'"
