"""A preference training beside its start: how likely held-out answers become, the margin, the divergence from it.

An answer's reward is the implicit one of these methods: beta times how much likelier it became (arXiv 2305.18290).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.scores import Score, as_rows, compare
from train.scoring.likelihood import Start, likelihoods
from train.template import Example
from train.tuners import base_to_train

PAIRS, ANSWERS = "held-out pairs", "held-out answers"
Judged = dict[str, list[float]]


def frozen_copy(recipe: Recipe, run: Run, model: Any) -> Any:
    """A second model, where the trained one cannot be what it was: its weights, or tokens that were added, are trained.

    None where the adapter switched off is the start exactly.

    Raises:
        UserError: the adapter changes the output layer, which TRL's fused losses would neither see nor train.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        why = f"train.lora.targets has the output layer, which {recipe.train.method} does not train"
        raise UserError(f"{why}: name other layers")
    adapters = getattr(model, "peft_config", {})
    tokens = any(config.trainable_token_indices for config in adapters.values())
    if not (tokens or recipe.train.needs_copy(recipe.train.tuner)):
        return None
    return base_to_train(recipe, run).requires_grad_(False).eval()


def drop_second_adapter(model: Any) -> None:
    """Remove the copy that TRL makes of an adapter, as if it were trained already: switched off it is the start."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")


def score_only_labels() -> None:
    """Have TRL's fused output layer take the labelled tokens alone on every device, as it does on CUDA (trl.kernels).

    Where compilers want one shape it takes all tokens; here none compiles, and prompts and padding are most of a batch.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def is_held(trainer: Any) -> bool:
    """Whether the start can be asked: not that of whole weights whose log-probabilities are precomputed."""
    return trainer.ref_model is not None or hasattr(trainer.model, "peft_config")


