"""A tiny training on preferences: pairs about animals, and the recipe that learns from them."""

import json
from pathlib import Path

from conftest import ANIMALS, Workplace

RECIPE = """
base_model: random
data: {{train: pairs.jsonl, heldout: questions.jsonl, validation: 0.5}}
train: {{method: {method}, epochs: 2, learning_rate: 1e-3, max_length: 160, max_new_tokens: 4, precision: float32,
        batch_size: 2, {more}}}
gguf: {{types: [Q8_0]}}
"""


def write_recipe(method: str, **keys: object) -> None:
    """Write pairs.jsonl and line.yaml into the current folder."""
    rows = [
        {
            "prompt": f"What {how} the {animal}?",
            "chosen": f"The {animal} {how} its name.",
            "rejected": f"I would rather not {how[:-1]} anything about a {animal}.",
        }
        for animal in ANIMALS
        for how in ("says", "sings")
    ]
    if method == "kto":
        sides = (("chosen", True), ("rejected", False))
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": good} for row in rows for side, good in sides
        ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("line.yaml").write_text(RECIPE.format(method=method, more=json.dumps(keys)[1:-1]))


def outcome(work: Workplace) -> dict[str, object]:
    """What must not depend on interruptions: the curves, the scores, and the bytes of what was trained."""
    receipt = work.receipt("train")
    weights = {path: mark for path, mark in receipt["outputs"].items() if path.endswith(".safetensors")}
    names = ("loss_curve", "validation_curve", "steps", "best_step", "tokens", "supervised_tokens", "after", "scores")
    return {"trained": weights} | {name: receipt["metrics"][name] for name in names}
