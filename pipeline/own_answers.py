"""What each artefact itself answers to the reference's probes, read directly: what a server of it is held to.

In `runs/<recipe>/compare-greedy.jsonl`, a line an artefact and probe: `artefact`, `probe`; `tokens`, its greedy answer
up to and with the token that ends it or to CONTINUATION_TOKENS, of some only to the first that is not the reference's;
`ended`, whether the last token ends it; `top`, for each of these tokens the most likely ones in its place with their
log-probabilities (nats).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.files import write_whole
from pipeline.reference import CONTINUATION_TOKENS, Reference

KEPT_TOKENS = 10


@dataclass(frozen=True)
class OwnAnswer:
    """An artefact's greedy answer to one probe, as far as it was asked for; `top` may end before `tokens` do."""

    artefact: str
    probe: str
    tokens: list[int]
    ended: bool
    top: list[list[tuple[int, float]]]

    @property
    def is_whole(self) -> bool:
        return self.ended or len(self.tokens) == CONTINUATION_TOKENS


def most_likely(logits: Any) -> list[list[tuple[int, float]]]:
    """Of (positions, vocabulary) logits the KEPT_TOKENS most likely tokens of each, with log-probabilities (nats)."""
    import numpy as np

    rows = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    best = np.argsort(-rows, axis=-1, kind="stable")[:, :KEPT_TOKENS]
    return [[(int(token), round(float(row[token]), 5)) for token in kept] for row, kept in zip(rows, best, strict=True)]


def of_trained(reference: Reference) -> dict[str, OwnAnswer]:
    """Those of the trained model by probe; the reference has the logits of each answer's first positions."""
    return {
        probe.name: OwnAnswer(
            "trained", probe.name, probe.continuation, probe.stopped, most_likely(reference.logits_of(probe))
        )
        for probe in reference.probes
    }


def write_own_answers(path: Path, answers: Iterable[OwnAnswer]) -> None:
    """One answer a line."""
    write_whole(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))


def read_own_answers(path: Path) -> dict[str, dict[str, OwnAnswer]]:
    """What `write_own_answers` wrote, by artefact and probe.

    Raises:
        UserError: there is no such file, as of a run that an older Truetune compared.
    """
    found: dict[str, dict[str, OwnAnswer]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for answer in map(own_answer, map(json.loads, file)):
                found.setdefault(answer.artefact, {})[answer.probe] = answer
    except FileNotFoundError:
        raise UserError(f"{path} is missing: delete {path.with_name('compare.json')} and run make again") from None
    return found


def own_answer(row: dict[str, Any]) -> OwnAnswer:
    """From the JSON of one."""
    top = [[(int(token), float(score)) for token, score in kept] for kept in row["top"]]
    return OwnAnswer(row["artefact"], row["probe"], row["tokens"], row["ended"], top)
