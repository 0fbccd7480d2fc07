"""Prove that the served model is the trained one:  python -m serve.prove RECIPE

Starts the engine as `make serve` does, asks it the reference's probes over HTTP, and prints one table with what
`convert.compare` found before. Exits 1 if anything that was made is not the model that was trained.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from pipeline import Made, Recipe, Run, UserError
from pipeline.command import boundary, recipe_of_arguments, up_to_date
from pipeline.files import read_json
from pipeline.gguf_head import read_head
from pipeline.proof import Comparison, in_words, read_comparisons, suspects
from pipeline.reference import Reference, of_trained, read_own_answers, read_reference
from pipeline.stages import stage
from serve.asking.endpoint import ERRORS, free_port, with_environment
from serve.asking.judgement import Own, own_of_file, prove_answers
from serve.asking.probe import Engine, LlamaCpp, Vllm
from serve.engines.llamacpp import is_repeatable, served_file
from serve.engines.ollama.registration import row as registered_row
from serve.engines.vllm import machine_for
from serve.openwebui import port_of, proved_windows
from serve.running.backend import Backend, backend_of, chosen
from serve.running.session import find
from serve.running.supervisor import Supervisor

SERVED = "served"
COLUMNS = ("artefact", "verdict", "MB", "bits", "divergence", "99th pct", "top-1", "facts", "greedy", "perplexity",
           "prompt t/s", "decode t/s", "RSS MB")  # fmt: skip


def prove(recipe: Recipe, run: Run) -> Made:
    """Judge every artefact; the receipt's metrics hold all comparisons and whether all passed."""
    reference = read_reference(run.path("reference"))
    before = read_comparisons(run.path("compare.jsonl"))
    recipe = chosen(recipe, run)
    comparisons = [*before, prove_served(recipe, run, reference, own_of(recipe, run, reference))]
    return Made(
        outputs=[],
        metrics={
            "passed": not any(comparison.problems for comparison in comparisons),
            "comparisons": [vars(comparison) for comparison in comparisons],
            "notes": [
                *notes(reference, comparisons[-1]),
                *filter(None, map(in_words, comparisons)),
                *advice(run.receipt("compare").metrics),
            ],
            "recommended": run.receipt("compare").metrics["recommended"],
        },
        packages=("xllamacpp",),
    )


def own_of(recipe: Recipe, run: Run, reference: Reference) -> Own | None:
    """What the served artefact answers by itself; None where its file failed, which then says nothing of its server.

    Raises:
        UserError: an older `make compare` did not write it.
    """
    if recipe.serve.engine != "vllm":
        return own_of_file(recipe, run, recipe.served_type)
    knobs = recipe.serve.vllm
    found = of_trained(reference) if knobs.adapter else read_own_answers(run.path("compare-greedy.jsonl")).get("merge")
    is_rounded = knobs.quantization != "none" or machine_for(recipe).precision != "float32"
    bound = max(recipe.prove.served_max_kl, recipe.prove.bfloat16_max_kl if is_rounded else 0)
    return Own(found, {}, bound) if found else None


def prove_served(recipe: Recipe, run: Run, reference: Reference, own: Own | None) -> Comparison:
    """The endpoint: the template's bytes and the token ids that it makes of the probes, and its answers."""
    comparison = Comparison(f"{SERVED} {'vllm' if recipe.serve.engine == 'vllm' else recipe.served_type}")
    # Ollama, whose server is not ours, has a row of its own beside that of llama.cpp.
    engine_name: Literal["vllm", "llamacpp"] = "vllm" if recipe.serve.engine == "vllm" else "llamacpp"
    recipe = replace(recipe, serve=replace(recipe.serve, engine=engine_name, port=free_port()))
    backend = backend_of(recipe, run)
    try:
        with answering(recipe, run, backend) as engine:
            prove_answers(comparison, engine, reference, own, recipe.serve.context, recipe.serve.slots)
    except UserError as error:
        comparison.problems += error.problems
        return comparison
    except (*ERRORS, LookupError) as error:
        comparison.problems.append(f"the engine fails ({error!r}): see {run.path('prove.log')}")
    if (
        engine_name == "llamacpp"
        and changing(comparison)
        and is_repeatable(recipe.serve.repeatable, served_file(recipe, run)[0])
    ):
        comparison.problems.append(f"the same question: {changing(comparison)}, of a file that cannot: report a bug")
    return comparison


def changing(served: Comparison) -> str:
    """What of the answers depends on whether their prompts were new, cached, or evaluated beside others; or nothing."""
    lines = []
    for how, what in (("again", "when asked again"), ("beside", "when asked beside others")):
        changed, moved = served.measures.get(f"changed_{how}", 0), served.measures.get(f"moved_{how}", 0)
        if changed or moved:
            lines.append(
                f"{changed} of {served.measures['probes']} answers change {what} (log-probabilities {moved:.2g})"
            )
    return ", ".join(lines)


