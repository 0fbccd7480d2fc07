"""Healthy models of many families through the whole proof, which must pass:  python -m bench.sweep [NAME ...]

The packaged model and each of bench/families.py is trained for some steps, merged, converted, quantized, compared and
asked through its server, as `make prove` does it. `runs/sweep/measured.jsonl` keeps what was measured, a model a line;
one that was as it should be is not asked again, so the command goes on where it was stopped. The tables go to stdout,
as Markdown. Exits 1 on a false alarm, and if what llama.cpp is known to lose of some is not noticed and named.
"""

import json
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.families import KINDS, SOUNDS, talk, write_base
from convert.comparison import gguf_bounds, merged_bounds
from pipeline import Recipe, Run, UserError, load
from pipeline.command import boundary, up_to_date, versions
from pipeline.files import fresh_folder, read_json, remove, write_whole
from pipeline.gguf_head import read_head
from pipeline.machine import machine
from pipeline.progress import progress
from pipeline.proof import Bounds, Comparison, read_comparisons, suspects
from pipeline.recipe import Merge
from pipeline.stages import stage
from pipeline.units import duration

FOLDER = Path("runs/sweep")
LINE = ("data", "base", "train", "reference", "merge", "gguf", "compare", "prove")
TYPES = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
ARTEFACTS = ("merge", *TYPES, "served")
AGAIN = 15  # so many kinds, of the families in widest use, are measured once more, wider and with another seed
PACKAGED = "smollm2-135m"
PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python", "xllamacpp")
RECIPE = """
base_model: {base}
seed: {seed}
data: {{train: talks.jsonl, validation: 0}}
train: {{epochs: 5, learning_rate: {rate}, max_length: 512, lora: {{rank: 8, alpha: 16}}, tracker: none}}
merge: {{precision: {precision}}}
gguf: {{full: {full}, types: [{types}], imatrix_tokens: 0}}
serve: {{type: {served}, context: 1024, slots: 2, threads: 1}}
"""

log = logging.getLogger("truetune")
Line = dict[str, Any]  # of measured.jsonl


@dataclass(frozen=True)
class Model:
    """One model of a kind: its seed, its width, what its merge is rounded to and which of its types is served."""

    kind: str
    seed: int
    width: int
    precision: str
    served: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    @property
    def full(self) -> str:
        return "BF16" if self.precision == "bfloat16" else "F16"


def models() -> list[Model]:
    """Every kind once, the first ones again; merges in both precisions and servers of several types take turns."""
    made = [Model(PACKAGED, 0, 576, "bfloat16", "Q8_0")]
    for seed, kinds in enumerate([list(KINDS), list(KINDS)[:AGAIN]]):
        for turn, kind in enumerate(kinds, start=seed):
            precision, served = ("float32", "bfloat16")[turn % 2], ("Q8_0", "Q4_K_M", "F16")[turn % 3]
            made.append(Model(kind, seed, 256 * (1 + seed), precision, served))
    return made


def main() -> None:
    every, named = models(), sys.argv[1:]
    if unknown := set(named) - {model.name for model in every}:
        raise UserError(f"no model {', '.join(sorted(unknown))}: there are {', '.join(model.name for model in every)}")
    path = FOLDER / "measured.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found: dict[str, Line] = {line["model"]: line for line in map(json.loads, lines)}
    wanted = [model for model in every if model.name in named or not named]
    left = [model for model in wanted if model.name not in found or wrong(found[model.name])]
    with progress("sweep", len(left), "models") as tell:
        for number, model in enumerate(left):
            tell(number, model.name)
            found[model.name] = line = measured(model, [model.served] if lost_of(model.kind) else TYPES)
            write_whole(path, "".join(json.dumps(each) + "\n" for each in found.values()))
            told = "; ".join(wrong(line)) or "as it should be"
            log.info("sweep: %s: %s, after %s", model.name, told, duration(line["seconds"]))
    shown = [found[model.name] for model in every if model.name in found]
    healthy = [line for line in shown if not lost_of(line["kind"])]
    print("\n\n".join([by_type(healthy), by_kind(healthy), measured_with(healthy)]))
    if problems := [f"{line['model']}: {problem}" for line in shown for problem in wrong(line)]:
        raise UserError(*problems)


def measured(model: Model, types: Iterable[str]) -> Line:
    """What every artefact of the model measured, and what was wrong with it; nothing of the model is kept."""
    start, folder, why = time.monotonic(), fresh_folder(FOLDER / model.name), ""
    path = folder / f"sweep-{model.name}.yaml"
    run = Run(path.stem)
    try:
        base, rate = ("base", "4e-3") if model.kind in KINDS else (model.kind, "2e-4")
        path.write_text(RECIPE.format(base=base, rate=rate, types=", ".join(types), full=model.full, **vars(model)))
        talks = [{"messages": talk(animal, f"The {animal} says {sound}.")} for animal, sound in SOUNDS.items()]
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
        with quiet():
            if model.kind in KINDS:
                write_base(KINDS[model.kind], folder / "base", model.seed, model.width)
            rows = [row_of(comparison) for comparison in proved(load(str(path), []), not lost_of(model.kind))]
        head = read_head(run.path("gguf", f"{run.name}-{model.full}.gguf"))
        why = suspects(read_json(run.path("base", "config.json")), head)
    except Exception as error:  # a stage that fails is a finding, of which the other models must not suffer
        rows = [{"artefact": "", "kl": None, "problems": [f"{type(error).__name__}: {error}"]}]
    finally:
        remove(folder)
        remove(run.folder)
    return {
        "model": model.name,
        "kind": model.kind,
        "precision": model.precision,
        "seconds": round(time.monotonic() - start, 1),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "rows": rows,
        "why": why,
    }


