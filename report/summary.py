"""What the receipts of a run tell its page and its model card: verdict, data, lineage, answers, costs."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.load import as_dict
from pipeline.proof import Comparison, in_words, read_comparisons
from pipeline.recipe import Recipe
from pipeline.run import Fingerprints, Receipt, Run
from pipeline.scores import Score, grouped, has_fact, speed
from pipeline.stages import STAGES
from pipeline.units import bars

MOST_QUESTIONS = 60
LINK_OF_STAGE = {"base": "base", "train": "trained", "reference": "reference", "merge": "merged"}


@dataclass(frozen=True)
class Verdict:
    """`answer` is yes, no or open; `reasons` say what was found, what is missing, or what has changed since.

    `rows` are the comparisons that it rests on, `outdated` whether they are of an older state of the run.
    """

    answer: str
    reasons: list[str]
    rows: list[Comparison]
    outdated: bool = False

    @property
    def headline(self) -> str:
        """The answer in a sentence, with the artefact in which the model was lost."""
        lost = next((row.name for row in self.rows if row.problems), "")
        return {
            "yes": "Yes: it is the model that was trained.",
            "no": f"No: {lost} is not the model that was trained.",
            "open": "Not proved yet.",
        }[self.answer]


def verdict(recipe: Recipe, run: Run) -> Verdict:
    """By the newest comparisons that still hold: those of `make prove`, else those of the files alone."""
    command = f"run 'make prove RECIPE={run.given}'"
    proof, files = run.find_receipt("prove"), run.find_receipt("compare")
    all_rows = [Comparison(**row) for row in proof.metrics["comparisons"]] if proof else []
    found = run.path("compare.jsonl")
    file_rows = read_comparisons(found) if files and found.is_file() else []
    changed = run.state("prove" if proof else "compare", recipe).changed
    if proof and not changed:
        problems = _problems(all_rows)
        return Verdict("no" if problems else "yes", problems or _passed(all_rows), all_rows)

    again = f"The last proof no longer holds: {changed}; {command} again."
    if file_rows and not run.state("compare", recipe).changed:
        problems = _problems(file_rows)
        missing = again if proof else f"The served endpoint has not been asked yet: {command}."
        return Verdict("no" if problems else "open", problems or [missing], file_rows)
    if proof or file_rows:
        return Verdict("open", [again], all_rows or file_rows, outdated=True)
    return Verdict("open", [f"Nothing has been compared yet: {command}."], [])


def _problems(rows: list[Comparison]) -> list[str]:
    """The first artefact in which the model was lost comes first; the line is in the order in which it is made."""
    return [f"{row.name}: {problem}" for row in rows for problem in row.problems]


def _passed(rows: list[Comparison]) -> list[str]:
    names = ", ".join(row.name for row in rows)
    passed = f"Everything made from it says what the trained model says, within the recipe's bounds: {names}."
    return [passed, *(f"{words}." for words in map(in_words, rows) if words)]


@dataclass(frozen=True)
class Conversations:
    """From the receipt of `data` and from `tokens/preview.json`; what is not known is empty."""

    sources: list[dict[str, Any]] = field(default_factory=list)  # `source`, `format`, `rows`, `rejected` by reason
    steps: list[tuple[str, int, int]] = field(default_factory=list)  # (cleaning step, rows changed, rows left out)
    parts: list[dict[str, Any]] = field(default_factory=list)  # a row of counts for train and for validation
    lengths: list[tuple[str, int, float]] = field(default_factory=list)  # (tokens, rows, bar of 0 to 1)
    packing: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sources or self.parts)


def conversations(run: Run) -> Conversations:
    """What this run tells of its data."""
    receipt = run.find_receipt("data")
    told = receipt.metrics if receipt else {}
    changed, rejected = (told.get(key) for key in ("changed", "rejected"))
    changed, rejected = (steps if isinstance(steps, dict) else {} for steps in (changed, rejected))
    steps = [(name, changed.get(name, 0), rejected.get(name, 0)) for name in sorted({*changed, *rejected})]
    try:
        found = json.loads(run.path("tokens", "preview.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return Conversations(told.get("sources", []), steps)
    return Conversations(
        told.get("sources", []),
        steps,
        [{"part": part} | counts for part, counts in found["parts"].items() if counts.get("rows")],
        bars(found["lengths"]),
        found["packing"],
        found["example"],
    )


@dataclass(frozen=True)
class Link:
    """One link of the lineage: files that a stage read or made; `main` is the largest, by which the link is known."""

    name: str
    stage: str
    files: Fingerprints
    receipt: Receipt
    changed: str | None

    @property
    def main(self) -> str:
        return max(self.files, key=lambda path: self.files[path]["bytes"])

    @property
    def digest(self) -> str:
        return str(self.files[self.main]["sha256"])

    @property
    def bytes(self) -> int:
        return sum(int(mark["bytes"]) for mark in self.files.values())


@dataclass(frozen=True)
class Answer:
    """What these models said to a held-out question: text in pieces, some of them key facts, and what it lacks."""

    models: list[str]
    pieces: list[tuple[str, bool]]
    missing: list[str]


def quantizations(recipe: Recipe, run: Run, verdict: Verdict) -> list[Comparison]:
    """Each GGUF with all that is measured of it, in the order in which the recipe writes them."""
    written = run.find_receipt("gguf")
    if written is None:
        return []
    compared = {} if verdict.outdated else {row.name: row for row in verdict.rows}
    kinds = [kind for kind in recipe.gguf.written if kind in written.metrics]
    found = [compared.get(kind, Comparison(kind)) for kind in kinds]
    return [Comparison(row.name, written.metrics[row.name] | row.measures, row.problems) for row in found]


def recommended(recipe: Recipe, run: Run) -> dict[str, Any]:
    """`recommended` (a type), `rule` and `reasons` by type, of a comparison that still holds."""
    compare = run.state("compare", recipe)
    if compare.receipt is None or "recommended" not in compare.receipt.metrics or compare.changed:
        return {}
    return compare.receipt.metrics


def served_type(recipe: Recipe, choice: dict[str, Any]) -> str:
    """The type that is served: the recipe's, else the recommended one, else the first."""
    return recipe.serve.type or choice.get("recommended") or recipe.served_type