@contextmanager
def answering(recipe: Recipe, run: Run, backend: Backend) -> Iterator[Engine]:
    """A server of the recipe's model, started for the proof.

    vLLM that serves these very files is asked where it is: it starts slowly, and a second has no room on its GPU.
    """
    kind: Any = {"llamacpp": LlamaCpp, "vllm": Vllm}[recipe.serve.engine]
    endpoint, session = backend.endpoint, find(run)
    if session and session.engine == recipe.serve.engine == "vllm" and run.receipt("serve").inputs == backend.inputs:
        yield kind(port_of(session.url), endpoint.key, endpoint.model)
        return
    services = [replace(service, log_file=run.path("prove.log")) for service in backend.services]
    with Supervisor(services) as supervisor:
        supervisor.start()
        yield kind(port_of(endpoint.url), endpoint.key, endpoint.model)


def notes(reference: Reference, served: Comparison) -> list[str]:
    """What is no fault of an artefact, and yet to be known."""
    found = []
    if too_long := served.measures.get("too_long"):
        found.append(f"{served.name}: {too_long} of {len(reference.probes)} probes do not fit serve.context")
    if "changed_again" in served.measures and not served.problems:
        told = changing(served) or f"0 of {served.measures['probes']} answers change when asked again or beside others"
        found.append(f"{served.name}: {told}")
    if not any(probe.stopped for probe in reference.probes):
        found.append("the trained model itself ended no answer: where it is to stop was not learned, or not yet")
    return found


def advice(compare: dict[str, Any]) -> list[str]:
    """The recommended type, the rule, and what the rule says of each type."""
    lines = [f"{kind}: {why}" for kind, why in compare["reasons"].items()]
    return [f"recommended is {compare['recommended']}: {compare['rule']}", *lines]


def verdict(recipe: Recipe, comparisons: list[dict[str, Any]], why: str = "") -> list[str]:
    """What is wrong, each with where the model was lost: in the artefact itself or in one that it is made from.

    `why` is what may be wrong with a conversion that is lost (`pipeline.proof.suspects`).
    """
    failed = [row["name"] for row in comparisons if row["problems"]]
    lines = []
    for row in comparisons:
        lost = next((name for name in made_from(recipe, row["name"]) if name in failed), None)
        end = f"it is made from {lost}" if lost else "here the model that was trained is lost"
        if row["name"] == recipe.gguf.full and not lost and why:
            end += f" ({why})"
        lines += [f"{row['name']}: {problem}: {end}" for problem in row["problems"]]
    return lines


def made_from(recipe: Recipe, name: str) -> list[str]:
    """The artefacts on the way from the trained model to this one, first to last."""
    line = {"merge": [], recipe.gguf.full: ["merge"]}
    if name.startswith(SERVED) and recipe.serve.engine == "vllm":
        return [] if recipe.serve.vllm.adapter else ["merge"]
    if name.startswith(SERVED):
        return list(dict.fromkeys(["merge", recipe.gguf.full, name.split()[1]]))
    return line.get(name, ["merge", recipe.gguf.full])


def show(comparisons: list[dict[str, Any]], below: list[str], recommended: str | None) -> None:
    """The table and, below it, the notes; a star marks the recommended type."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, padding=(0, 0))
    for row in comparisons:
        measures = row["measures"]
        error = f" ± {measures['perplexity_error']:.2g}" if "perplexity_error" in measures else ""
        table.add_row(
            row["name"] + (" *" if row["name"] == recommended else ""),
            "[red]FAILED[/red]" if row["problems"] else "[green]same[/green]",
            _number(measures, "bytes", ".0f", 1e6),
            _number(measures, "bits_per_weight", ".2f"),
            _number(measures, "divergence_mean", ".2g") + _half(measures, "divergence_interval", ".1g"),
            _number(measures, "divergence_p99", ".2g"),
            _number(measures, "top1_agreement", ".0%") + _half(measures, "top1_interval", ".0%"),
            _number(measures, "facts_accuracy", ".0%"),
            _number(measures, "greedy_agreement", ".0%"),
            _number(measures, "perplexity", ".4g") + error,
            _number(measures, "prompt_tokens_per_second", ".0f"),
            _number(measures, "decode_tokens_per_second", ".0f"),
            _number(measures, "peak_rss_bytes", ".0f", 1e6),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for note in below:
        console.print(f"note: {note}", markup=False, highlight=False)


def _number(measures: dict[str, Any], name: str, layout: str, unit: float = 1) -> str:
    return format(measures[name] / unit, layout) if name in measures else "-"


def _half(measures: dict[str, Any], name: str, layout: str) -> str:
    """Half of the 95 % interval."""
    return f" ± {format((measures[name][1] - measures[name][0]) / 2, layout)}" if name in measures else ""


if __name__ == "__main__":
    with boundary():
        this = stage("prove")
        recipe = with_environment(recipe_of_arguments(this.module, this.does))
        receipt = up_to_date(this, recipe, prove)
        run = Run.of(recipe)
        comparisons = [*receipt.metrics["comparisons"], *proved_windows(run)]
        if ollama := registered_row(recipe, run):
            comparisons.append(vars(ollama))
        show(comparisons, receipt.metrics["notes"], receipt.metrics["recommended"])
        converted = run.path("gguf", f"{run.name}-{recipe.gguf.full}.gguf")
        head = read_head(converted) if converted.is_file() else None
        why = suspects(read_json(run.path("base", "config.json")), head)
        if problems := verdict(recipe, comparisons, why):
            raise UserError(*problems)
