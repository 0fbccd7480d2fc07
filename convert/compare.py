"""Compare the merged weights and each GGUF with the reference:  python -m convert.compare RECIPE

Everything that conversion can lose is looked for: the chat template, token ids, the stop token, the weights. Which of
the types is the one to serve follows by a rule that is stated and measured.
"""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.comparison import Found, Task, compare_weights, gguf_bounds, measured, merged_bounds
from convert.quantizer import quantize
from pipeline import Made, Recipe, Run, command
from pipeline.files import fresh_folder, remove, write_whole
from pipeline.machine import cores, free_bytes
from pipeline.model import precision_to_ask
from pipeline.proof import Comparison, write_comparisons
from pipeline.recipe import NEEDS_IMATRIX
from pipeline.reference import read_reference, write_own_answers
from pipeline.rows import heldout, rendered
from pipeline.scores import facts_in

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")


def compare(recipe: Recipe, run: Run) -> Made:
    """Write `compare.jsonl`, a comparison a line, and `compare-answers.jsonl`, a held-out question a line.

    A failed comparison is a result here; `make prove` judges. The receipt's metrics recommend a type.
    `compare-greedy.jsonl` holds what each answers to the probes, for its server to be held to.
    """
    from transformers import AutoTokenizer

    reference = read_reference(run.path("reference"))
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    questions = questions_of(run, tokenizer)
    log.info("compare: merge")
    merged = compare_weights("merge", run.path("merged"), precision_to_ask(recipe), merged_bounds(recipe), reference)
    comparisons, own, answers = [merged.comparison], merged.own, {}
    for kind in recipe.gguf.written:
        log.info("compare: %s", kind)
        task = Task(
            kind=kind,
            path=str(run.path("gguf", f"{run.name}-{kind}.gguf")),
            tokenizer=str(run.path("base")),
            template=tokenizer.chat_template,
            reference=str(run.path("reference")),
            bounds=(gguf_bounds(recipe, kind).mean_divergence, gguf_bounds(recipe, kind).top1_agreement),
            questions=questions,
            answer_tokens=recipe.train.max_new_tokens,
            threads=cores(),
        )
        found = measured(task)
        found.comparison.measures["fallbacks"] = run.receipt("gguf").metrics[kind]["fallbacks"]
        found.comparison.measures |= without_imatrix(run, recipe.gguf.full, task, found)
        comparisons.append(found.comparison)
        own += found.own
        if found.answers:
            answers[kind] = found.answers
    lose_facts(comparisons, answers, questions, recipe.gguf.full)
    write_comparisons(run.path("compare.jsonl"), comparisons)
    write_answers(run.path("compare-answers.jsonl"), questions, answers)
    write_own_answers(run.path("compare-greedy.jsonl"), own)
    return Made(
        outputs=[run.path("compare.jsonl"), run.path("compare-answers.jsonl"), run.path("compare-greedy.jsonl")],
        metrics={"passed": {row.name: not row.problems for row in comparisons}}
        | recommend(recipe, comparisons, free_bytes()),
        packages=PACKAGES,
    )


def questions_of(run: Run, tokenizer: Any) -> list[dict[str, Any]]:
    """The held-out questions: `question`, `prompt` as the template renders it, `facts`."""
    return [
        {
            "question": row["messages"][-1]["content"],
            "prompt": rendered(tokenizer, row["messages"], prompt=True),
            "facts": row["facts"],
        }
        for row in heldout(run.path("data"))
    ]


def without_imatrix(run: Run, full: str, task: Task, found: Found) -> dict[str, float]:
    """The mean divergence of the same type rounded without the importance matrix, if it was rounded with one."""
    if not found.comparison.measures.get("imatrix") or found.comparison.problems or task.kind in NEEDS_IMATRIX:
        return {}
    log.info("compare: %s without its importance matrix", task.kind)
    folder = fresh_folder(run.path(".compare.tmp"))
    try:
        plain = folder / f"{task.kind}.gguf"
        quantize(run.path("gguf", f"{run.name}-{full}.gguf"), plain, task.kind)
        other = measured(replace(task, path=str(plain), only_divergence=True)).comparison.measures
    finally:
        remove(folder)
    return {"divergence_mean_without_imatrix": other["divergence_mean"]} if "divergence_mean" in other else {}


