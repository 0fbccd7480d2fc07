"""What a preference training does to held-out pairs: how likely their answers are, the margin, the divergence."""

from typing import Any

from pipeline.scores import Score, compare
from train.scoring.likelihood import Start, likelihoods
from train.template import Example

GROUP = "held-out pairs"
SIDES = (("input_ids", "labels"), ("rejected_input_ids", "rejected_labels"))
Judged = dict[str, list[float]]


def judged(model: Any, pairs: Any, what: str, start: Start | None = None) -> list[Judged]:
    """Of each pair: `chosen` and `rejected`, each [log-probability in nats, tokens], and with the `start` also
    `divergence`, [KL divergence from it in nats, summed over both answers' tokens, tokens].

    `pairs` is a dataset of `train.pairs.Pair`.
    """
    examples = [Example(row[ids], row[labels]) for ids, labels in SIDES for row in pairs]
    found = likelihoods(model, examples, what, start)
    return [
        {"chosen": [-better.loss, better.tokens], "rejected": [-worse.loss, worse.tokens]}
        | ({"divergence": [better.divergence + worse.divergence, better.tokens + worse.tokens]} if start else {})
        for better, worse in zip(found[: len(pairs)], found[len(pairs) :], strict=True)
    ]


def scores(before: list[Judged], after: list[Judged], beta: float, seed: int) -> list[Score]:
    """The measures of the same pairs before and after, with their intervals; the reward is DPO's implicit one."""

    def rewards(side: str) -> list[float]:
        """`beta` times how much likelier each answer became."""
        return [beta * (new[side][0] - old[side][0]) for old, new in zip(before, after, strict=True)]

    def of(name: str, base: list[list[float]] | None, trained: list[list[float]], **how: Any) -> Score:
        return compare(GROUP, name, base, trained, seed=seed, **how)

    def likelihood(side: str, lower_is_better: bool) -> Score:
        first, second = ([[pair[side][0], 1.0] for pair in pairs] for pairs in (before, after))
        how: dict[str, Any] = {"lower_is_better": lower_is_better, "note": "nats an answer"}
        return of(f"log-probability, {side}", first, second, unit="number", **how)

    def likelier(pairs: list[Judged]) -> list[list[float]]:
        means = [[pair[side][0] / pair[side][1] for side in ("chosen", "rejected")] for pair in pairs]
        return [[float(better > worse), 1.0] for better, worse in means]

    margins = [better - worse for better, worse in zip(rewards("chosen"), rewards("rejected"), strict=True)]
    growth = f"{beta:g} x (growth of the chosen answer's log-probability - of the rejected one's)"
    found = [
        of("reward margin", [[0.0, 1.0]] * len(margins), [[x, 1.0] for x in margins], unit="number", note=growth),
        of("reward accuracy", None, [[float(x > 0), 1.0] for x in margins], note="share with a margin above zero"),
        of("chosen likelier", likelier(before), likelier(after), note="a token, than the rejected one"),
        likelihood("chosen", lower_is_better=False),
        likelihood("rejected", lower_is_better=True),
    ]
    if "divergence" in after[0]:
        rows = [pair["divergence"] for pair in after]
        found.append(of("KL to the start", None, rows, unit="number", note="nats a token of both answers"))
    return found


def less_likely(found: list[Score]) -> Score | None:
    """The chosen answers' log-probability if it fell, as preference losses allow: they compare differences."""
    chosen = [score for score in found if score.name == "log-probability, chosen" and score.difference]
    return next((score for score in chosen if score.difference and score.difference.value < 0), None)
