"""Compare the merged weights and each GGUF with the reference:  python -m convert.prove RECIPE

Everything that conversion can lose is looked for: the chat template, token ids, the stop token, the weights.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from convert.evaluator import Asked, Evaluator
from convert.header import Header, read_header
from convert.llamacpp import file_type
from convert.model import load
from recipe import Made, Recipe, Run, UserError, command
from recipe.proof import Bounds, Comparison, compare_logits, compare_tokens, perplexity, same_share, write_comparisons
from recipe.reference import Reference, read_reference
from recipe.schema import QUANTIZATIONS

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "numpy")
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What the libraries raise for files that are damaged or do not belong together.
UNREADABLE = (UserError, OSError, ValueError, KeyError, IndexError, RuntimeError, AttributeError)
BITS_OF_BOUND = 4.5
LEAST_BITS = 0.8  # of what the type has in Llama 3 8B; a tensor that falls back takes more, never less
Logits = Callable[[Iterable[Asked]], Iterable[Any]]


def parity(recipe: Recipe, run: Run) -> Made:
    """Write `parity.jsonl`, one comparison a line; a failed comparison is a result here, `make prove` judges."""
    from transformers import AutoTokenizer

    reference = read_reference(run.path("reference"))
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    comparisons = [prove_merged(recipe, run, reference)]
    for kind in (recipe.gguf.full, *(kind for kind in recipe.gguf.types if kind != recipe.gguf.full)):
        log.info("prove: %s", kind)
        path = run.path("gguf", f"{run.name}-{kind}.gguf")
        comparisons.append(prove_gguf(kind, path, tokenizer, reference, gguf_bounds(recipe, kind)))
    write_comparisons(run.path("parity.jsonl"), comparisons)
    metrics = {comparison.name: not comparison.problems for comparison in comparisons}
    return Made(outputs=[run.path("parity.jsonl")], metrics=metrics, packages=PACKAGES)


def merged_bounds(recipe: Recipe) -> Bounds:
    """Those of the type that the merged weights were rounded to."""
    knobs = recipe.prove
    rounded = recipe.merge.precision == "bfloat16"
    return Bounds(knobs.bfloat16_divergence if rounded else knobs.merged_divergence, knobs.full_agreement)


def gguf_bounds(recipe: Recipe, kind: str) -> Bounds:
    """Those of an unquantized type, or of a quantization by its bits."""
    knobs = recipe.prove
    if kind in ("F16", "F32"):
        rounded = merged_bounds(recipe).mean_divergence
        return Bounds(max(knobs.full_divergence, rounded), knobs.full_agreement)
    if kind == "BF16":
        return Bounds(knobs.bfloat16_divergence, knobs.full_agreement)
    # Measured on SmolLM2-135M: 0.003 for Q8_0, 0.008 Q6_K, 0.05 Q4_K_M, 0.3 Q2_K: about e times more for a bit less.
    allowed = knobs.quantized_divergence * min(1.0, math.exp(BITS_OF_BOUND - QUANTIZATIONS[kind]))
    return Bounds(allowed, knobs.quantized_agreement)


def prove_merged(recipe: Recipe, run: Run, reference: Reference) -> Comparison:
    """The merged folder in transformers: template, token ids, logits, perplexity, where it stops."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    log.info("prove: merge")
    start, folder = time.monotonic(), run.path("merged")
    comparison = Comparison("merge")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # A GPU may hold the rounded weights only; a processor computes in float32, whatever the files have.
        model = load(folder, recipe.merge.precision if torch.cuda.is_available() else "float32")
        show = shown_by(tokenizer)
        check_template(comparison, tokenizer.chat_template or "")
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the weights fewer")
        for probe in reference.probes:
            prompt = tokenizer.apply_chat_template(
                probe.messages, probe.tools or None, tokenize=False, add_generation_prompt=True
            )
            if not compare_text(comparison, "chat template", probe.name, str(prompt), probe.prompt):
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
    """The model's logits at the positions asked for; those before the first one are never computed."""
    import torch

    def logits(asked: Iterable[Asked]) -> Iterator[Any]:
        for ids, positions in asked:
            last = len(ids) - positions[0]
            with torch.inference_mode():
                found = model(torch.tensor([ids], device=model.device), logits_to_keep=last).logits[0].cpu()
            yield found[[position - len(ids) for position in positions]].float().numpy()

    return logits