@contextmanager
def start(trainer: Any) -> Iterator[Any]:
    """The model at the start."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        yield trainer.model


def measured(
    trainer: Any,
    before: dict[str, Any] | None,
    group: str,
    scores: Callable[[list[Judged], list[Judged]], list[Score]],
) -> dict[str, Any]:
    """What each held-out row of the `group` got and, after training, their scores; nothing where none is held out."""
    if trainer.eval_dataset is None:
        return {}
    with trainer.autocast_smart_context_manager():
        asked_too = partial(start, trainer) if before and is_held(trainer) else None
        what = f"{group}, {'after' if before else 'before'}"
        rows = answered(trainer.model, trainer.eval_dataset, what, asked_too)
    return {"rows": rows} | ({"scores": as_rows(scores(before["rows"], rows))} if before else {})


def answered(model: Any, rows: Any, what: str, start: Start | None = None) -> list[Judged]:
    """Of each row, by the names of its sides, [log-probability of the answer in nats, tokens].

    With the `start` also `divergence`, [KL divergence from it over these tokens in nats, summed, tokens].

    `rows` is a dataset of `Pair` or of `Judgement` (train.preferences).
    """
    sides = [_sides(row) for row in rows]
    found = iter(likelihoods(model, [example for row in sides for example in row.values()], what, start))
    made = []
    for row in sides:
        each = {name: next(found) for name in row}
        judged = {name: [-one.loss, float(one.tokens)] for name, one in each.items()}
        if start:
            judged["divergence"] = [sum(getattr(one, key) for one in each.values()) for key in ("divergence", "tokens")]
        made.append(judged)
    return made


def _sides(row: dict[str, Any]) -> dict[str, Example]:
    own = Example(row["input_ids"], row["labels"])
    if "good" in row:
        return {"good" if row["good"][0] else "bad": own}
    return {"chosen": own, "rejected": Example(row["rejected_input_ids"], row["rejected_labels"])}


def scores_of_pairs(before: list[Judged], after: list[Judged], beta: float, seed: int) -> list[Score]:
    """The measures of the same pairs before and after, with their intervals."""

    def of(name: str, base: list[list[float]] | None, trained: list[list[float]], **how: Any) -> Score:
        return compare(PAIRS, name, base, trained, seed=seed, **how)

    gains = [_gain("chosen", *both) - _gain("rejected", *both) for both in zip(before, after, strict=True)]
    margins = [[beta * gain, 1.0] for gain in gains]
    growth = f"{beta:g} x (growth of the chosen answer's log-probability - of the rejected one's)"
    return [
        of("reward margin", [[0.0, 1.0]] * len(margins), margins, unit="number", note=growth),
        of("reward accuracy", None, [[float(gain > 0), 1.0] for gain in gains], note="share with a margin above zero"),
        _likelier(before, after, seed),
        _likelihood(PAIRS, "chosen", before, after, seed),
        _likelihood(PAIRS, "rejected", before, after, seed),
        *_divergence(PAIRS, after, seed),
    ]


def scores_of_odds(before: list[Judged], after: list[Judged], seed: int) -> list[Score]:
    """The measures of the same pairs before and after, where their odds are what is learned (arXiv 2403.07691)."""

    def odds(rows: list[Judged]) -> list[list[float]]:
        """The logarithm of the odds of each chosen answer over those of the rejected one, a token."""
        return [[_log_odds(*row["chosen"]) - _log_odds(*row["rejected"]), 1.0] for row in rows]

    note = "of the chosen answer's probability, a token, over the rejected one's"
    return [
        compare(PAIRS, "log odds ratio", odds(before), odds(after), unit="number", seed=seed, note=note),
        _likelier(before, after, seed),
        _likelihood(PAIRS, "chosen", before, after, seed),
        _likelihood(PAIRS, "rejected", before, after, seed),
        *_divergence(PAIRS, after, seed),
    ]


def scores_of_judgements(before: list[Judged], after: list[Judged], beta: float, seed: int) -> list[Score]:
    """The measures of the same judged answers before and after, with their intervals."""

    def rewards(name: str, side: str, **how: Any) -> list[Score]:
        found = [beta * _gain(side, *both) for both in zip(before, after, strict=True) if side in both[0]]
        rows = [[reward, 1.0] for reward in found]
        how |= {"unit": "number", "seed": seed, "note": f"{beta:g} x growth of the log-probability"}
        return [compare(ANSWERS, name, [[0.0, 1.0]] * len(rows), rows, **how)] if rows else []

    found = rewards("reward, good", "good") + rewards("reward, bad", "bad", lower_is_better=True)
    for side in ("good", "bad"):
        old, new = ([row for row in rows if side in row] for rows in (before, after))
        found += [_likelihood(ANSWERS, side, old, new, seed)] if old else []
    return [*found, *_divergence(ANSWERS, after, seed)]


def less_likely(found: list[Score]) -> Score | None:
    """The log-probability of the better answers if it fell, as preference losses allow: they compare differences."""
    better = [score for score in found if score.name in ("log-probability, chosen", "log-probability, good")]
    return next((score for score in better if score.difference and score.difference.value < 0), None)


def _gain(side: str, before: Judged, after: Judged) -> float:
    """How much likelier an answer became, in nats."""
    return after[side][0] - before[side][0]


def _log_odds(log_probability: float, tokens: float) -> float:
    mean = log_probability / tokens
    return mean - math.log(-math.expm1(min(mean, -1e-12)))


def _likelier(before: list[Judged], after: list[Judged], seed: int) -> Score:
    def rows(pairs: list[Judged]) -> list[list[float]]:
        means = [[pair[side][0] / pair[side][1] for side in ("chosen", "rejected")] for pair in pairs]
        return [[float(better > worse), 1.0] for better, worse in means]

    note = "a token, than the rejected one"
    return compare(PAIRS, "chosen likelier", rows(before), rows(after), seed=seed, note=note)


def _likelihood(group: str, side: str, before: list[Judged], after: list[Judged], seed: int) -> Score:
    first, second = ([[row[side][0], 1.0] for row in rows] for rows in (before, after))
    worse = side in ("rejected", "bad")
    how: dict[str, Any] = {"lower_is_better": worse, "seed": seed, "note": "nats an answer"}
    return compare(group, f"log-probability, {side}", first, second, unit="number", **how)


def _divergence(group: str, after: list[Judged], seed: int) -> list[Score]:
    rows = [row["divergence"] for row in after if "divergence" in row]
    note = "nats a token of the answers"
    return [compare(group, "KL to the start", None, rows, unit="number", seed=seed, note=note)] if rows else []
