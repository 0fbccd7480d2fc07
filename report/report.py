"""Write a run's page and model card from its receipts:  python -m report.report RECIPE

`runs/<recipe>/report.html` is one file without scripts or requests, for a phone, a desk, the dark and paper. Each of
its sections is a function here or in summary.py, and a block of report.html.jinja; what is not known yet is left out.
The model card, README.md, has the Hub's format: metadata and Markdown from the same facts.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.command import boundary, log, recipe_of_arguments
from pipeline.files import remove, write_whole
from pipeline.methods import METHODS
from pipeline.proof import SAYS, Comparison, badge
from pipeline.recipe import Recipe
from pipeline.run import Receipt, Run
from pipeline.scores import Score, grouped, interval
from pipeline.units import change, duration, figure, number, share, size
from report.chart import HEIGHT, WIDTH, change_chart, loss_chart, size_chart, speed_chart
from report.summary import (
    answers,
    conversations,
    costs,
    evaluated,
    lineage,
    machines,
    quantizations,
    recommended,
    served_type,
    settings,
    verdict,
)

HERE = Path(__file__).parent
FILTERS = {"size": size, "duration": duration, "share": share, "number": number}
HELDOUT = {"name": "Held-out questions of this recipe", "type": "heldout"}
VALIDATION = {"name": "Validation split of this recipe", "type": "validation"}


@dataclass(frozen=True)
class Column:
    """A measure in a table: its heading, the group that it stands in, and its cell, None where it was not taken."""

    heading: str
    cell: Callable[[dict[str, Any]], str | None]
    group: str = ""


def measure(key: str, show: Callable[[Any], str]) -> Callable[[dict[str, Any]], str | None]:
    """The cell of one measure."""
    return lambda measures: show(measures[key]) if measures.get(key) is not None else None


def ranged(key: str, spread: str, show: Callable[[Any], str]) -> Callable[[dict[str, Any]], str | None]:
    """The cell of a mean with its 95 % interval."""

    def cell(measures: dict[str, Any]) -> str | None:
        if key not in measures or spread not in measures:
            return measure(key, show)(measures)
        return f"{show(measures[key])} ({' to '.join(map(show, measures[spread]))})"

    return cell


def _perplexity(measures: dict[str, Any]) -> str | None:
    if "perplexity" not in measures:
        return None
    value, error = number(measures["perplexity"]), measures.get("perplexity_error")
    return value if error is None else f"{value} ± {error:.{len(value.partition('.')[2])}f}"


def _fallbacks(measures: dict[str, Any]) -> str | None:
    if "fallbacks" not in measures:
        return None
    fell = sum(measures["fallbacks"].values())
    return f"{fell} of {measures['tensors']}" if fell and "tensors" in measures else str(fell or "none")


def _imatrix(measures: dict[str, Any]) -> str | None:
    without, now = measures.get("divergence_mean_without_imatrix"), measures.get("divergence_mean")
    if not without or now is None:
        return "used" if measures.get("imatrix") else None
    return f"KL {now / without - 1:+.0%}".replace("-", "\N{MINUS SIGN}")


FIDELITY = (
    Column("KL mean", ranged("divergence_mean", "divergence_interval", number)),
    Column("KL 99th pct", measure("divergence_p99", number)),
    Column("top-1", ranged("top1_agreement", "top1_interval", share)),
    Column("same answers", measure("greedy_agreement", share)),
    Column("perplexity", _perplexity),
    Column("ends its turn", measure("stops", {True: "yes", False: "no"}.__getitem__)),
)
QUANTIZED = (
    Column("size", measure("bytes", size), "File"),
    Column("bits a weight", measure("bits_per_weight", "{:.2f}".format), "File"),
    Column("fallen back", _fallbacks, "File"),
    Column("KL mean", measure("divergence_mean", number), "Against the trained model"),
    Column("median", measure("divergence_median", number), "Against the trained model"),
    Column("99th pct", measure("divergence_p99", number), "Against the trained model"),
    Column("top-1", measure("top1_agreement", share), "Against the trained model"),
    Column("imatrix gain", _imatrix, "Against the trained model"),
    Column("perplexity", _perplexity, "On your data"),
    Column("key facts", measure("facts_accuracy", share), "On your data"),
    Column("prompt tokens/s", measure("prompt_tokens_per_second", number), "On this machine"),
    Column("answer tokens/s", measure("decode_tokens_per_second", number), "On this machine"),
    Column("peak memory", measure("peak_rss_bytes", size), "On this machine"),
)


def report(recipe: Recipe, run: Run) -> None:
    """Write `report.html` and `README.md` of a run that has at least trained; of a proof that holds `badge.svg`.

    Raises:
        UserError: it has not.
    """
    run.receipt("train")
    write_whole(run.path("report.html"), page(recipe, run))
    write_whole(run.path("README.md"), card(recipe, run))
    answer = verdict(recipe, run).answer
    if answer in SAYS:
        write_whole(run.path("badge.svg"), badge(answer))
    else:
        remove(run.path("badge.svg"))
    log.info("report: %s", run.path("report.html"))


def page(recipe: Recipe, run: Run) -> str:
    """The page as HTML; whatever comes from a model or from data is escaped by Jinja."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (HERE / "report.css").read_text(encoding="utf-8")
    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters |= FILTERS
    told = verdict(recipe, run)
    files, choice = quantizations(recipe, run, told), recommended(recipe, run)
    found, method = evaluated(recipe, run), METHODS[recipe.train.method]
    return jinja.get_template("report.html.jinja").render(
        recipe=recipe,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        verdict=told,
        data=run.find_receipt("data"),
        data_told=conversations(run),
        base=run.find_receipt("base"),
        train=run.receipt("train"),
        figures=figures(run.receipt("train"), method.loss, files, served_type(recipe, choice)),
        learned=learned(run.receipt("train"), method.loss),
        trained=grouped([Score.of(row) for row in run.receipt("train").metrics.get("scores", ())]),
        planned=planned(run.receipt("train")),
        groups=groups,
        compared=taken(FIDELITY, told.rows),
        files=files,
        measured=taken(QUANTIZED, files),
        choice=choice,
        charts=[chart for chart in (size_chart(files, choice), speed_chart(files, choice)) if chart],
        losses=loss_chart(run.receipt("train"), method.loss),
        evaluation=found,
        changes=change_chart(found.scores) if found else None,
        figure=figure,
        changing=change,
        interval=interval,
        answers=answers(recipe, run),
        links=lineage(recipe, run),
        costs=costs(run),
        machines=machines(run),
        settings=settings(recipe),
        paper=(WIDTH, HEIGHT),
    )


