"""The reference that travels with the model: what the trained model says to fixed probes, and what its artefacts say.

Format 2, in `runs/<recipe>/reference/`:

- `probes.jsonl`, one probe a line: `name`; `messages` and `tools`, what is asked; `prompt`, the template's text for
  it with the opening of the assistant's turn; `ids`, the prompt's tokens; `continuation`, the greedy answer's tokens,
  up to and with the token that ends the turn or to CONTINUATION_TOKENS; `stopped`, whether it ended by itself;
  `scored`, how many positions of `ids + continuation`, from the prompt's last token on, have logits.
- `logits.safetensors`: tensor `logits` (scored positions of all probes in their order, vocabulary), float32.
- `base.safetensors`, where it was asked for: the same of the base without its adapter.
- `validation.jsonl`: `ids` and `first`, one row an answer of the validation split; the tokens from `first` on are the
  answer, whose likelihood gives the perplexity; `loss`, the trained model's own, summed over those tokens.

What each artefact itself answers to the probes when it is read directly, to which a server of it is held, lies in
`runs/<recipe>/compare-greedy.jsonl`, a line an artefact and probe: `artefact`, `probe`; `tokens`, its greedy answer up
to and with the token that ends it or to CONTINUATION_TOKENS, of some only to the first that is not the reference's;
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

FORMAT = 2
BASE_LOGITS = "base.safetensors"
CONTINUATION_TOKENS = 32
SCORED_POSITIONS = 256
KEPT_TOKENS = 10
Message = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One question with everything that a later stage must reproduce."""

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    prompt: str
    ids: list[int]
    continuation: list[int]
    stopped: bool
    scored: int

    @property
    def sequence(self) -> list[int]:
        """The tokens to evaluate: the prompt and the answer."""
        return self.ids + self.continuation

    @property
    def positions(self) -> list[int]:
        """Positions of `sequence` whose next-token logits the reference holds."""
        return list(range(len(self.ids) - 1, len(self.ids) - 1 + self.scored))


@dataclass(frozen=True)
class Answer:
    """An answer of the validation split in its context; `loss` is summed over the tokens from `first` on."""

    ids: list[int]
    first: int
    loss: float


@dataclass(frozen=True)
class Reference:
    """All probes, the (scored positions, vocabulary) float32 logits, the validation answers, and the base's logits."""

    probes: list[Probe]
    logits: Any
    answers: list[Answer]
    base: Any = None

    def logits_of(self, probe: Probe) -> Any:
        """The (scored, vocabulary) logits of one probe."""
        before = 0
        for other in self.probes:
            if other.name == probe.name:
                return self.logits[before : before + probe.scored]
            before += other.scored
        raise KeyError(probe.name)


def write_reference(folder: Path, reference: Reference) -> None:
    """Write the files of the format into an empty folder."""
    from safetensors.numpy import save_file

    write_probes(folder, reference.probes)
    _write_rows(folder / "validation.jsonl", [asdict(answer) for answer in reference.answers])
    save_file({"logits": reference.logits}, folder / "logits.safetensors")


def write_probes(folder: Path, probes: list[Probe]) -> None:
    """The probes alone, which may be still to be answered."""
    _write_rows(folder / "probes.jsonl", [{"format": FORMAT} | asdict(probe) for probe in probes])


def write_base_logits(folder: Path, logits: Any) -> None:
    """Add those of the base without its adapter to what `write_reference` wrote."""
    from safetensors.numpy import save_file

    save_file({"logits": logits}, folder / BASE_LOGITS)


def read_probes(folder: Path) -> list[Probe]:
    """The probes of a run's reference, without their logits.

    Raises:
        UserError: they were written in another format.
    """
    rows = _read_rows(folder / "probes.jsonl")
    formats = {row.pop("format", None) for row in rows}
    if formats != {FORMAT}:
        raise UserError(f"{folder} has format {formats}, this Truetune reads {FORMAT}: run 'make train' again")
    return [Probe(**row) for row in rows]


def read_reference(folder: Path) -> Reference:
    """The reference of a run.

    Raises:
        UserError: it was written in another format.
    """
    from safetensors.numpy import load_file

    base = folder / BASE_LOGITS
    return Reference(
        probes=read_probes(folder),
        logits=load_file(folder / "logits.safetensors")["logits"],
        answers=[Answer(**row) for row in _read_rows(folder / "validation.jsonl")],
        base=load_file(base)["logits"] if base.is_file() else None,
    )


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


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # not splitlines: it also splits at U+2028 within a row
        return [json.loads(line) for line in file]
