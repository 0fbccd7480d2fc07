"""Whether a server answers as the very artefact that it serves does, and if not, which setting or file that shows.

Asked for the most likely tokens, a server that changes nothing chooses its own most likely ones, gives them the
probabilities that the artefact gives them when it is read directly, and ends where that one ends. Near ties may fall
otherwise, since a server's cache has 16 bits.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.proof import Comparison, first_difference, interval
from pipeline.recipe import Recipe
from pipeline.reference import OwnAnswer, Probe, Reference, of_trained, read_own_answers
from pipeline.run import Run
from serve.asking.probe import Answer, Engine, Told, ask_probes, drawn, limit

Text = Callable[[list[int]], str]
MOST_BYTES = 4  # of a character in UTF-8
CUT = "\ufffd"  # how a text ends that is cut within a character
TIE_NATS = 1e-3  # a server's most likely token is the first of equals
NEAR_TIE_NATS = 0.3  # 16 bits of cache move a log-probability by 0.1 at most where it matters (measured: docs/proof.md)
NEARER = 3  # another file is the one that is served if the answers are so many times nearer to it
PENALIZED_TOKENS = 64  # llama.cpp's and Ollama's repeat_last_n
CLEAR_SHARE = 0.8
LEAST_EXPECTED = 12.0  # none where so many are to be expected: less than once in a hundred thousand healthy runs
DEVIATIONS = 5.0  # standard deviations: less than once in a million healthy runs
DOUBTFUL_DEVIATIONS = 2.0  # more draws must tell
DRAWING_ROUNDS, ENOUGH_TOKENS = 6, 400
SELDOM = (0.1, 0.05, 0.02)  # of the most likely token's probability: min_p as it is usually set


@dataclass(frozen=True)
class Own:
    """What the served artefact answers by itself, by probe, and what each file does that might be in its place.

    `max_divergence` bounds the mean divergence of its server's probabilities, in nats; where it tells none,
    `least_agreement` the share of answers that are the same.
    """

    answers: dict[str, OwnAnswer]
    others: dict[str, dict[str, OwnAnswer]]
    max_divergence: float
    least_agreement: float = 1.0


def own_of_file(recipe: Recipe, run: Run, kind: str) -> Own | None:
    """Those of a GGUF of the run; None where it could not be read, and so says nothing of its server.

    Raises:
        UserError: an older `make compare` did not write them.
    """
    found = read_own_answers(run.path("compare-greedy.jsonl"))
    others = {name: found[name] for name in recipe.gguf.written if name in found and name != kind}
    return Own(found[kind], others, recipe.prove.served_max_kl) if kind in found else None


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


class Asked(NamedTuple):
    """A probe, what the artefact answers by itself, what its server answers to a new prompt, and when asked again.

    `shown` is the artefact's answer with the tokens alone of which its server tells something.
    """

    probe: Probe
    own: OwnAnswer
    shown: OwnAnswer
    served: Answer
    again: Answer


class Passed(NamedTuple):
    """A place where a server did not take the most likely token; `chosen` is None where it does not tell tokens."""

    asked: Asked
    at: int
    likely: int
    chosen: int | None
    nats: float


def judge(comparison: Comparison, answers: list[tuple[Probe, Answer, Answer]], own: Own, text: Text) -> None:
    """Add what the served answers, each with the one when asked again, measure against the artefact's own.

    `text` is the tokens' text as this server writes an answer. What is wrong becomes a problem.
    """
    asked = [
        Asked(probe, (mine := own.answers[probe.name]), as_told(mine, served.tokens), served, again)
        for probe, served, again in answers
    ]
    divergences = [each for one in asked for each in divergences_of(one.shown, one.served.tokens)]
    left = [found for one in asked if (found := departure(one, text)) and found.nats > NEAR_TIE_NATS]
    comparison.measures["own_agreement"] = 1 - len(left) / len(asked)
    left = left if comparison.measures["own_agreement"] < own.least_agreement else []
    passed = [found for one in asked for found in passed_over(one)] if divergences else left
    if divergences:
        comparison.measures["divergence_from_file"] = sum(divergences) / len(divergences)
    mean = comparison.measures.get("divergence_from_file", 0.0)
    other = likelier(asked, own.others, mean) if divergences else alike(asked, own.others, text)
    if problem := ends_otherwise(asked, text):
        comparison.problems.append(problem)
    elif passed and not other:
        comparison.problems.append(setting(asked, passed, text))
    elif other:
        comparison.problems.append(f"another file: {other} is served under this name: its answers are that one's")
    elif mean > own.max_divergence:
        comparison.problems.append(
            f"answers: the server's probabilities are not the file's: mean divergence {mean:.3g}, allowed "
            f"{own.max_divergence:g}: other weights, another rope or a coarser cache (cache types, rope settings)"
        )
    elif left and not divergences:  # else the probabilities have said so
        comparison.problems.append(
            f"answers: {len(left)} of {len(asked)} are not the file's own; {place(left[0], text)}"
        )


def divergences_of(own: OwnAnswer, tokens: Iterable[Told]) -> Iterator[float]:
    """Kullback-Leibler divergence (nats) of the served probabilities from the artefact's, where both said the same."""
    for likely, chosen, told in zip(own.top, own.tokens, tokens, strict=False):
        if told.top:
            yield divergence_of(likely, told)
        if told.token != chosen:
            return