def lineage(recipe: Recipe, run: Run) -> list[Link]:
    """From the data to what is served, as far as the run has come."""
    links = []
    for stage in STAGES:
        state = run.state(stage.name, recipe)
        if receipt := state.receipt:
            for name, files in _files_of(receipt):
                links.append(Link(name, stage.name, files, receipt, state.changed))
    return [link for link in links if link.files]


def _files_of(receipt: Receipt) -> Iterator[tuple[str, Fingerprints]]:
    """(link's name, files) of one stage."""
    if receipt.stage == "data":
        yield "data", receipt.inputs
        yield "split", receipt.outputs
    elif receipt.stage in LINK_OF_STAGE:
        yield LINK_OF_STAGE[receipt.stage], _below(receipt.outputs, "answers.jsonl", wanted=False)
    elif receipt.stage == "gguf":
        made = {kind: _below(receipt.outputs, f"-{kind}.gguf") for kind in receipt.metrics}
        yield from made.items()
        weighed_by = receipt.outputs.keys() - {path for files in made.values() for path in files}
        yield "importance matrix", {path: receipt.outputs[path] for path in sorted(weighed_by)}
    elif receipt.stage == "prove":
        for row in receipt.metrics["comparisons"]:
            endpoint, _, kind = row["name"].rpartition(" ")
            if endpoint:
                yield row["name"], _below(receipt.inputs, f"-{kind}.gguf")


def _below(files: Fingerprints, ending: str, wanted: bool = True) -> Fingerprints:
    return {path: mark for path, mark in files.items() if path.endswith(ending) is wanted}


def answers(recipe: Recipe, run: Run) -> list[tuple[str, list[Answer]]]:
    """(question, answers of the base, the trained model and each GGUF): those first in which the models find other
    facts than one another, and of these one for each fact before a second one.
    """
    if not run.path("answers.jsonl").is_file():
        return []
    asked_again = [] if run.state("compare", recipe).changed else _rows(run.path("compare-answers.jsonl"))
    later = {row["question"]: row["answers"] for row in asked_again}
    ranked, asked = [], Counter[str]()
    for row in _rows(run.path("answers.jsonl")):
        said = {"base": row["before"], "trained": row["after"]} | later.get(row["question"], {})
        speakers: dict[str, list[str]] = {}
        for model, text in said.items():
            speakers.setdefault(text, []).append(model)
        given = [_answer(models, text, row["facts"]) for text, models in speakers.items()]
        same = len({tuple(answer.missing) for answer in given}) == 1
        ranked.append((same, asked[str(row["facts"])], row["question"], given))
        asked[str(row["facts"])] += 1
    ranked.sort(key=lambda row: row[:2])
    return [(question, given) for _, _, question, given in ranked[:MOST_QUESTIONS]]


def _answer(models: list[str], text: str, facts: list[str]) -> Answer:
    missing = [fact for fact in facts if not has_fact(text, fact)]
    words = {word.strip() for fact in facts for word in fact.split("|")} - {""}
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text, flags=re.IGNORECASE) if pattern else [text]
    return Answer(models, [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece], missing)


@dataclass(frozen=True)
class Evaluated:
    """What `make eval` found, for the page: scores by group, of the weights and of what is served; speeds; method."""

    groups: list[tuple[str, list[Score]]]
    speeds: list[tuple[str, str]]
    method: str
    changed: str | None

    @property
    def scores(self) -> list[Score]:
        return [score for _, scores in self.groups for score in scores]


def evaluated(recipe: Recipe, run: Run) -> Evaluated | None:
    """The receipt's scores, and those of what was served last; None before there are any."""
    receipt, serving, served = run.find_receipt("eval"), run.find_receipt("serve"), run.path("served.json")
    if receipt is None:
        return None
    parts = [receipt.metrics]
    if serving and served.is_file():
        told = json.loads(served.read_text(encoding="utf-8"))
        parts += [told] if told["inputs"] == serving.inputs else []
    scores = [Score.of(row) for part in parts for row in part["scores"]]
    speeds = [(name, speed(row)) for part in parts for name, row in part["speed"].items()]
    return Evaluated(grouped(scores), speeds, receipt.metrics["method"], run.state("eval", recipe).changed)


def costs(run: Run) -> list[tuple[str, str, Receipt]]:
    """(stage, what it does, receipt) of every finished stage that made something."""
    found = [(stage.name, stage.does, run.find_receipt(stage.name)) for stage in STAGES if stage.name != "serve"]
    return [(name, does, receipt) for name, does, receipt in found if receipt]


def machines(run: Run) -> list[tuple[dict[str, Any], list[str]]]:
    """Each machine with the stages that ran on it: more than one where a run moved."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, _, receipt in costs(run):
        if receipt.machine:
            known = {key: value for key, value in receipt.machine.items() if key != "gpus"}
            at = found.setdefault(json.dumps(known, sort_keys=True), (dict(receipt.machine), []))
            at[0]["gpus"] = at[0].get("gpus") or receipt.machine.get("gpus")
            at[1].append(name)
    return list(found.values())


def settings(recipe: Recipe) -> list[tuple[str, Any]]:
    """Every key of the resolved recipe with its value."""
    return list(_flat(as_dict(recipe), ""))


def _flat(keys: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key != "path" or prefix:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, 10_000)]
