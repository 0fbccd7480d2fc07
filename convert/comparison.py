"""What is asked of the merged weights and of a GGUF alike, and how their answers are compared with the reference.

Weights are asked here, a GGUF in a process of its own (`convert.measure`), which a crash of native code ends alone.
"""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.evaluator import Asked
from pipeline import Recipe, UserError
from pipeline.model import ends_of, greedy, load, load_adapter, logits
from pipeline.proof import (
    Bounds,
    Comparison,
    compare_logits,
    compare_tokens,
    divergence,
    first_difference,
    perplexity,
    same_share,
)
from pipeline.recipe import QUANTIZATIONS
from pipeline.reference import CONTINUATION_TOKENS, OwnAnswer, Reference, most_likely, own_answer
from pipeline.rows import GENERATION_TAG, rendered

# What the libraries raise for files that are damaged or do not belong together.
UNREADABLE = (UserError, OSError, ValueError, KeyError, IndexError, RuntimeError, AttributeError)
BITS_OF_BOUND = 4.5
LEAST_SAYING_BITS = 2.5  # from here down the most likely token proves nothing
CONTINUED = 8  # decoded together they cost little more than one
log = logging.getLogger("truetune")
Logits = Callable[[Iterable[Asked]], Iterable[Any]]
Ends = Callable[[int], bool]  # whether a token ends an answer
Greedy = Callable[[list[list[int]], int], list[list[int]]]  # continues sequences by so many tokens, or to their end


def asked_of(reference: Reference) -> list[Asked]:
    """The tokens of every probe, then of every validation answer, and the positions whose next token is compared."""
    probes = [(probe.sequence, range(len(probe.ids) - 1, len(probe.sequence) - 1)) for probe in reference.probes]
    answers = [(answer.ids, range(answer.first - 1, len(answer.ids) - 1)) for answer in reference.answers]
    return [(ids, list(positions)) for ids, positions in probes + answers]


def measure(
    comparison: Comparison, reference: Reference, logits: Logits, ends: Ends, bounds: Bounds, show: Any
) -> list[OwnAnswer]:
    """Logits at the probes' answers, greedy agreement, and perplexity on the validation answers.

    Returns its own greedy answers as far as they are the reference's, and with the first token that is not; one that
    `ends` an answer in this artefact ends it there.
    """
    import numpy as np

    found, shares, losses, own = {}, [], [], []
    made = iter(logits(asked_of(reference)))
    for probe in reference.probes:
        rows = next(made)
        found[probe.name] = rows[: probe.scored]
        chosen = rows.argmax(-1).tolist()
        shares.append(same_share(chosen, probe.continuation))
        at = first_difference(chosen, probe.continuation)
        kept = chosen if at is None else chosen[: at + 1]
        end = next((i + 1 for i, token in enumerate(kept) if ends(token)), None)
        kept = kept[:end]
        own.append(OwnAnswer(comparison.name, probe.name, kept, end is not None, most_likely(rows[: len(kept)])))
    compare_logits(comparison, reference, found, bounds, show)
    if reference.base is not None and "divergence_mean" in comparison.measures:
        each = np.concatenate([found[probe.name] for probe in reference.probes])
        width = min(each.shape[-1], reference.base.shape[-1])
        from_base = divergence(reference.base[:, :width], each[:, :width])
        comparison.measures["divergence_from_base"] = float(from_base.mean())
    if "divergence_mean" not in comparison.measures:
        return []
    comparison.measures["probes"] = len(shares)
    comparison.measures["greedy_agreement"] = shares.count(1) / len(shares)
    comparison.measures["greedy_share"] = sum(shares) / len(shares)
    if reference.answers:
        losses = [negative_likelihood(next(made), answer.ids[answer.first :]) for answer in reference.answers]
        sizes = [len(answer.ids) - answer.first for answer in reference.answers]
        value, error = perplexity(losses, sizes)
        trained, _ = perplexity([answer.loss for answer in reference.answers], sizes)
        comparison.measures |= {"perplexity": value, "perplexity_error": error, "trained_perplexity": trained}
    return own


def continued(begun: list[OwnAnswer], reference: Reference, logits: Logits, greedy: Greedy) -> list[OwnAnswer]:
    """The answers that `measure` began, the first CONTINUED of those that leave the reference's to their end."""
    left = [
        (probe.ids, own) for probe, own in zip(reference.probes, begun, strict=True) if own.tokens != probe.continuation
    ]
    # The last token is asked for again: what comes next needs it, and whoever continues begins with a choice.
    more = greedy([ids + own.tokens[:-1] for ids, own in left], CONTINUATION_TOKENS)
    made, asked = {own.probe: own for own in begun}, []
    for (ids, own), tokens in zip(left, more, strict=True):
        if tokens[:1] == own.tokens[-1:]:  # else a tie fell otherwise, and no more is known
            tokens = (own.tokens[:-1] + tokens)[:CONTINUATION_TOKENS]
            made[own.probe] = replace(own, tokens=tokens, ended=len(tokens) < CONTINUATION_TOKENS)
            first = len(ids) - 1
            asked.append((own.probe, (ids + tokens[:-1], list(range(first + len(own.tokens), first + len(tokens))))))
    asked = [(name, sequence) for name, sequence in asked if sequence[1]]
    for (name, _), rows in zip(asked, logits(sequence for _, sequence in asked), strict=True):
        made[name].top.extend(most_likely(rows))
    return [made[own.probe] for own in begun]


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