def divergence_of(likely: list[tuple[int, float]], told: Told) -> float:
    """That of one place: of the tokens that both tell, and of all others as one.

    It is never more than that of the whole vocabulary, by the log sum inequality.
    """
    both = [(math.exp(score), math.exp(told.top[token])) for token, score in likely if token in told.top]
    mine, its = (max(1 - sum(each[side] for each in both), 1e-9) for side in (0, 1))
    return max(0.0, sum(p * math.log(max(p, 1e-30) / max(q, 1e-30)) for p, q in [*both, (mine, its)]))


def passed_over(one: Asked) -> Iterator[Passed]:
    """Where the server by its own probabilities had a likelier token than the one that it chose."""
    for at, told in enumerate(one.served.tokens):
        likely = max(told.top, key=lambda token: told.top[token], default=told.token)
        if likely != told.token and (nats := told.top[likely] - told.score) > TIE_NATS:
            yield Passed(one, at, likely, told.token, nats)


def departure(one: Asked, text: Text) -> Passed | None:
    """Where the served answer leaves the artefact's own, and by how many nats that would have chosen otherwise."""
    chosen = [told.token for told in one.served.tokens]
    own = one.shown if chosen else one.own
    if chosen:
        at = first_difference(own.tokens[: len(chosen)], chosen[: len(own.tokens)])
    else:
        words, said = own.tokens[: len(own.tokens) - own.ended], plain(one.served.text)
        at = next((i for i in range(len(words)) if not said.startswith(plain(text(words[: i + 1])))), None)
    if at is None or at >= len(own.top):
        return None
    if chosen and own.tokens[at] not in one.served.tokens[at].top:
        return None  # another place: the server told nothing of some before
    scores = dict(own.top[at])
    likely = own.tokens[at]
    others = [score for token, score in own.top[at] if token != likely]
    other = scores.get(chosen[at], min(others)) if chosen else max(others)
    return Passed(one, at, likely, chosen[at] if chosen else None, scores[likely] - other)


def as_told(own: OwnAnswer, tokens: Iterable[Told]) -> OwnAnswer:
    """The answer without the tokens that end within a character, of which llama.cpp's server tells nothing.

    Such a place is one where a later token is the one that is told, by its own probabilities, too.
    """
    kept, at = [], 0
    for told in tokens:
        if at >= len(own.top):
            break
        here = divergence_of(own.top[at], told)
        if own.tokens[at] != told.token:
            later = range(at + 1, min(at + MOST_BYTES, len(own.top)))
            fitting = [i for i in later if own.tokens[i] == told.token and 2 * divergence_of(own.top[i], told) < here]
            at = fitting[0] if fitting else at
        kept.append(at)
        at += 1
    kept += range(at, len(own.tokens))
    return replace(own, tokens=[own.tokens[i] for i in kept], top=[own.top[i] for i in kept if i < len(own.top)])


