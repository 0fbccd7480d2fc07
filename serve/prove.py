"""Prove that the served model is the trained one:  python -m serve.prove RECIPE

Starts the engine as `make serve` does, asks it the reference's probes over HTTP, and prints one table with what
`convert.prove` found before. Exits 1 if anything that was made is not the model that was trained.
"""

import sys
from typing import Any

from recipe import Made, Recipe, Run, UserError
from recipe.command import boundary, recipe_of_arguments, up_to_date
from recipe.proof import Comparison, first_difference, read_comparisons
from recipe.reference import CONTINUATION_TOKENS, Probe, Reference, read_reference
from recipe.stages import stage
from serve.api import served_file, settings_of
from serve.endpoint import ask, free_port
from serve.key import make_key
from serve.supervisor import Supervisor

COLUMNS = ("artefact", "verdict", "divergence", "99th pct", "top-1", "greedy", "perplexity", "stops")


def prove(recipe: Recipe, run: Run) -> Made:
    """Judge every artefact; the receipt's metrics hold all comparisons and whether all passed."""
    reference = read_reference(run.path("reference"))
    comparisons = [*read_comparisons(run.path("parity.jsonl")), prove_served(recipe, run, reference)]
    return Made(
        outputs=[],
        metrics={
            "passed": not any(comparison.problems for comparison in comparisons),
            "comparisons": [vars(comparison) for comparison in comparisons],
        },
        packages=("xllamacpp",),
    )


def prove_served(recipe: Recipe, run: Run, reference: Reference) -> Comparison:
    """The endpoint: the template's bytes and the token ids that it makes of the probes, and its greedy answers."""
    comparison = Comparison(f"served {recipe.served_type}")
    path, known = served_file(recipe, run)
    settings, key = settings_of(recipe, path, free_port()), make_key()
    with Supervisor(settings, key, run.path("prove.log"), known) as supervisor:
        if problem := supervisor.start():
            raise UserError(f"{path} cannot be served: the engine {problem}: see {supervisor.log_file}")
        fitting = [p for p in reference.probes if len(p.ids) + CONTINUATION_TOKENS <= recipe.serve.context]
        matched = stopped = 0
        for probe in fitting:
            if not same_prompt(comparison, settings.port, key, probe):
                break
            text, reason, prompt_tokens = answer(settings.port, key, settings.name, probe)
            if prompt_tokens != len(probe.ids):
                comparison.problems.append(
                    f"token ids: probe '{probe.name}' has {prompt_tokens} when chatting, trained with {len(probe.ids)}"
                )
                break
            stopped += probe.stopped and reason == "stop"
            matched += text == expected_text(settings.port, key, probe)
    ending = sum(probe.stopped for probe in fitting)
    if ending and not stopped and not comparison.problems:
        comparison.problems.append(
            f"stop token: the trained model ends {ending} answers by itself, the served one none"
        )
    comparison.measures |= {"greedy_agreement": matched / max(len(fitting), 1), "stops": not ending or stopped > 0}
    return comparison


def same_prompt(comparison: Comparison, port: int, key: str, probe: Probe) -> bool:
    """Whether the server renders and tokenizes the messages as training did."""
    _, rendered = ask(port, "/apply-template", key, {"messages": probe.messages})
    prompt = rendered.get("prompt", "")
    if prompt != probe.prompt:
        at = first_difference(list(prompt.encode()), list(probe.prompt.encode())) or 0
        comparison.problems.append(
            f"chat template: probe '{probe.name}', byte {at}: "
            f"{prompt.encode()[at : at + 20]!r}, trained with {probe.prompt.encode()[at : at + 20]!r}"
        )
        return False
    ids = tokens(port, key, prompt)
    at = first_difference(ids, probe.ids)
    if at is not None:
        comparison.problems.append(
            f"token ids: probe '{probe.name}', position {at}: {ids[at : at + 1]}, trained with {probe.ids[at : at + 1]}"
        )
    return at is None


def tokens(port: int, key: str, text: str) -> list[int]:
    """The server's tokens of a rendered prompt, with what it adds by itself."""
    _, made = ask(port, "/tokenize", key, {"content": text, "add_special": True, "parse_special": True})
    return list(made.get("tokens", []))


def answer(port: int, key: str, name: str, probe: Probe) -> tuple[str, str, int]:
    """(text, why it ended, tokens of the prompt) of the greedy answer, asked as any client asks."""
    body = {"model": name, "messages": probe.messages, "temperature": 0, "max_tokens": CONTINUATION_TOKENS}
    status, made = ask(port, "/v1/chat/completions", key, body, timeout=600)
    if status != 200:
        raise UserError(f"the engine refuses probe '{probe.name}': {made.get('error', made)}")
    choice = made["choices"][0]
    text = (choice["message"].get("reasoning_content") or "") + (choice["message"].get("content") or "")
    return text, choice["finish_reason"], made["usage"]["prompt_tokens"]


def expected_text(port: int, key: str, probe: Probe) -> str:
    """The reference's answer as text, without the token that ends the turn."""
    spoken = probe.continuation[:-1] if probe.stopped else probe.continuation
    _, made = ask(port, "/detokenize", key, {"tokens": spoken})
    return str(made.get("content", ""))


def show(comparisons: list[dict[str, Any]]) -> None:
    """The table and, below it, what is wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in comparisons:
        measures = row["measures"]
        error = f" ± {measures['perplexity_error']:.2g}" if "perplexity_error" in measures else ""
        table.add_row(
            row["name"],
            "[red]FAILED[/red]" if row["problems"] else "[green]same[/green]",
            _number(measures, "divergence_mean", ".2g"),
            _number(measures, "divergence_p99", ".2g"),
            _number(measures, "top1_agreement", ".0%"),
            _number(measures, "greedy_agreement", ".0%"),
            _number(measures, "perplexity", ".4g") + error,
            {True: "yes", False: "no"}.get(measures.get("stops"), "-"),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _number(measures: dict[str, Any], name: str, layout: str) -> str:
    return format(measures[name], layout) if name in measures else "-"


if __name__ == "__main__":
    with boundary():
        this = stage("prove")
        recipe = recipe_of_arguments(this.module, this.does)
        receipt = up_to_date(this, recipe, prove)
        show(receipt.metrics["comparisons"])
        if not receipt.metrics["passed"]:
            raise UserError(
                *(
                    f"{row['name']}: {problem}: this is not the model that was trained"
                    for row in receipt.metrics["comparisons"]
                    for problem in row["problems"]
                )
            )
