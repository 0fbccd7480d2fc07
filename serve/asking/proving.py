"""Everything that a server is asked in a proof, and what is wrong with its answers."""

from pipeline.own_answers import OwnAnswer, of_trained
from pipeline.proof import Comparison, interval
from pipeline.reference import Probe, Reference
from serve.asking.judgement import (
    DOUBTFUL_DEVIATIONS,
    Own,
    as_told,
    deviations,
    divergences_of,
    drawn_otherwise,
    judge,
)
from serve.asking.probe import Answer, Engine, Told, ask_probes, drawn, limit

DRAWING_ROUNDS, ENOUGH_TOKENS = 6, 400


def prove_answers(
    comparison: Comparison, engine: Engine, reference: Reference, own: Own | None, context: int, slots: int
) -> None:
    """Ask the probes, and judge the answers by the artefact's own."""
    found = ask_probes(comparison, engine, reference.probes, context, slots)
    if comparison.problems or not own:
        return
    judge(comparison, found, own, engine.text)
    compare_probabilities(comparison, found, of_trained(reference))
    probes = [probe for probe, _, _ in found]
    tokens: list[Told] = []
    for round_number in range(DRAWING_ROUNDS):
        if comparison.problems or (len(tokens) > ENOUGH_TOKENS and deviations(tokens) < DOUBTFUL_DEVIATIONS):
            break
        tokens += drawn(engine, probes, context, slots, seed=round_number * len(probes))
        comparison.problems += filter(None, [drawn_otherwise(tokens)])
    shortest = min(probes, key=lambda probe: len(probe.ids))
    if not comparison.problems and (length := limit(engine, shortest, context)):
        comparison.problems.append(
            f"server settings: a limit of length: an answer that asks for none is cut after {length} tokens: "
            "lift max_tokens (num_predict)"
        )


def compare_probabilities(
    comparison: Comparison, found: list[tuple[Probe, Answer, Answer]], trained: dict[str, OwnAnswer]
) -> None:
    """Add what the served probabilities are from the trained model's, for as long as both answer the same."""
    pairs = [
        (as_told(trained[probe.name], served.tokens), served.tokens) for probe, served, _ in found if served.tokens
    ]
    divergences = [list(divergences_of(own, tokens)) for own, tokens in pairs]
    same = [
        [float(told.token == token) for told, token, _ in zip(tokens, own.tokens, each, strict=False)]
        for (own, tokens), each in zip(pairs, divergences, strict=True)
    ]
    for name, values in (("divergence", divergences), ("top1", same)):
        if any(values):
            what = "divergence_mean" if name == "divergence" else "top1_agreement"
            comparison.measures[what] = sum(map(sum, values)) / sum(map(len, values))
            comparison.measures[f"{name}_interval"] = interval([each for each in values if each])