def plain(answer: str) -> str:
    """An answer without what a server drops: marks of a model's thoughts, white space around, characters cut off."""
    return " ".join(answer.replace("<think>", " ").replace("</think>", " ").replace(CUT, "").split())


def spoken(own: OwnAnswer, text: Text) -> str:
    """The artefact's own answer as a server writes it, without the token that ends it."""
    return plain(text(own.tokens[: len(own.tokens) - own.ended]))


def is_said(own: OwnAnswer, served: Answer, text: Text) -> bool:
    """Whether the served text is the artefact's own, as far as that is known."""
    said, wanted = plain(served.text), spoken(own, text)
    return said == wanted if own.is_whole else said.startswith(wanted)


def likelier(asked: list[Asked], others: dict[str, dict[str, OwnAnswer]], mean: float) -> str:
    """The other file whose probabilities these are: its divergence is a fraction of `mean`, the named one's own."""
    for name, answers in others.items():
        its = [as_told(answers[one.probe.name], one.served.tokens) for one in asked]
        each = [d for other, one in zip(its, asked, strict=True) for d in divergences_of(other, one.served.tokens)]
        if each and NEARER * sum(each) / len(each) < mean:
            return name
    return ""


def alike(asked: list[Asked], others: dict[str, dict[str, OwnAnswer]], text: Text) -> str:
    """The other file whose texts these are, where the two files' own are not the same."""
    for name, answers in others.items():
        apart = [one for one in asked if answers[one.probe.name].tokens != one.own.tokens]
        mine = sum(is_said(one.own, one.served, text) for one in apart)
        its = sum(is_said(answers[one.probe.name], one.served, text) for one in apart)
        if its >= NEARER * (1 + mine):
            return name
    return ""


def ends_otherwise(asked: list[Asked], text: Text) -> str:
    """An end that the artefact's own answer does not have: cut, stopped by a word, or none where it ends."""
    ending, going = 0, 0
    for one in asked:
        own, said, served = spoken(one.own, text), plain(one.served.text), one.served
        left = departure(one, text)
        is_shorter = own.startswith(said) and len(said) < len(own) and served.length < len(one.own.tokens)
        if is_shorter and (left is None or left.nats > NEAR_TIE_NATS):
            where = f"the answer to probe '{one.probe.name}'"
            if served.reason == "length":
                return (
                    f"server settings: a limit of length: {where} is cut after {len(said)} of {len(own)} characters: "
                    "lift max_tokens (num_predict)"
                )
            if left is None or not served.tokens:
                return (
                    f"server settings: a stop string: {where} ends before {own[len(said) :][:20]!r}, where the file's "
                    "own goes on: take it away"
                )
        ending += one.own.ended
        going += one.own.ended and served.reason == "length" and said.startswith(own)
    if going and going >= CLEAR_SHARE * ending:
        return f"stop token: the file itself ends {ending} answers, its server goes on after {going} of them"
    return ""


def setting(asked: list[Asked], passed: list[Passed], text: Text) -> str:
    """What makes a server pass over the most likely token, by which tokens it passes over and which it takes."""
    again = sum(one.served.text != one.again.text for one in asked)
    first = place(passed[0], text)
    total = len(passed)
    taken, token = Counter(each.chosen for each in passed if each.chosen is not None).most_common(1), 0
    avoided = Counter(each.likely for each in passed).most_common(1)
    for what, counted in (("taken", taken), ("avoided", avoided)):
        if counted and total > 1 and counted[0][1] >= CLEAR_SHARE * total:
            token = int(counted[0][0] or 0)
            return (
                f"server settings: a logit bias: token {text([token])!r} ({token}) is {what} {counted[0][1]} times "
                f"against the odds; {first}: send none"
            )
    repeated = sum(each.likely in before(each) for each in passed)
    new = sum(each.chosen is None or each.chosen not in before(each) for each in passed)
    if repeated >= CLEAR_SHARE * total and (total > 1 or not again) and 2 * new >= total and not again > len(asked) / 4:
        return (
            f"server settings: a penalty on repetition: {repeated} of {total} times it passes over the most likely "
            f"token, that one stood before; {first}: set repeat_penalty to 1, the others to 0"
        )
    changes = f"{again} of {len(asked)} answers change when asked again" if again else "with a seed"
    return (
        f"server settings: a temperature: asked for the most likely tokens it draws others, {total} times ({changes}); "
        f"{first}: let the request's temperature hold"
    )


