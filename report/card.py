"""The model card of a run, in the Hub's format: metadata and Markdown from the same facts as the page."""

import re
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.units import duration, number, share, size
from report.summary import lineage, quantizations, recommended, served_type
from report.verdict import verdict

HERE = Path(__file__).parent
HELDOUT = {"name": "Held-out questions of this recipe", "type": "heldout"}
VALIDATION = {"name": "Validation split of this recipe", "type": "validation"}


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
    jinja.filters |= {"size": size, "duration": duration, "share": share, "number": number, "plain": plain}
    told = verdict(recipe, run)
    files, choice = quantizations(recipe, run, told), recommended(recipe, run)
    body = jinja.get_template("card.md.jinja").render(
        recipe=recipe,
        verdict=told,
        data=run.find_receipt("data"),
        base=run.find_receipt("base"),
        train=run.receipt("train"),
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
        "model-index": [{"name": recipe.name, "results": results}] if (results := _results(run)) else None,
    }
    return {key: value for key, value in found.items() if value}


def _results(run: Run) -> list[dict[str, Any]]:
    """The trained model's own scores, as the Hub's evaluation results."""
    after = run.receipt("train").metrics.get("after", {})
    scores = (
        (HELDOUT, "accuracy", "Key facts in the answers", after.get("key_fact_accuracy")),
        (VALIDATION, "loss", "Nats a token of the assistant's words", after.get("validation_loss")),
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
