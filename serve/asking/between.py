"""Two servers compared with each other, of which no file is at hand: what the one answers is what the other is held to.

A token is known by its text, as OpenAI's API tells it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from pipeline.error import UserError
from pipeline.progress import progress
from pipeline.proof import Comparison
from pipeline.recipe import Prove
from pipeline.reference import OwnAnswer, Probe
from serve.asking.judgement import Own, compare_probabilities, judge, plain
from serve.asking.probe import Answer, LlamaCpp, OpenAi, answer, ask_probes
from serve.asking.reached import BYTES, Reached

LEAST_AGREEMENT = 0.6  # of answers without probabilities, by a file that is not at hand and may be quantized


@dataclass(frozen=True)
class ByText(OpenAi):
    """A server whose tokens are numbered by their texts, in a `vocabulary` that grows and that two of them share."""

    vocabulary: dict[str, int]

    def token(self, entry: dict[str, Any]) -> int:
        return self.number(str(entry["token"]))

    def number(self, text: str) -> int:
        return self.vocabulary.setdefault(text, len(self.vocabulary))

    def text(self, tokens: list[int]) -> str:
        texts = list(self.vocabulary)
        return "".join(texts[token] for token in tokens)


def compare_servers(comparison: Comparison, first: Reached, second: Reached, probes: list[Probe]) -> None:
    """Hold the answers of the second to those of the first.

    Raises:
        UserError: the first one answers nothing.
    """
    vocabulary: dict[str, int] = {}
    one, other = (ByText(each.root, each.key, each.model, vocabulary, each.tells) for each in (first, second))
    shown = LlamaCpp(first.root, first.key, first.model) if first.kind == second.kind == "llamacpp" else None
    asked, own = [], {}
    with progress("prove: the first server", len(probes)) as tell:
        for done, probe in enumerate(probes, 1):
            said = answer(one, probe, first.context)
            if said.status == 200:
                asked.append(as_told(probe, said, one, shown))
                own[probe.name] = own_of(probe.name, said, one)
            tell(done)
    if not asked:
        raise UserError(f"{first.root} answers none of {len(probes)} prompts ({said.text}): see its log")
    unseen = [] if shown else [BYTES, "token ids"]
    unseen += [] if first.tells and second.tells else ["probabilities"]
    comparison.measures |= {"type": "", "not_compared": unseen}
    if shown:
        there = LlamaCpp(second.root, second.key, second.model)
        comparison.problems += list(filter(None, map(there.prompt_problem, asked)))[:1]
    if comparison.problems:
        return
    found = ask_probes(comparison, other, asked, min(first.context, second.context), slots=1)
    if comparison.problems:
        return
    judge(comparison, found, Own(own, {}, Prove.quantized_max_kl, LEAST_AGREEMENT), other.text)
    compare_probabilities(comparison, found, own)
    same, count = comparison.measures["greedy_agreement"], comparison.measures["probes"]
    if not comparison.problems and "divergence_mean" not in comparison.measures and same < LEAST_AGREEMENT:
        comparison.problems.append(f"answers: {round((1 - same) * count)} of {count} are others")


def as_told(probe: Probe, said: Answer, engine: ByText, shown: LlamaCpp | None) -> Probe:
    """The probe with what the server made of it: the answer as one word, and of the prompt as much as it shows."""
    prompt = shown.prompt(probe)[1] if shown else ""
    ids = shown.tokens(prompt) if shown else [0] * said.prompt_tokens
    stopped = said.reason == "stop"
    words = [engine.number(said.text), *([engine.number("")] if stopped else [])]
    return replace(probe, prompt=prompt, ids=ids, continuation=words, stopped=stopped)


def own_of(name: str, said: Answer, engine: ByText) -> OwnAnswer:
    """What it answered, token by token where it tells them."""
    if not said.tokens:
        return OwnAnswer("first", name, [engine.number(said.text)], False, [])
    tokens, top = [], []
    for told in said.tokens:
        others = math.log(max(1 - math.exp(told.score), 1e-9))  # where it tells no single one of them
        scores = (told.top or {-1: others}) | {told.token: told.score}
        tokens.append(told.token)
        top.append(sorted(scores.items(), key=lambda each: -each[1]))
    ended = said.reason == "stop" and plain(engine.text(tokens[:-1])) == plain(said.text)
    return OwnAnswer("first", name, tokens, ended, top)
