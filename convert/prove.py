"""Compare the merged weights and each GGUF with the reference:  python -m convert.prove RECIPE

Everything that conversion can lose is looked for: the chat template, token ids, the stop token, the weights.
"""

import logging
import time
from pathlib import Path
from typing import Any

from convert.evaluator import Evaluator
from convert.header import read_header
from recipe import Made, Recipe, Run, command
from recipe.proof import Bounds, Comparison, compare_logits, compare_tokens, perplexity, write_comparisons
from recipe.reference import Reference, read_reference

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")


def parity(recipe: Recipe, run: Run) -> Made:
    """Write `parity.jsonl`, one comparison a line; a failed comparison is a result here, `make prove` judges."""
    reference = read_reference(run.path("reference"))
    knobs = recipe.prove
    full = Bounds(knobs.full_divergence, knobs.full_agreement)
    quantized = Bounds(knobs.quantized_divergence, knobs.quantized_agreement)
    comparisons = [prove_merged(run, reference, Bounds(knobs.merged_divergence, knobs.full_agreement))]
    for kind in (recipe.gguf.full, *(kind for kind in recipe.gguf.types if kind != recipe.gguf.full)):
        log.info("prove: %s", kind)
        path = run.path("gguf", f"{run.name}-{kind}.gguf")
        bounds = full if kind in ("F32", "F16", "BF16") else quantized
        comparisons.append(prove_gguf(kind, path, run, reference, bounds))
    write_comparisons(run.path("parity.jsonl"), comparisons)
    metrics = {comparison.name: not comparison.problems for comparison in comparisons}
    return Made(outputs=[run.path("parity.jsonl")], metrics=metrics, packages=PACKAGES)


def prove_merged(run: Run, reference: Reference, bounds: Bounds) -> Comparison:
    """The merged folder in transformers: template, token ids, logits, perplexity, where it stops."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("prove: merge")
    comparison = Comparison("merge")
    tokenizer = AutoTokenizer.from_pretrained(run.path("merged"))
    model = AutoModelForCausalLM.from_pretrained(run.path("merged"), dtype=torch.float32).eval()

    def show(token: int) -> str:
        return repr(tokenizer.decode([token]))

    for probe in reference.probes:
        prompt = tokenizer.apply_chat_template(probe.messages, tokenize=False, add_generation_prompt=True)
        if not compare_text(comparison, "chat template", probe.name, prompt, probe.prompt):
            break
        if not compare_tokens(comparison, probe, tokenizer(prompt, add_special_tokens=False)["input_ids"], show):
            break
    stops = model.generation_config.eos_token_id
    check_stops(comparison, reference, stops if isinstance(stops, list) else [stops])

    def logits(ids: list[int], positions: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, positions].float().numpy()

    measure(comparison, reference, logits, bounds, show)
    return comparison


def prove_gguf(kind: str, path: Path, run: Run, reference: Reference, bounds: Bounds) -> Comparison:
    """A GGUF in llama.cpp: template, token ids, logits, perplexity, where it stops."""
    from transformers import AutoTokenizer

    start = time.monotonic()
    comparison = Comparison(kind)
    header = read_header(path)
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))

    def show(token: int) -> str:
        return repr(tokenizer.decode([token]))

    compare_text(comparison, "chat template", "file", header.chat_template or "", tokenizer.chat_template)
    check_stops(comparison, reference, [header.eos_token_id])
    longest = max(*(len(p.sequence) for p in reference.probes), *(len(a.ids) for a in reference.answers), 1)
    with Evaluator(path, longest) as evaluator:
        for probe in reference.probes:
            if not compare_tokens(comparison, probe, evaluator.tokens(probe.prompt), show):
                break
        measure(comparison, reference, evaluator.logits, bounds, show)
    comparison.measures |= {"bytes": path.stat().st_size, "seconds": round(time.monotonic() - start, 2)}
    return comparison


def measure(comparison: Comparison, reference: Reference, logits: Any, bounds: Bounds, show: Any) -> None:
    """Logits at the probes' answers, greedy agreement, and perplexity on the validation answers."""
    import numpy as np

    found, greedy = {}, 0
    for probe in reference.probes:
        answered = list(range(len(probe.ids) - 1, len(probe.sequence) - 1))
        all_logits = logits(probe.sequence, answered)
        found[probe.name] = all_logits[: probe.scored]
        greedy += all_logits.argmax(-1).tolist() == probe.continuation
    compare_logits(comparison, reference, found, bounds, show)
    losses = []
    for answer in reference.answers:
        rows = logits(answer.ids, list(range(answer.first - 1, len(answer.ids) - 1))).astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(rows)), answer.ids[answer.first :]]
        losses.append(float((np.log(np.exp(rows).sum(-1)) - chosen).sum()))
    value, error = perplexity(losses, [len(answer.ids) - answer.first for answer in reference.answers])
    trained, _ = perplexity([a.loss for a in reference.answers], [len(a.ids) - a.first for a in reference.answers])
    comparison.measures |= {
        "greedy_agreement": greedy / len(reference.probes),
        "perplexity": value,
        "perplexity_error": error,
        "trained_perplexity": trained,
    }


def compare_text(comparison: Comparison, what: str, where: str, found: str, wanted: str) -> bool:
    """Whether two texts are the same bytes; the first difference becomes a problem."""
    if found == wanted:
        return True
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    comparison.problems.append(
        f"{what}: {where}, character {at}: {found[at : at + 20]!r}, trained with {wanted[at : at + 20]!r}"
    )
    return False


def check_stops(comparison: Comparison, reference: Reference, stops: list[Any]) -> None:
    """Add a problem if a token that ended an answer of the reference would not end it here."""
    ends = {probe.continuation[-1] for probe in reference.probes if probe.stopped}
    if lost := sorted(ends - set(stops)):
        comparison.problems.append(
            f"stop token: the trained model ends its turn with {lost}, this one stops at {stops}"
        )
    comparison.measures["stops"] = not lost


if __name__ == "__main__":
    command("parity", parity)