def taken(columns: tuple[Column, ...], rows: list[Comparison]) -> list[Column]:
    """The columns in which some row has something."""
    return [column for column in columns if any(column.cell(row.measures) is not None for row in rows)]


def groups(columns: list[Column]) -> list[tuple[str, int]]:
    """(name, number of columns) of each group, in their order."""
    return [(name, len(list(members))) for name, members in groupby(columns, key=lambda column: column.group)]


def learned(train: Receipt, loss: str) -> list[tuple[str, str, str]]:
    """(measure, of the base, of the trained model) on what was held back; `loss` is what it is counted in."""
    known = (
        (f"validation loss, {loss}", "validation_loss", number),
        ("key facts in answers", "key_fact_accuracy", share),
    )
    before, after = (train.metrics.get(when, {}) for when in ("before", "after"))
    return [
        (name, show(before[key]), show(after[key]))
        for name, key, show in known
        if before.get(key) is not None and after.get(key) is not None
    ]


def planned(train: Receipt) -> list[tuple[str, str, str, str]]:
    """(measure, planned, measured, difference) of a training that was planned."""
    told = train.metrics.get("planned", {})
    measured: dict[str, Any] = {
        "memory_bytes": train.metrics.get("peak_gpu_bytes") or train.peak_rss_bytes,
        "tokens": train.metrics.get("tokens"),
        "tokens_per_second": train.metrics.get("tokens_per_second"),
    }
    named = (("peak memory", "memory_bytes", size), ("tokens", "tokens", number),
             ("tokens a second", "tokens_per_second", number))  # fmt: skip
    return [
        (name, show(told[key]), show(measured[key]), _beyond(measured[key] / told[key]))
        for name, key, show in named
        if told.get(key) and measured[key]
    ]


