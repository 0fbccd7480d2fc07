"""Held-out questions, and the validation loss, of a model in training: what every method measures before and after."""

from typing import Any

from pipeline import Recipe, Run
from pipeline.model import answers
from pipeline.rows import heldout
from pipeline.scores import key_fact_accuracy


def asked(trainer: Any, recipe: Recipe, run: Run, when: str) -> dict[str, Any]:
    """Validation loss, key-fact accuracy and the answers that it was counted in."""
    questions, loss = list(heldout(run.path("data"))), trainer.validation_loss()
    with trainer.autocast_smart_context_manager():
        found = answers(
            trainer.model, trainer.processing_class, questions, recipe.train.max_new_tokens, f"questions, {when}"
        )
    return {
        "validation_loss": loss,
        "key_fact_accuracy": round(key_fact_accuracy(found, questions), 4),
        "answers": found,
    }
