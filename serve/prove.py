"""Prove that the served model is the trained one:  python -m serve.prove RECIPE

Starts the engine as `make serve` does, asks it the reference's probes over HTTP, and prints one table with what
`convert.prove` found before. Exits 1 if anything that was made is not the model that was trained.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

from recipe import Made, Recipe, Run, UserError
from recipe.command import boundary, recipe_of_arguments, up_to_date
from recipe.proof import Comparison, first_difference, read_comparisons, same_share
from recipe.recommend import chosen
from recipe.reference import CONTINUATION_TOKENS, Probe, Reference, read_reference
from recipe.report import report
from recipe.stages import stage
from serve.api import served_file, settings_of
from serve.endpoint import ERRORS, ask, free_port
from serve.key import make_key
from serve.register import row as registered_row
from serve.supervisor import Supervisor

SERVED = "served"
LEAST_OF_FILE = 0.5  # near ties fall otherwise in the server, whose cache has 16 bits; another model agrees in nothing
COLUMNS = ("artefact", "verdict", "MB", "bits", "divergence", "99th pct", "top-1", "facts", "greedy", "perplexity",
           "prompt t/s", "decode t/s", "RSS MB")  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """Where the engine listens, and the name of its model."""

    port: int
    key: str
    name: str

    def ask(self, path: str, body: dict[str, Any], timeout: float = 60) -> tuple[int, Any]:
        """HTTP status and JSON."""
        return ask(self.port, path, self.key, body, timeout)


def prove(recipe: Recipe, run: Run) -> Made:
    """Judge every artefact; the receipt's metrics hold all comparisons and whether all passed."""
    reference = read_reference(run.path("reference"))
    before = read_comparisons(run.path("parity.jsonl"))
    recipe = chosen(recipe, run)
    file = next((row for row in before if row.name == recipe.served_type), None)
    comparisons = [*before, prove_served(recipe, run, reference, file)]
    return Made(
        outputs=[],
        metrics={
            "passed": not any(comparison.problems for comparison in comparisons),
            "comparisons": [vars(comparison) for comparison in comparisons],
            "notes": [*notes(reference, comparisons[-1]), *advice(run.receipt("parity").metrics)],
            "recommended": run.receipt("parity").metrics["recommended"],
        },
        packages=("xllamacpp",),
    )


def prove_served(recipe: Recipe, run: Run, reference: Reference, file: Comparison | None) -> Comparison:
    """The endpoint: the template's bytes and the token ids that it makes of the probes, and its greedy answers.

    `file` is what was found of the served GGUF itself: its server cannot agree more, and must not agree much less.
    """
    comparison = Comparison(f"{SERVED} {recipe.served_type}")
    path, known = served_file(recipe, run)
    settings, key = settings_of(recipe, path, free_port()), make_key()
    with Supervisor(settings, key, run.path("prove.log"), known) as supervisor:
        if problem := supervisor.start():
            comparison.problems.append(f"{path} cannot be served: the engine {problem}: see {supervisor.log_file}")
            return comparison
        try:
            ask_probes(comparison, Engine(settings.port, key, settings.name), reference, settings.context)
        except (*ERRORS, LookupError) as error:
            comparison.problems.append(f"the engine fails ({error!r}): see {supervisor.log_file}")
    agreed = comparison.measures.get("greedy_share")
    expected = file.measures.get("greedy_share", 0.0) if file else 0.0
    if agreed is not None and not comparison.problems and agreed < LEAST_OF_FILE * expected:
        comparison.problems.append(
            f"answers: {agreed:.0%} of them are as the trained model's, of the same file read directly {expected:.0%}"
        )
    return comparison


def ask_probes(comparison: Comparison, engine: Engine, reference: Reference, context: int) -> None:
    """Ask all probes that fit the context; of one that does not, the engine must say so instead of cutting it."""
    fitting = [probe for probe in reference.probes if len(probe.ids) + CONTINUATION_TOKENS <= context]
    comparison.measures |= {"probes": len(fitting), "too_long": len(reference.probes) - len(fitting)}
    if not fitting:
        comparison.problems.append(f"context: none of {len(reference.probes)} probes fits serve.context {context}")
    stopped, shares = 0, []
    for probe in reference.probes:
        if not same_prompt(comparison, engine, probe):
            return
        status, text, reason, prompt_tokens = answer(engine, probe)
        if len(probe.ids) >= context:
            if status == 200 and prompt_tokens < len(probe.ids):
                comparison.problems.append(
                    f"context: probe '{probe.name}' has {len(probe.ids)} tokens, more than {context}, "
                    f"and was cut to {prompt_tokens} without a word"
                )
                return
        elif status != 200:
            comparison.problems.append(f"probe '{probe.name}' is refused: {text}")
            return
        elif prompt_tokens != len(probe.ids):
            comparison.problems.append(
                f"token ids: probe '{probe.name}' has {prompt_tokens} when chatting, trained with {len(probe.ids)}"
            )
            return
        elif probe in fitting:
            stopped += probe.stopped and reason == "stop"
            shares.append(same_share(text, expected_text(engine, probe)))
    ending = sum(probe.stopped for probe in fitting)
    if ending and not stopped:
        comparison.problems.append(
            f"stop token: the trained model ends {ending} answers by itself, the served one none"
        )
    comparison.measures |= {
        "greedy_agreement": shares.count(1) / max(len(shares), 1),
        "greedy_share": sum(shares) / max(len(shares), 1),
        "stops": not ending or stopped > 0,
    }


