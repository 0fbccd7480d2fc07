"""Add the adapter to the full-precision base:  python -m convert.merge RECIPE

The base is read from its safetensors in the recipe's precision, whatever it was trained in: merging into a quantized
base loses the adapter's small values (peft#2321). What is on disk afterwards is compared with the adapter's logits.
"""

import logging
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

from convert.model import load
from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fresh_folder, put_in_place
from pipeline.rows import row_text, rows

log = logging.getLogger("truetune")
PACKAGES = ("torch", "transformers", "peft", "safetensors")
PROBES = 4
PROBE_TOKENS = 128
# Largest relative error of the logits: rounding alone stays below a tenth of it, a lost or doubled adapter far above.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}


def merge(recipe: Recipe, run: Run) -> Made:
    """Write `merged/`, a plain Hugging Face folder.

    Raises:
        UserError: the adapter changes nothing, or the merged weights do not give the adapter's logits.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    precision = recipe.merge.precision
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    probes = probe_ids(tokenizer, run.path("data"))

    model = load(run.path("base"), precision)
    base_logits = logits(model, probes)
    adapted = PeftModel.from_pretrained(model, run.path("adapter"))
    adapter_logits = logits(adapted, probes)
    folder = fresh_folder(run.path(".merged.tmp"))
    adapted.merge_and_unload(safe_merge=True).save_pretrained(folder)
    del adapted, model
    copy_settings(run.path("base"), folder)

    merged = load(folder, precision)
    difference = compare(logits(merged, probes), adapter_logits)
    effect = compare(base_logits, adapter_logits)
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
            "adapter_effect": effect["relative_error"],
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


def logits(model: Any, probes: list[list[int]]) -> Any:
    """(all probes' tokens, vocabulary) float32 logits."""
    import torch

    with torch.inference_mode():
        asked = [torch.tensor([probe], device=model.device) for probe in probes]
        return torch.cat([model(ids).logits[0].float().cpu() for ids in asked])


def compare(found: Any, wanted: Any) -> dict[str, float]:
    """How far logits are from the wanted ones: relative error (of norms) and share of equal most likely tokens."""
    error = (found - wanted).norm() / wanted.norm()
    agreement = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return {"relative_error": float(error), "top1_agreement": float(agreement)}


def check(difference: dict[str, float], effect: dict[str, float], precision: str) -> None:
    """Raise UserError if the merged model is not the adapted one, or if the adapter does nothing."""
    if effect["relative_error"] == 0:
        raise UserError("the adapter changes no logit of the base, so nothing was learned: train longer or faster")
    if not difference["relative_error"] <= BOUNDS[precision]:
        raise UserError(
            f"the merged logits differ from the adapter's by {difference['relative_error']:.2g} "
            f"(allowed: {BOUNDS[precision]:.2g}): set merge.precision=float32, or report this base as a bug"
        )


def copy_settings(base: Path, merged: Path) -> None:
    """The tokenizer, its chat template, the stop tokens and the licence, byte for byte; the model wrote its own config.

    The base's card speaks of the base only.
    """
    for file in base.iterdir():
        weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if not weights and file.name not in ("config.json", "README.md"):
            shutil.copy(file, merged / file.name)


if __name__ == "__main__":
    command("merge", merge)