def lose_facts(
    comparisons: list[Comparison], answers: dict[str, list[str]], questions: list[dict[str, Any]], full: str
) -> None:
    """Add the share of key facts that each type lost against the unquantized file, and its standard error."""

    def hits(kind: str) -> list[bool]:
        pairs = zip(answers[kind], questions, strict=True)
        return [hit for answer, question in pairs for hit in facts_in(answer, question)]

    for row in comparisons:
        if row.name in answers and full in answers:
            row.measures["facts_loss"], row.measures["facts_loss_error"] = loss(hits(full), hits(row.name))


def loss(wanted: list[bool], found: list[bool]) -> tuple[float, float]:
    """(share of the key facts that are lost, less those that are won; its standard error), fact by fact."""
    changes = [int(before) - int(after) for before, after in zip(wanted, found, strict=True)]
    count = max(len(changes), 1)
    mean = sum(changes) / count
    spread = sum((change - mean) ** 2 for change in changes) / max(count - 1, 1)
    return round(mean, 4), round(math.sqrt(spread / count), 4)


def write_answers(path: Path, questions: list[dict[str, Any]], answers: dict[str, list[str]]) -> None:
    """A line a question: what each type answers, and whether that has every key fact."""
    lines = []
    for number, question in enumerate(questions):
        given = {kind: found[number] for kind, found in answers.items()}
        correct = {kind: all(facts_in(answer, question)) for kind, answer in given.items()}
        row = {"question": question["question"], "facts": question["facts"], "answers": given, "correct": correct}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def recommend(recipe: Recipe, rows: list[Comparison], free_bytes: int) -> dict[str, Any]:
    """`recommended` (a type), `rule` (a sentence) and `reasons` (of each type, why it is or is not the one)."""
    knobs = recipe.gguf
    rule = (
        f"the smallest type whose mean divergence is at most {knobs.recommended_max_kl:g} nats, that loses at most "
        f"{knobs.recommended_loss:.0%} of the key facts beyond the standard error, and whose file and cache fit "
        f"{free_bytes / 1e9:.1f} GB of free memory"
    )
    files = {row.name: row for row in rows if row.name in knobs.written}
    against = {name: objections(recipe, row, free_bytes) for name, row in files.items()}
    by_size = sorted(files, key=lambda name: files[name].measures.get("bytes", math.inf))
    usable = [name for name in by_size if not files[name].problems and "divergence_mean" in files[name].measures]
    best = next((name for name in usable if not against[name]), None)
    reasons = {name: "; ".join(found) or f"larger than {best}" for name, found in against.items()}
    if best:
        reasons[best] = "the smallest within the bounds"
    elif usable:
        best = min(usable, key=lambda name: files[name].measures["divergence_mean"])
        reasons[best] += "; no type is within the bounds, and this one has the least divergence"
    return {"recommended": best, "rule": rule, "reasons": reasons}


def objections(recipe: Recipe, row: Comparison, free_bytes: int) -> list[str]:
    """Why a type is not to be served: faults, divergence, lost key facts, memory."""
    knobs, found, measures = recipe.gguf, [], row.measures
    if row.problems:
        found.append(f"failed: {row.problems[0]}")
    divergence = measures.get("divergence_mean")
    if divergence is not None and not divergence <= knobs.recommended_max_kl:
        found.append(f"divergence {divergence:.2g} > {knobs.recommended_max_kl:g}")
    lost, error = measures.get("facts_loss", 0.0), measures.get("facts_loss_error", 0.0)
    if not lost - error <= knobs.recommended_loss:
        found.append(f"loses {lost:.0%} ± {error:.0%} of the key facts, allowed {knobs.recommended_loss:.0%}")
    cache = measures.get("cache_bytes_per_token", 0) * recipe.serve.context * recipe.serve.slots
    needed = measures.get("bytes", 0) + cache
    if needed > free_bytes:
        found.append(f"needs {needed / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free")
    return found


if __name__ == "__main__":
    command("compare", compare)
