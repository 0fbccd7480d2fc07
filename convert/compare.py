"""Compare the merged weights and each GGUF with the reference:  python -m convert.compare RECIPE

Everything that conversion can lose is looked for: the chat template, token ids, the stop token, the weights.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.comparison import (
    UNREADABLE,
    Found,
    Logits,
    Task,
    check_stops,
    check_template,
    compare_text,
    measure,
    measured,
    reason,
    shown_by,
)
from convert.evaluator import Asked
from convert.quantizer import quantize
from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fresh_folder, remove, write_whole
from pipeline.machine import cores, free_bytes
from pipeline.model import load, logits, precision_to_ask
from pipeline.proof import Bounds, Comparison, compare_tokens, write_comparisons
from pipeline.recipe import NEEDS_IMATRIX, QUANTIZATIONS
from pipeline.recommend import loss, recommend
from pipeline.reference import Reference, read_reference
from pipeline.rows import heldout, rendered
from pipeline.scores import facts_in

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")
BITS_OF_BOUND = 4.5
LEAST_SAYING_BITS = 2.5  # from here down the most likely token proves nothing


def compare(recipe: Recipe, run: Run) -> Made:
    """Write `compare.jsonl`, a comparison a line, and `compare-answers.jsonl`, a held-out question a line.

    A failed comparison is a result here; `make prove` judges. The receipt's metrics recommend a type.
    """
    from transformers import AutoTokenizer

    reference = read_reference(run.path("reference"))
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    questions = questions_of(run, tokenizer)
    comparisons, answers = [compare_merged(recipe, run, reference)], {}
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
        if found.answers:
            answers[kind] = found.answers
    lose_facts(comparisons, answers, questions, recipe.gguf.full)
    write_comparisons(run.path("compare.jsonl"), comparisons)
    write_answers(run.path("compare-answers.jsonl"), questions, answers)
    return Made(
        outputs=[run.path("compare.jsonl"), run.path("compare-answers.jsonl")],
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


def merged_bounds(recipe: Recipe) -> Bounds:
    """Those of the type that the merged weights were rounded to."""
    knobs = recipe.prove
    rounded = recipe.merge.precision == "bfloat16"
    return Bounds(knobs.bfloat16_max_kl if rounded else knobs.merged_max_kl, knobs.full_min_agreement)


def gguf_bounds(recipe: Recipe, kind: str) -> Bounds:
    """Those of an unquantized type, or of a quantization by its bits."""
    knobs = recipe.prove
    if kind in ("F16", "F32"):
        rounded = merged_bounds(recipe).mean_divergence
        return Bounds(max(knobs.full_max_kl, rounded), knobs.full_min_agreement)
    if kind == "BF16":
        return Bounds(knobs.bfloat16_max_kl, knobs.full_min_agreement)
    # Measured on SmolLM2-135M: 0.003 for Q8_0, 0.008 Q6_K, 0.05 Q4_K_M, 0.3 Q2_K: about e times more for a bit less.
    less = BITS_OF_BOUND - QUANTIZATIONS[kind]
    # At two bits a small model may say anything at all, with no fault but the type.
    share = min(1.0, max(0.0, 1 - less / (BITS_OF_BOUND - LEAST_SAYING_BITS)))
    return Bounds(knobs.quantized_max_kl * math.exp(less), knobs.quantized_min_agreement * share)


def compare_merged(recipe: Recipe, run: Run, reference: Reference) -> Comparison:
    """The merged folder in transformers: template, token ids, logits, perplexity, where it stops."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    log.info("compare: merge")
    start, folder = time.monotonic(), run.path("merged")
    comparison = Comparison("merge")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load(folder, precision_to_ask(recipe))
        show = shown_by(tokenizer)
        check_template(comparison, tokenizer.chat_template or "")
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the weights fewer")
        for probe in reference.probes:
            prompt = rendered(tokenizer, probe.messages, probe.tools, prompt=True)
            if not compare_text(comparison, "chat template", probe.name, prompt, probe.prompt):
                break
            if not compare_tokens(comparison, probe, tokenizer(prompt, add_special_tokens=False)["input_ids"], show):
                break
        stops = model.generation_config.eos_token_id
        check_stops(comparison, reference, stops if isinstance(stops, list) else [stops])
        measure(comparison, reference, logits_of(model), merged_bounds(recipe), show)
    except (*UNREADABLE, SafetensorError) as error:
        comparison.problems.append(f"{folder} cannot be used: {reason(error)}")
    comparison.measures["seconds"] = round(time.monotonic() - start, 2)
    return comparison


def logits_of(model: Any) -> Logits:
    """The model's logits at the positions asked for."""

    def asked_for(asked: Iterable[Asked]) -> Iterator[Any]:
        for ids, positions in asked:
            found = logits(model, ids, positions[0])
            yield found[[position - positions[0] for position in positions]].numpy()

    return asked_for


if __name__ == "__main__":
    command("compare", compare)
