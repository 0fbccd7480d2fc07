"""Whether the model in the window is the one that was trained, as far as the receipts prove it."""

from dataclasses import dataclass

from pipeline.proof import Comparison, read_comparisons
from pipeline.recipe import Recipe
from pipeline.run import Run


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
    command = f"run 'make prove RECIPE={run.name}'"
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
    return [f"Everything made from it says what the trained model says, within the recipe's bounds: {names}."]
