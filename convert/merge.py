"""Make one set of full-precision weights of what was trained:  python -m convert.merge RECIPE

An adapter is added to the base, which is read from its safetensors in the recipe's precision, whatever it was trained
in: merging into a quantized base loses the adapter's small values (peft#2321). Whole weights are linked, or rounded to
the recipe's precision. What is on disk afterwards is compared with the trained model's logits.
"""

import logging
import os
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fresh_folder, put_in_place
from pipeline.model import Trained, copy_settings, load, load_trained, logits
from pipeline.rows import row_text, rows

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "peft", "safetensors")
PROBES = 4
PROBE_TOKENS = 128
# Largest relative error of logits: rounding alone stays below a tenth of it, a lost or doubled adapter far above.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}


def merge(recipe: Recipe, run: Run) -> Made:
    """Write `merged/`, a plain Hugging Face folder.

    Raises:
        UserError: training changed nothing, or the merged weights do not give the trained model's logits.
    """
    from transformers import AutoTokenizer

    kind, precision = Trained.read(run.path("trained")), recipe.merge.precision
    if not kind.mergeable:
        raise UserError(f"train.tuner={kind.tuner} leaves an adapter that no weights can take: choose another tuner")
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    probes = probe_ids(tokenizer, run.path("data"))

    base = load(run.path("base"), precision)
    base_logits = all_logits(base, probes)
    trained = load_trained(run, precision, base)
    trained_logits = all_logits(trained, probes)
    folder = fresh_folder(run.path(".merged.tmp"))
    if kind.kind == "adapter":
        trained.merge_and_unload(safe_merge=True).save_pretrained(folder)
    elif precision == "float32":  # as training keeps them
        link_weights(run.path("trained"), folder)
    else:
        trained.save_pretrained(folder)
    del trained, base
    copy_settings(run.path("base"), folder)

    merged = load(folder, precision)
    difference = compare(all_logits(merged, probes), trained_logits)
    effect = compare(base_logits, trained_logits)
    largest = max(float(tensor.abs().max()) for tensor in merged.state_dict().values())
    check(difference, effect, precision)
    put_in_place(folder, run.path("merged"))
    return Made(
        outputs=[run.path("merged")],
        metrics={
            "precision": precision,
            "relative_error": difference["relative_error"],
            "relative_error_bound": BOUNDS[precision],
            "top1_agreement": difference["top1_agreement"],
            "effect_of_training": effect["relative_error"],
            "largest_weight": largest,
            "probe_tokens": sum(len(probe) for probe in probes),
        },
        packages=PACKAGES,
    )


def probe_ids(tokenizer: Any, data: Path) -> list[list[int]]:
    """Token ids of a few rendered conversations, of the validation split where there is one."""
    found = islice(chain(rows(data, "validation"), rows(data, "train")), PROBES)
    texts = [row_text(tokenizer, row) for row in found]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:PROBE_TOKENS] for text in texts]


def all_logits(model: Any, probes: list[list[int]]) -> Any:
    """(all probes' tokens, vocabulary) float32 logits."""
    import torch

    return torch.cat([logits(model, probe) for probe in probes])


def compare(found: Any, wanted: Any) -> dict[str, float]:
    """How far logits are from the wanted ones: relative error (of norms) and share of equal most likely tokens."""
    error = (found - wanted).norm() / wanted.norm()
    agreement = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return {"relative_error": float(error), "top1_agreement": float(agreement)}


def check(difference: dict[str, float], effect: dict[str, float], precision: str) -> None:
    """Raise UserError if the merged model is not the trained one, or if training changed nothing."""
    if effect["relative_error"] == 0:
        raise UserError("training changed no logit of the base, so nothing was learned: train longer or faster")
    if not difference["relative_error"] <= BOUNDS[precision]:
        raise UserError(
            f"the merged logits differ from the trained model's by {difference['relative_error']:.2g} "
            f"(allowed: {BOUNDS[precision]:.2g}): set merge.precision=float32, or report this base as a bug"
        )


def link_weights(source: Path, target: Path) -> None:
    """The same bytes under another name where the disk allows it, and a config of their own."""
    for file in source.glob("*.safetensors*"):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy(file, target / file.name)
    shutil.copy(source / "config.json", target / "config.json")


if __name__ == "__main__":
    command("merge", merge)