def notes(reference: Reference, served: Comparison) -> list[str]:
    """What is no fault of an artefact, and yet to be known."""
    found = []
    if too_long := served.measures.get("too_long"):
        found.append(f"{served.name}: {too_long} of {len(reference.probes)} probes do not fit serve.context")
    if not any(probe.stopped for probe in reference.probes):
        found.append("the trained model itself ended no answer: where it is to stop was not learned, or not yet")
    return found


def advice(parity: dict[str, Any]) -> list[str]:
    """The recommended type, the rule, and what the rule says of each type."""
    lines = [f"{kind}: {why}" for kind, why in parity["reasons"].items()]
    return [f"recommended is {parity['recommended']}: {parity['rule']}", *lines]


def same_prompt(comparison: Comparison, engine: Engine, probe: Probe) -> bool:
    """Whether the server renders and tokenizes the messages as training did."""
    status, rendered = engine.ask("/apply-template", asked(probe))
    if status != 200:
        comparison.problems.append(f"chat template: probe '{probe.name}' is refused: {refusal(rendered)}")
        return False
    prompt = rendered["prompt"]
    ids = tokens(engine, prompt)
    # The server takes off a BOS that the template writes, and puts it on again with the tokens.
    bos = text_of(engine, tokens(engine, "")[:1])
    if prompt != probe.prompt and probe.prompt.startswith(bos):
        prompt = bos + prompt
    if prompt != probe.prompt:
        at = first_difference(list(prompt.encode()), list(probe.prompt.encode())) or 0
        comparison.problems.append(
            f"chat template: probe '{probe.name}', byte {at}: "
            f"{prompt.encode()[at : at + 20]!r}, trained with {probe.prompt.encode()[at : at + 20]!r}"
        )
        return False
    position = first_difference(ids, probe.ids)
    if position is not None:
        found, wanted = ids[position : position + 1], probe.ids[position : position + 1]
        comparison.problems.append(
            f"token ids: probe '{probe.name}', position {position}: {found}, trained with {wanted}"
        )
    return position is None


def asked(probe: Probe) -> dict[str, Any]:
    """The probe as a request of OpenAI's API, which writes the arguments of a tool's call as JSON text."""
    messages = json.loads(json.dumps(probe.messages))
    for call in (call for message in messages for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {"messages": messages} | ({"tools": probe.tools} if probe.tools else {})


def tokens(engine: Engine, text: str) -> list[int]:
    """The server's tokens of a rendered prompt, with what it adds by itself."""
    _, made = engine.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
    return list(made.get("tokens", []))


def answer(engine: Engine, probe: Probe) -> tuple[int, str, str, int]:
    """(status, text, why it ended, tokens of the prompt) of the greedy answer, asked as any client asks."""
    body = asked(probe) | {"model": engine.name, "temperature": 0, "max_tokens": CONTINUATION_TOKENS}
    status, made = engine.ask("/v1/chat/completions", body, timeout=600)
    if status != 200:
        return status, refusal(made), "", 0
    choice = made["choices"][0]
    text = (choice["message"].get("reasoning_content") or "") + (choice["message"].get("content") or "")
    return status, text, choice["finish_reason"], made["usage"]["prompt_tokens"]


def refusal(made: dict[str, Any]) -> str:
    """What the server says is wrong."""
    error = made.get("error", made)
    return str(error.get("message", error) if isinstance(error, dict) else error).splitlines()[0]


def expected_text(engine: Engine, probe: Probe) -> str:
    """The reference's answer as text, without the token that ends the turn."""
    return text_of(engine, probe.continuation[:-1] if probe.stopped else probe.continuation)


def text_of(engine: Engine, ids: list[int]) -> str:
    """The server's text of tokens."""
    _, made = engine.ask("/detokenize", {"tokens": ids})
    return str(made.get("content", ""))


def verdict(recipe: Recipe, comparisons: list[dict[str, Any]]) -> list[str]:
    """What is wrong, each with where the model was lost: in the artefact itself or in one that it is made from."""
    failed = [row["name"] for row in comparisons if row["problems"]]
    lines = []
    for row in comparisons:
        lost = next((name for name in made_from(recipe, row["name"]) if name in failed), None)
        end = f"it is made from {lost}" if lost else "here the model that was trained is lost"
        lines += [f"{row['name']}: {problem}: {end}" for problem in row["problems"]]
    return lines


def made_from(recipe: Recipe, name: str) -> list[str]:
    """The artefacts on the way from the trained model to this one, first to last."""
    line = {"merge": [], recipe.gguf.full: ["merge"]}
    if name.startswith(SERVED):
        return list(dict.fromkeys(["merge", recipe.gguf.full, name.removeprefix(f"{SERVED} ")]))
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
            _number(measures, "divergence_mean", ".2g"),
            _number(measures, "divergence_p99", ".2g"),
            _number(measures, "top1_agreement", ".0%"),
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


if __name__ == "__main__":
    with boundary():
        this = stage("prove")
        recipe = recipe_of_arguments(this.module, this.does)
        receipt = up_to_date(this, recipe, prove)
        comparisons = list(receipt.metrics["comparisons"])
        if ollama := registered_row(recipe, Run(recipe.name)):
            comparisons.append(vars(ollama))
        show(comparisons, receipt.metrics["notes"], receipt.metrics["recommended"])
        report(recipe, Run(recipe.name))
        if any(row["problems"] for row in comparisons):
            raise UserError(*verdict(recipe, comparisons))