def negative_likelihood(rows: Any, tokens: list[int]) -> float:
    """Of the tokens, each by its row of logits, summed, in nats; exponentials in float32 are exact enough to add up."""
    import numpy as np

    rows = rows - rows.max(-1, keepdims=True)
    chosen = rows[np.arange(len(rows)), tokens]
    return float(np.log(np.exp(rows).sum(-1, dtype=np.float64)).sum() - chosen.sum(dtype=np.float64))


def shown_by(tokenizer: Any) -> Callable[[int], str]:
    """A token as a message shows it: its text and its id."""
    return lambda token: f"{tokenizer.decode([token], skip_special_tokens=False)!r} ({token})"


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


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
        known = [stop for stop in stops if stop is not None]
        comparison.problems.append(
            f"stop token: the trained model ends its turn with {lost}, this one stops at {known}"
        )
    comparison.measures["stops"] = not lost


@dataclass(frozen=True)
class Task:
    """What to ask of which file; `questions` are prompts with key facts, `threads` 0 takes every core.

    `only_divergence` asks the probes alone.
    """

    kind: str
    path: str
    tokenizer: str
    template: str
    reference: str
    bounds: tuple[float, float]
    questions: list[dict[str, Any]] = field(default_factory=list)
    answer_tokens: int = 0
    threads: int = 0
    only_divergence: bool = False


@dataclass
class Found:
    """The comparison, the answers to the questions and to the probes, or none if the file cannot be used."""

    comparison: Comparison
    answers: list[str] = field(default_factory=list)
    own: list[OwnAnswer] = field(default_factory=list)


def compare_weights(
    name: str, folder: Path, precision: str, bounds: Bounds, reference: Reference, base: Path | None = None
) -> Found:
    """The comparison, and what the weights answer to the probes by themselves, asked in `precision`.

    With a `base` the folder holds an adapter for it.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    start = time.monotonic()
    comparison = Comparison(name)
    found = Found(comparison)
    try:
        speaks = base if base and not (folder / "tokenizer_config.json").is_file() else folder
        tokenizer = AutoTokenizer.from_pretrained(speaks)
        model = load_adapter(folder, base, len(tokenizer), precision) if base else load(folder, precision)
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
        stops = ends_of(model)
        check_stops(comparison, reference, stops)
        begun = measure(comparison, reference, logits_of(model), stops.__contains__, bounds, show)
        if begun:
            found.own = continued(
                begun, reference, logits_of(model), lambda prompts, most: greedy(model, tokenizer, prompts, most)
            )
    except (*UNREADABLE, SafetensorError) as error:
        comparison.problems.append(f"{folder} cannot be used: {reason(error)}")
    comparison.measures["seconds"] = round(time.monotonic() - start, 2)
    return found


def logits_of(model: Any) -> Logits:
    """The model's logits at the positions asked for."""

    def asked_for(asked: Iterable[Asked]) -> Iterator[Any]:
        for ids, positions in asked:
            found = logits(model, ids, positions[0])
            yield found[[position - positions[0] for position in positions]].numpy()

    return asked_for


def measured(task: Task) -> Found:
    """What a process of its own finds; its death is a problem of the file."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "task.json"), Path(folder, "found.json")
        given.write_text(json.dumps(asdict(task)), encoding="utf-8")
        words, status = _run([sys.executable, "-m", "convert.measure", str(given), str(made)])
        if made.is_file():
            row = json.loads(made.read_text(encoding="utf-8"))
            return Found(Comparison(**row["comparison"]), row["answers"], [own_answer(own) for own in row["own"]])
    how = f"signal {-status}" if status < 0 else f"status {status}"
    says = next((f" ({word})" for word in words if "ASSERT" in word or "rror" in word), "")
    return Found(Comparison(task.kind, {}, [f"{task.path} cannot be used: what reads it ended with {how}{says}"]))


def _run(command: list[str]) -> tuple[list[str], int]:
    """(what it wrote to standard error but for its progress, which is shown; its exit status)."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    words = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True, errors="replace") as process:
        assert process.stderr
        try:
            for line in process.stderr:
                if line.startswith("prove:"):
                    log.info("%s", line.rstrip())
                else:
                    words.append(line.strip())
        except BaseException:
            process.kill()
            raise
    return words, process.returncode