def before(passed: Passed) -> list[int]:
    """The tokens that a penalty looks back on."""
    one = passed.asked
    said = [told.token for told in one.served.tokens] or one.own.tokens
    return (one.probe.ids + said[: passed.at])[-PENALIZED_TOKENS:]


def place(passed: Passed, text: Text) -> str:
    """Where it happened, for a message."""
    chosen = "another" if passed.chosen is None else f"{text([passed.chosen])!r}"
    return (
        f"first at probe '{passed.asked.probe.name}', answer position {passed.at}: {chosen}, though "
        f"{text([passed.likely])!r} is likelier by {passed.nats:.2g} nats"
    )


def drawn_otherwise(tokens: list[Told]) -> str:
    """What is wrong with tokens that were drawn at temperature 1 from the whole vocabulary, or nothing.

    Each is held against the probabilities that the server tells for its place: how many unlikely ones are to be
    expected, and how surprising all are together (nats), with the spread that chance gives both.
    """
    for seldom in SELDOM:
        found, expected = unlikely(tokens, seldom)
        if expected > LEAST_EXPECTED and found == 0:
            return (
                "server settings: min_p, top_k or top_p: asked for the whole vocabulary it draws likely tokens alone: "
                f"of those {1 / seldom:.0f} times less likely than the first {expected:.0f} are to be expected, "
                "none was drawn: let the request's settings hold"
            )
    surprise, expected, spread = surprises(tokens)
    if deviations(tokens) > DEVIATIONS:
        way = "lower one (or top_k, top_p)" if surprise < expected else "higher one"
        return (
            f"server settings: a temperature: asked for 1 it draws with a {way}: {len(tokens)} tokens have "
            f"{surprise:.0f} nats, {expected:.0f} ± {spread:.0f} are to be expected: let the request's settings hold"
        )
    return ""


def deviations(tokens: list[Told]) -> float:
    """How many standard deviations the drawn tokens' surprise is away from what is to be expected."""
    surprise, expected, spread = surprises(tokens)
    return abs(surprise - expected) / max(spread, 1e-6)


def unlikely(tokens: list[Told], seldom: float) -> tuple[int, float]:
    """How many tokens are less likely than `seldom` times the first of their place, and how many should be."""
    found, expected = 0, 0.0
    for told in tokens:
        scores = told.top.values()
        floor = max(scores, default=0.0) + math.log(seldom)
        if min(scores, default=0.0) < floor:  # else some of those that are not told may be above it
            found += told.score < floor
            expected += max(0.0, 1 - sum(math.exp(score) for score in scores if score >= floor))
    return found, expected


def surprises(tokens: list[Told]) -> tuple[float, float, float]:
    """The surprise of the tokens, that which is to be expected, and its standard deviation, all in nats.

    Each of those that the server does not tell in a place counts as the least likely one that it does.
    """
    surprise = expected = variance = 0.0
    for told in tokens:
        least = min(told.top.values(), default=0.0)
        chances = [(math.exp(score), -score) for score in told.top.values()]
        chances.append((max(0.0, 1 - sum(chance for chance, _ in chances)), -least))
        mean = sum(chance * nats for chance, nats in chances)
        surprise, expected = surprise - max(told.score, least), expected + mean
        variance += sum(chance * (nats - mean) ** 2 for chance, nats in chances)
    return surprise, expected, math.sqrt(variance)
