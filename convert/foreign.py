"""Compare files that another tool made with their reference:  python -m convert.foreign FOLDER ARTEFACT ...

FOLDER has what `train.foreign` wrote; an ARTEFACT is a GGUF or a folder of safetensors. Writes `compare.jsonl` and
`compare-greedy.jsonl` there. Started by `serve.foreign` only.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

from convert.comparison import Found, Task, gguf_bounds, measured, merged_bounds
from convert.evaluator import read_header
from convert.quantizer import file_type
from convert.weights import compare_weights
from pipeline import Recipe, UserError
from pipeline.command import boundary
from pipeline.machine import cores
from pipeline.proof import Comparison, write_comparisons
from pipeline.recipe import QUANTIZATIONS, Merge
from pipeline.reference import read_reference, write_own_answers

# Other tools merge into the base's own 16 bits, which rounds as no merge of ours has to.
ROUNDED = replace(Recipe("foreign"), merge=Merge(precision="bfloat16"))

log = logging.getLogger("truetune")


def foreign(folder: Path, names: list[str]) -> None:
    """Write the comparisons and what each artefact answers by itself, under the names that were given."""
    found = []
    for name in names:
        log.info("compare: %s", name)
        found.append(of_gguf(folder, name) if name.endswith(".gguf") else of_folder(folder, name))
    write_comparisons(folder / "compare.jsonl", [each.comparison for each in found])
    write_own_answers(folder / "compare-greedy.jsonl", (own for each in found for own in each.own))


def of_folder(folder: Path, name: str) -> Found:
    """A folder of merged weights."""
    if not (Path(name) / "config.json").is_file():
        return Found(Comparison(name, {}, [f"file: {name} holds no model: give a folder of safetensors or a .gguf"]))
    return compare_weights(name, Path(name), "float32", merged_bounds(ROUNDED), read_reference(folder / "reference"))


def of_gguf(folder: Path, name: str) -> Found:
    """A GGUF of whichever type it says."""
    from transformers import AutoTokenizer

    try:
        number = read_header(Path(name)).file_type
    except UserError as error:
        return Found(Comparison(name, {}, [f"file: {problem}" for problem in error.problems]))
    kind = next((kind for kind in QUANTIZATIONS if file_type(kind) == number), "")
    if not kind:
        return Found(Comparison(name, {}, [f"file: {name} is of llama.cpp's type {number}, which is not known here"]))
    bounds = gguf_bounds(ROUNDED, kind)
    task = Task(
        kind=kind,
        path=name,
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