def prove_gguf(kind: str, path: Path, tokenizer: Any, reference: Reference, bounds: Bounds) -> Comparison:
    """A GGUF in llama.cpp: type, template, token ids, logits, perplexity, where it stops."""
    start = time.monotonic()
    comparison, show = Comparison(kind), shown_by(tokenizer)
    try:
        header = read_header(path)
        check_type(comparison, kind, header)
        check_template(comparison, header.chat_template or "")
        compare_text(comparison, "chat template", "file", header.chat_template or "", tokenizer.chat_template)
        check_stops(comparison, reference, [header.eos_token_id])
        longest = max(len(ids) for ids, _ in asked_of(reference))
        with Evaluator(path, longest) as evaluator:
            for probe in reference.probes:
                if not compare_tokens(comparison, probe, evaluator.tokens(probe.prompt), show):
                    break
            measure(comparison, reference, evaluator.logits, bounds, show)
        comparison.measures["bytes"] = path.stat().st_size
    except UNREADABLE as error:
        comparison.problems.append(f"{path} cannot be used: {reason(error)}")
    comparison.measures["seconds"] = round(time.monotonic() - start, 2)
    return comparison


def asked_of(reference: Reference) -> list[Asked]:
    """The tokens of every probe, then of every validation answer, and the positions whose next token is compared."""
    probes = [(probe.sequence, range(len(probe.ids) - 1, len(probe.sequence) - 1)) for probe in reference.probes]
    answers = [(answer.ids, range(answer.first - 1, len(answer.ids) - 1)) for answer in reference.answers]
    return [(ids, list(positions)) for ids, positions in probes + answers]


def measure(comparison: Comparison, reference: Reference, logits: Logits, bounds: Bounds, show: Any) -> None:
    """Logits at the probes' answers, greedy agreement, and perplexity on the validation answers."""
    found, shares, losses = {}, [], []
    made = iter(logits(asked_of(reference)))
    for probe in reference.probes:
        rows = next(made)
        found[probe.name] = rows[: probe.scored]
        shares.append(same_share(rows.argmax(-1).tolist(), probe.continuation))
    compare_logits(comparison, reference, found, bounds, show)
    if "divergence_mean" not in comparison.measures:
        return
    comparison.measures["greedy_agreement"] = shares.count(1) / len(shares)
    comparison.measures["greedy_share"] = sum(shares) / len(shares)
    if reference.answers:
        losses = [negative_likelihood(next(made), answer.ids[answer.first :]) for answer in reference.answers]
        sizes = [len(answer.ids) - answer.first for answer in reference.answers]
        value, error = perplexity(losses, sizes)
        trained, _ = perplexity([answer.loss for answer in reference.answers], sizes)
        comparison.measures |= {"perplexity": value, "perplexity_error": error, "trained_perplexity": trained}


def negative_likelihood(rows: Any, tokens: list[int]) -> float:
    """Of the tokens, each by its row of logits, summed, in nats; exponentials in float32 are exact enough to add up."""
    import numpy as np

    rows = rows - rows.max(-1, keepdims=True)
    chosen = rows[np.arange(len(rows)), tokens]
    return float(np.log(np.exp(rows).sum(-1, dtype=np.float64)).sum() - chosen.sum(dtype=np.float64))


def shown_by(tokenizer: Any) -> Callable[[int], str]:
    """A token as a message shows it: its text and its id."""
    return lambda token: f"{tokenizer.decode([token])!r} ({token})"


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def check_type(comparison: Comparison, kind: str, header: Header) -> None:
    """Add a problem if the file says that it is of another type, or holds clearly fewer bits than its type has."""
    bits = 8 * header.tensor_bytes / header.parameters
    if header.file_type != file_type(kind):
        comparison.problems.append(f"type: llama.cpp's number {header.file_type}, that of {kind} is {file_type(kind)}")
    elif bits < LEAST_BITS * QUANTIZATIONS[kind]:
        comparison.problems.append(f"type: {bits:.2f} bits a weight, {kind} has {QUANTIZATIONS[kind]:g}")


def check_template(comparison: Comparison, template: str) -> None:
    """Add a problem for tags that only transformers knows; loaders of GGUF files refuse them."""
    if tag := GENERATION_TAG.search(template):
        comparison.problems.append(f"chat template: has {tag[0]!r}, which only training understands")


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
