"""What a comparison with the reference measures, where it first differs, and whether that is within its bounds."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import write_whole
from pipeline.gguf_head import Head
from pipeline.reference import Probe, Reference

RESAMPLES = 2000
# Of llama.cpp 0.3.36's graphs (src/models), by transformers' model_type: whether they normalize the weights of experts
# whatever norm_topk_prob says, which of them ignore the window that the file has, and every how many layers one that
# has a window for some attends to everything if the file does not say.
NORMALIZES = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
WITHOUT_WINDOW = ("phi3", "phimoe")
WHOLE_LAYERS = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2}
BIASES = {
    "attention_bias": ("biases of attention", "attn_q.bias", "attn_qkv.bias"),
    "mlp_bias": ("biases of the layers between", "ffn_up.bias"),
}
LARGEST_LOSS = 100.0  # nats a token; more, of a model that is lost anyway, would be no number of JSON


@dataclass(frozen=True)
class Bounds:
    """Limits of one kind of artefact."""

    mean_divergence: float
    top1_agreement: float


@dataclass
class Comparison:
    """One artefact against the reference. `problems` is empty when it is the model that was trained.

    `measures` of a GGUF, as far as they could be taken:

    - of the file: `bytes`, `bits_per_weight`, `tensors`, `fallbacks` (tensors by `WANTED -> WRITTEN`), `imatrix`
      (whether an importance matrix weighed its rounding);
    - of what it says, nats where no unit is named: `divergence_mean`, `divergence_median`, `divergence_p99`,
      `divergence_interval`, `top1_interval` (95 %, of the means, over the probes), `divergence_mean_without_imatrix`,
      `probes`, `top1_agreement`, `greedy_agreement`, `perplexity`, `perplexity_error`,
      `trained_perplexity`, `stops`, `facts_accuracy` (share of the key facts), `facts_of` (held-out questions),
      `facts_loss` (share that the unquantized file has and this one has not), `facts_loss_error` (its standard error);
    - of a server's answers: `too_long` (for the context), `changed_again` (how many are others when their
      prompt is cached), `changed_beside` (when it is evaluated beside others), `moved_again`, `moved_beside` (the most
      that a log-probability of the rest moves), `own_agreement` (share that is the served file's own, but for near
      ties), `divergence_from_file` (of the probabilities that it tells from the file's own);
    - of this machine: `prompt_tokens_per_second`, `decode_tokens_per_second`, `peak_rss_bytes` (of loading and asking
      it), `cache_bytes_per_token` (of a server's cache), `seconds`.
    """

    name: str
    measures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def write_comparisons(path: Path, comparisons: list[Comparison]) -> None:
    """One comparison a line."""
    write_whole(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in comparisons))


def read_comparisons(path: Path) -> list[Comparison]:
    """What `write_comparisons` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Comparison(**json.loads(line)) for line in file]


def first_difference(found: Sequence[Any], wanted: Sequence[Any]) -> int | None:
    """Index of the first token that differs, None if both are the same."""
    for index, (mine, other) in enumerate(zip(found, wanted, strict=False)):
        if mine != other:
            return index
    return None if len(found) == len(wanted) else min(len(found), len(wanted))


def same_share(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """How much of an answer comes before its first difference; 1 if it is the same."""
    index = first_difference(found, wanted)
    return 1.0 if index is None else index / max(len(wanted), 1)


def compare_tokens(comparison: Comparison, probe: Probe, found: list[int], show: Any) -> bool:
    """Whether the prompt's tokens are the reference's; `show` turns a token id into text for the message."""
    index = first_difference(found, probe.ids)
    if index is None:
        return True
    if found[1:] == probe.ids:  # also where it stands there twice
        added = f"{show(found[0])} is added before all that it was trained with"
        comparison.problems.append(f"token ids: probe '{probe.name}', position 0: {added}")
        return False
    mine = show(found[index]) if index < len(found) else "nothing"
    wanted = show(probe.ids[index]) if index < len(probe.ids) else "nothing"
    comparison.problems.append(f"token ids: probe '{probe.name}', position {index}: {mine}, trained with {wanted}")
    return False


def compare_logits(
    comparison: Comparison, reference: Reference, found: dict[str, Any], bounds: Bounds, show: Any
) -> None:
    """Add divergence, agreement and error of the probes' logits, judged by the bounds.

    `found` maps a probe's name to its (scored, vocabulary) logits. The Kullback-Leibler divergence is that of the
    found distribution from the reference's, in nats a token.
    """
    import numpy as np

    if not _usable(comparison, reference, found):
        return
    divergences, agreements, squared, norm = [], [], 0.0, 0.0
    first = None
    for probe in reference.probes:
        wanted, mine = reference.logits_of(probe), found[probe.name]
        width = min(wanted.shape[-1], mine.shape[-1])  # a GGUF may pad its vocabulary
        divergences.append(divergence(wanted[:, :width], mine[:, :width]))
        same = wanted.argmax(-1) == mine.argmax(-1)
        agreements.append(same)
        squared += float(((wanted[:, :width] - mine[:, :width]) ** 2).sum())
        norm += float((wanted[:, :width] ** 2).sum())
        if first is None and not same.all():
            at = int(np.argmin(same))
            pair = f"{show(int(mine[at].argmax()))}, trained {show(int(wanted[at].argmax()))}"
            first = f"probe '{probe.name}', answer position {at}: {pair}"
    each = np.concatenate(divergences)
    spread = {
        "divergence_interval": interval([row.tolist() for row in divergences]),
        "top1_interval": interval([row.tolist() for row in agreements]),
    }
    measured: dict[str, float] = {
        "divergence_mean": float(each.mean()),
        "divergence_median": float(np.median(each)),
        "divergence_p99": float(np.quantile(each, 0.99)),
        "top1_agreement": float(np.concatenate(agreements).mean()),
        "relative_error": math.sqrt(squared / norm),
    }
    comparison.measures |= measured | spread | {"first_difference": first}
    where = f"; first at {first}" if first else ""
    if not measured["divergence_mean"] <= bounds.mean_divergence:
        comparison.problems.append(
            f"logits: mean divergence {measured['divergence_mean']:.3g}, allowed {bounds.mean_divergence:g}{where}"
        )
    if not measured["top1_agreement"] >= bounds.top1_agreement:
        comparison.problems.append(
            f"logits: most likely token agrees in {measured['top1_agreement']:.1%}, "
            f"wanted {bounds.top1_agreement:.0%}{where}"
        )


def interval(probes: list[list[float]]) -> tuple[float, float]:
    """Of a mean over all positions the 95 % interval, by drawing whole probes again: positions of one are not
    independent (the percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    import numpy as np

    sums = np.array([float(sum(values)) for values in probes])
    counts = np.array([len(values) for values in probes])
    drawn = np.random.default_rng(0).integers(len(probes), size=(RESAMPLES, len(probes)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def in_words(row: Comparison) -> str:
    """What a person needs to know of an artefact: how many answers it changes, and whether it loses key facts."""
    measures = row.measures
    if "greedy_agreement" not in measures or not measures.get("probes"):
        return ""
    changed = round((1 - measures["greedy_agreement"]) * measures["probes"])
    asked = f"{changed} of {measures['probes']}"
    if not changed:
        words = f"{row.name} changes no answer ({asked})"
    elif 2 * changed < measures["probes"]:
        words = f"{row.name} changes 1 answer in {measures['probes'] / changed:.0f} ({asked})"
    else:
        words = f"{row.name} changes most answers ({asked})"
    if "facts_loss" in measures:
        lost = measures["facts_loss"]
        return f"{words}; none of the key facts" if lost <= 0 else f"{words}, and loses {lost:.0%} of the key facts"
    return words


def in_figures(row: Comparison) -> str:
    """How far an artefact is from its reference, with 95 % intervals over the probes, as far as that was measured."""
    from pipeline.scores import wilson

    measures, found = row.measures, []
    if "divergence_interval" in measures:
        low, high = measures["divergence_interval"]
        mean = measures["divergence_mean"]
        found.append(f"KL divergence {mean:.2g} nats a token (95 % interval {low:.2g} to {high:.2g})")
    if "top1_interval" in measures:
        low, high = measures["top1_interval"]
        found.append(f"the same most likely token in {measures['top1_agreement']:.1%} ({low:.1%} to {high:.1%})")
    if "greedy_agreement" in measures and measures.get("probes"):
        changed = round((1 - measures["greedy_agreement"]) * measures["probes"])
        share = wilson(changed, measures["probes"])
        found.append(f"{share.value:.0%} of greedy answers change ({share.low:.0%} to {share.high:.0%})")
    return f"{row.name}: {', '.join(found)}" if found else ""


def badge(answer: str) -> str:
    """An SVG for a model card, which asks no other site; the answer is `yes` or `no`."""
    return BADGE.format(says=SAYS[answer], colour={"yes": "#2e7d32", "no": "#c62828"}[answer])


SAYS = {"yes": "same model", "no": "another model"}
BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="160" height="20" role="img" aria-label="proof: {says}">
<rect width="50" height="20" fill="#555"/><rect x="50" width="110" height="20" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,sans-serif" font-size="11" text-anchor="middle">
<text x="25" y="14">proof</text><text x="105" y="14">{says}</text></g></svg>
"""


def suspects(config: dict[str, Any], head: Head | None = None) -> str:
    """What a model's config.json has that its GGUF, by its `head`, does not carry, for the message of a difference.

    Without a head, or if that carries everything, what converters and runtimes are known to lose.
    """
    config = config.get("text_config", config)
    family, layers = config.get("model_type", ""), config.get("layer_types") or ["sliding_attention"]
    values, tensors = (head.values, "\n".join(head.tensors)) if head else ({}, "")
    found: dict[str, bool] = {}  # what the config has, and whether that is carried
    if config.get("sliding_window") and config.get("use_sliding_window", True) and "sliding_attention" in layers:
        stated = {key.rpartition(".")[2]: value for key, value in values.items() if ".attention.sliding_" in key}
        found["a sliding window"] = bool(stated.get("sliding_window")) and family not in WITHOUT_WINDOW
        every = WHOLE_LAYERS.get(family)
        usual = [bool(every and at % every) for at in range(1, len(layers) + 1)]
        if "layer_types" in config and every and [kind == "sliding_attention" for kind in layers] != usual:
            found["windows on other layers than released models"] = "sliding_window_pattern" in stated
    normalized = config.get("norm_topk_prob")
    if normalized is not None and normalized != NORMALIZES.get(family, False):
        found[f"weights of experts that are {'' if normalized else 'not '}normalized"] = family not in NORMALIZES
    for key, (words, *names) in BIASES.items():
        if config.get(key):
            found[words] = any(name in tensors for name in names)
    scaling = next((value for key, value in values.items() if key.endswith(".rope.scaling.type")), "none")
    for kind in scaled_ropes(config):
        found[f"a rope scaling ({kind})"] = scaling != "none" or "rope_f" in tensors
    lost = [words for words, carried in found.items() if not carried]
    if head and lost:
        return f"its config has {' and '.join(lost)}, which the GGUF or llama.cpp does not carry"
    return f"its config has {' and '.join(found)}, which may be what is lost" if found else ""


def scaled_ropes(config: dict[str, Any]) -> list[str]:
    """The kinds of rope of a config, of each sort of layer where they differ, that are not the plain one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    ropes = [rope, *rope.values()] if isinstance(rope, dict) else []
    kinds = [str(of.get("rope_type", of.get("type", "default"))) for of in ropes if isinstance(of, dict)]
    return sorted({*kinds} - {"default"})


def _usable(comparison: Comparison, reference: Reference, found: dict[str, Any]) -> bool:
    """Whether there are finite logits of every token that the model was trained with; what is wrong is a problem."""
    import numpy as np

    for probe in reference.probes:
        tokens = found[probe.name].shape[-1]
        if tokens < reference.logits.shape[-1]:
            comparison.problems.append(f"vocabulary: {tokens} tokens, trained with {reference.logits.shape[-1]}")
            return False
        if not np.isfinite(found[probe.name]).all():
            comparison.problems.append(
                f"logits: probe '{probe.name}' has some that are no finite numbers: a weight is damaged or too large"
            )
            return False
    return True


def divergence(wanted: Any, found: Any) -> Any:
    """Kullback-Leibler divergence of each row's softmax, in nats."""
    import numpy as np

    def log_softmax(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    wanted, found = log_softmax(wanted), log_softmax(found)
    return np.maximum((np.exp(wanted) * (wanted - found)).sum(-1), 0.0)


def perplexity(losses: list[float], tokens: list[int]) -> tuple[float, float]:
    """(perplexity, its standard error) from summed losses and token counts of answers; the error by answers' spread."""
    total, count = sum(losses), sum(tokens)
    mean = total / count
    spread = sum((loss - mean * size) ** 2 for loss, size in zip(losses, tokens, strict=True))
    error = math.sqrt(spread * len(losses) / max(len(losses) - 1, 1)) / count
    value = math.exp(min(mean, LARGEST_LOSS))
    return value, value * error