def proved(recipe: Recipe, served: bool) -> list[Comparison]:
    """The comparisons of every artefact, after all the stages; without that of the server if it is not `served`."""
    for name in LINE if served else LINE[:-1]:
        module = import_module(stage(name).module)
        receipt = up_to_date(stage(name), recipe, getattr(module, module.__name__.rpartition(".")[2]))
    if not served:
        return read_comparisons(Run.of(recipe).path("compare.jsonl"))
    return [Comparison(**row) for row in receipt.metrics["comparisons"]]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the stages tell."""
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def row_of(comparison: Comparison) -> dict[str, Any]:
    """What is kept of a comparison; a server is held to the answers of its own file."""
    measures, is_served = comparison.measures, comparison.name.startswith("served")
    return {
        "artefact": "served" if is_served else comparison.name,
        "kl": measures.get("divergence_from_file" if is_served else "divergence_mean"),
        "p99": measures.get("divergence_p99"),
        "top1": measures.get("own_agreement" if is_served else "top1_agreement"),
        "problems": comparison.problems,
    }


def wrong(line: Line) -> list[str]:
    """What the proof should not have said of the model: a false alarm, or nothing of what llama.cpp loses of it."""
    told = [f"{row['artefact']}: {problem}" for row in line["rows"] for problem in row["problems"]]
    if not (lost := lost_of(line["kind"])):
        return told
    is_noticed = any(row["problems"] for row in line["rows"] if row["artefact"] in TYPES)
    return [] if is_noticed and f"has {lost}, which the GGUF" in line["why"] else [f"{lost} is lost: {told or 'same'}"]


def lost_of(kind: str) -> str:
    """What llama.cpp loses of a model of this kind, or nothing."""
    return KINDS[kind].lost if kind in KINDS else ""


def by_type(lines: list[Line]) -> str:
    """A row for each type of artefact: what healthy models measured, the bound, and how far that is above them."""
    table = [
        "| artefact | models | median KL | largest KL | of | 99th pct | KL allowed | margin | least top-1 | wanted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for artefact in ARTEFACTS:
        own_bounds = artefact in ("merge", "F16")  # in each precision of the merge
        for precision in ("float32", "bfloat16") if own_bounds else ("",):
            rows = [
                row | {"model": line["model"]}
                for line in lines
                for row in line["rows"]
                if row["artefact"] == artefact and row["kl"] is not None and precision in line["precision"]
            ]
            if rows:
                name = f"{artefact}, {precision} merge" if own_bounds else artefact
                table.append(f"| {name} | {summed_up(rows, bounds_of(artefact, precision or 'float32'))} |")
    return "\n".join(table)


def summed_up(rows: list[dict[str, Any]], bounds: Bounds) -> str:
    """The other cells of a row of `by_type`."""
    largest, tails = max(rows, key=lambda row: row["kl"]), [row["p99"] for row in rows if row["p99"] is not None]
    cells = [
        str(len(rows)),
        f"{statistics.median(row['kl'] for row in rows):.1e}",
        f"{largest['kl']:.1e}",
        largest["model"],
        f"{max(tails):.1e}" if tails else "-",
        f"{bounds.mean_divergence:.1e}",
        f"{bounds.mean_divergence / largest['kl']:,.0f}" if largest["kl"] else "-",
        f"{min(row['top1'] for row in rows):.0%}",
        f"{bounds.top1_agreement:.0%}",
    ]
    return " | ".join(cells)


def bounds_of(artefact: str, precision: Any) -> Bounds:
    """Those that the artefact of a merge in this precision is held to by default."""
    recipe = Recipe("sweep", merge=Merge(precision))
    if artefact == "served":
        return Bounds(recipe.prove.served_max_kl, 1.0)
    return merged_bounds(recipe) if artefact == "merge" else gguf_bounds(recipe, artefact)


def by_kind(lines: list[Line]) -> str:
    """A row for each kind of model: the largest KL of each artefact."""
    table = [f"| model | {' | '.join(ARTEFACTS)} |", "|---" * (1 + len(ARTEFACTS)) + "|"]
    for kind in dict.fromkeys(line["kind"] for line in lines):
        largest: dict[str, float] = {}
        for row in (row for line in lines if line["kind"] == kind for row in line["rows"] if row["kl"] is not None):
            largest[row["artefact"]] = max(row["kl"], largest.get(row["artefact"], 0.0))
        cells = [f"{largest[artefact]:.1e}" if artefact in largest else "-" for artefact in ARTEFACTS]
        table.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(table)


def measured_with(lines: list[Line]) -> str:
    """Number of models, kind of machine, versions."""
    places = {f"{line['machine']['processor']} ({line['machine']['system']})" for line in lines}
    tools = {f"{name} {version}" for line in lines for name, version in line["versions"].items()}
    kinds = len({line["kind"] for line in lines})
    return f"{len(lines)} models of {kinds} kinds; {', '.join(sorted(tools))}; {', '.join(sorted(places))}."


if __name__ == "__main__":
    with boundary():
        main()