def _beyond(ratio: float) -> str:
    """A ratio as what it is above or below one."""
    return f"{ratio - 1:+.1%}".replace("-", "\N{MINUS SIGN}") if abs(ratio - 1) >= 5e-4 else "0%"


def figures(train: Receipt, loss: str, files: list[Comparison], kind: str) -> list[tuple[str, str, str]]:
    """(name, value, note) of the few numbers that tell a run at a glance."""
    found = [(name, after, f"the base: {before}") for name, before, after in learned(train, loss)]
    served = next((row.measures for row in files if row.name == kind), {})
    if "bytes" in served:
        found.append(("served file", size(served["bytes"]), kind))
    if "divergence_mean" in served:
        found.append(("KL divergence", number(served["divergence_mean"]), "nats a token, of the served file"))
    if "decode_tokens_per_second" in served:
        found.append(("answers", number(served["decode_tokens_per_second"]), "tokens a second on this machine"))
    return found


def card(recipe: Recipe, run: Run) -> str:
    """The card as Markdown with its metadata in YAML above."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= FILTERS | {"plain": plain}
    told = verdict(recipe, run)
    files, choice = quantizations(recipe, run, told), recommended(recipe, run)
    body = jinja.get_template("card.md.jinja").render(
        recipe=recipe,
        verdict=told,
        badge=SAYS.get(told.answer, ""),
        data=run.find_receipt("data"),
        base=run.find_receipt("base"),
        train=run.receipt("train"),
        loss=METHODS[recipe.train.method].loss,
        scores=[Score.of(row) for row in run.receipt("train").metrics.get("scores", ())],
        figure=figure,
        interval=interval,
        merged=run.find_receipt("merge"),
        files=files,
        served=next((row for row in files if row.name == served_type(recipe, choice)), None),
        choice=choice,
        links=lineage(recipe, run),
    )
    return f"---\n{yaml.safe_dump(metadata(recipe, run), sort_keys=False, allow_unicode=True)}---\n\n{body}"


def metadata(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What the Hub indexes (https://huggingface.co/docs/hub/model-cards); what the base does not state is left out."""
    base, merged = run.find_receipt("base"), run.find_receipt("merge")
    stated, whole = base.metrics if base else {}, merged or recipe.train.tuner == "full"
    found = {
        "license": stated.get("license"),
        "language": stated.get("languages"),
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "base_model": stated.get("model"),
        "base_model_relation": ("finetune" if whole else "adapter") if stated.get("model") else None,
        "tags": ["truetune", recipe.train.tuner, "conversational", *(["gguf"] if run.find_receipt("gguf") else [])],
        "model-index": [{"name": recipe.name, "results": results}] if (results := _results(recipe, run)) else None,
    }
    return {key: value for key, value in found.items() if value}


def _results(recipe: Recipe, run: Run) -> list[dict[str, Any]]:
    """The trained model's own scores, as the Hub's evaluation results."""
    after = run.receipt("train").metrics.get("after", {})
    scores = (
        (HELDOUT, "accuracy", "Key facts in the answers", after.get("key_fact_accuracy")),
        (VALIDATION, "loss", f"Loss, {METHODS[recipe.train.method].loss}", after.get("validation_loss")),
    )
    return [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": dataset,
            "metrics": [{"type": kind, "name": name, "value": round(value, 4)}],
        }
        for dataset, kind, name, value in scores
        if value is not None
    ]


def plain(text: Any) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


if __name__ == "__main__":
    with boundary():
        recipe = recipe_of_arguments("report.report", "Write a run's page and model card from its receipts")
        report(recipe, Run.of(recipe))
