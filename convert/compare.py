"""Compare the merged weights and each GGUF with the reference:  python -m convert.compare RECIPE

Everything that conversion can lose is looked for: the chat template, token ids, the stop token, the weights.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.comparison import Found, Task, gguf_bounds, measured, merged_bounds
from convert.quantizer import quantize
from convert.weights import compare_weights
from pipeline import Made, Recipe, Run, command
from pipeline.files import fresh_folder, remove, write_whole
from pipeline.machine import cores, free_bytes
from pipeline.model import precision_to_ask
from pipeline.own_answers import write_own_answers
from pipeline.proof import Comparison, write_comparisons
from pipeline.recipe import NEEDS_IMATRIX
from pipeline.recommend import loss, recommend
from pipeline.reference import read_reference
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


def write_answers(path: Path, questions: list[dict[str, Any]], answers: dict[str, list[str]]) -> None:
    """A line a question: what each type answers, and whether that has every key fact."""
    lines = []
    for number, question in enumerate(questions):
        given = {kind: found[number] for kind, found in answers.items()}
        correct = {kind: all(facts_in(answer, question)) for kind, answer in given.items()}
        row = {"question": question["question"], "facts": question["facts"], "answers": given, "correct": correct}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


if __name__ == "__main__":
    command("compare", compare)
