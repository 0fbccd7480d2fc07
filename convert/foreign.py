"""Compare files that another tool made with their reference:  python -m convert.foreign FOLDER ARTEFACT ...

FOLDER has what `train.foreign` wrote, which says where each ARTEFACT lies: a GGUF, a folder of safetensors, or an
adapter and its base. A GGUF that is itself the reference answers its probes here. Writes `compare.jsonl` and
`compare-greedy.jsonl` there. Started by `serve.foreign` only.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.comparison import Found, Task, compare_weights, gguf_bounds, measured, merged_bounds
from convert.evaluator import Evaluator, greedy_answers, read_header
from convert.quantizer import file_type
from pipeline import Recipe, UserError
from pipeline.command import boundary
from pipeline.files import read_object
from pipeline.machine import cores
from pipeline.proof import Bounds, Comparison, first_difference, write_comparisons
from pipeline.recipe import QUANTIZATIONS, Merge
from pipeline.reference import (
    CONTINUATION_TOKENS,
    SCORED_POSITIONS,
    Reference,
    read_probes,
    read_reference,
    write_own_answers,
    write_reference,
)

# Other tools merge into the base's own 16 bits, which rounds as no merge of ours has to.
ROUNDED = replace(Recipe("foreign"), merge=Merge(precision="bfloat16"))

log = logging.getLogger("truetune")


def foreign(folder: Path, names: list[str]) -> None:
    """Write the comparisons and what each artefact answers by itself, under the names that were given.

    Raises:
        UserError: the reference is a GGUF and llama.cpp cannot read it.
    """
    told = read_object(folder / "reference.json")
    reference = Path(told["model"])
    apart = Bounds(0.0, 1.0)
    if reference.suffix == ".gguf":
        apart = gguf_bounds(ROUNDED, type_of(reference))
        answer(reference, folder / "reference")
    found = []
    for name in names:
        log.info("compare: %s", name)
        found.append(compared(folder, name, told["artefacts"][name], apart))
    write_comparisons(folder / "compare.jsonl", [each.comparison for each in found])
    write_own_answers(folder / "compare-greedy.jsonl", (own for each in found for own in each.own))


def answer(path: Path, folder: Path) -> None:
    """Let llama.cpp answer the probes in this folder of a reference, with the tokens that it makes of their prompts."""
    import numpy as np

    probes = read_probes(folder)
    longest = max(len(probe.ids) for probe in probes) + CONTINUATION_TOKENS + 8
    most = max(1, SCORED_POSITIONS // len(probes))
    log.info("reference: %s", path)
    with Evaluator(path, longest, threads=cores()) as evaluator:
        probes = [replace(probe, ids=evaluator.tokens(probe.prompt)) for probe in probes]
        known = min(evaluator.known_tokens, evaluator.pass_tokens)
        probes = [probe for probe in probes if len(probe.ids) + CONTINUATION_TOKENS <= known]
        said = greedy_answers(evaluator, [probe.ids for probe in probes], CONTINUATION_TOKENS, "prove: reference")
        asked = [
            (probe.ids + tokens, list(range(len(probe.ids) - 1, len(probe.ids) + len(tokens) - 1)))
            for probe, tokens in zip(probes, said, strict=True)
        ]
        scores = []
        for number, rows in enumerate(evaluator.logits(asked)):
            chosen = rows.argmax(-1).tolist()
            at = first_difference(chosen, said[number])  # beside others a near tie may fall otherwise
            tokens = chosen if at is None else chosen[: at + 1]
            scored, ends = min(most, len(tokens)), evaluator.ends(tokens[-1])
            probes[number] = replace(probes[number], continuation=tokens, stopped=ends, scored=scored)
            scores.append(rows[:scored])
    write_reference(folder, Reference(probes, np.concatenate(scores), []))


def compared(folder: Path, name: str, place: dict[str, Any], apart: Bounds) -> Found:
    """One artefact, which may be as far from the reference as its own type is, and as the reference's type is."""
    try:
        if "problem" in place:
            raise UserError(place["problem"])
        path, base = Path(place["model"]), place["base"]
        kind = type_of(path) if path.suffix == ".gguf" else ""
    except UserError as error:
        return Found(Comparison(name, {}, [f"file: {problem}" for problem in error.problems]))
    own = gguf_bounds(ROUNDED, kind) if kind else merged_bounds(ROUNDED)
    bounds = Bounds(
        own.mean_divergence + apart.mean_divergence, max(0.0, own.top1_agreement + apart.top1_agreement - 1)
    )
    if kind:
        return of_gguf(folder, name, path, kind, bounds)
    reference = read_reference(folder / "reference")
    return compare_weights(name, path, "float32", bounds, reference, Path(base) if base else None)


def type_of(path: Path) -> str:
    """The type that a GGUF says it is of.

    Raises:
        UserError: it is damaged, or of a type that is not known here.
    """
    number = read_header(path).file_type
    kind = next((kind for kind in QUANTIZATIONS if file_type(kind) == number), "")
    if not kind:
        raise UserError(f"{path} is of llama.cpp's type {number}, which is not known here")
    return kind


def of_gguf(folder: Path, name: str, path: Path, kind: str, bounds: Bounds) -> Found:
    """A GGUF, asked in a process of its own."""
    from transformers import AutoTokenizer

    task = Task(
        kind=kind,
        path=str(path),
        tokenizer=str(folder / "tokenizer"),
        template=str(AutoTokenizer.from_pretrained(folder / "tokenizer").chat_template),
        reference=str(folder / "reference"),
        bounds=(bounds.mean_divergence, bounds.top1_agreement),
        threads=cores(),
    )
    found = measured(task)
    found.comparison.measures["type"] = kind
    found.comparison.name = name
    return replace(found, own=[replace(own, artefact=name) for own in found.own])


if __name__ == "__main__":
    with boundary():
        foreign(Path(sys.argv[1]), sys.argv[2:])
