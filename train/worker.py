"""The work of a training: measure, train, measure again, save; what it finds is JSON, so a child can report it."""

import json
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run
from pipeline.error import Stopped
from pipeline.files import write_whole
from pipeline.rows import heldout
from train.tokens import Tokens
from train.trainer.journal import recorded
from train.tuners import model_to_train, save

log = logging.getLogger("truetune")


def work(
    recipe: Recipe,
    run: Run,
    tokens: Tokens,
    resume_from: Path | None,
    trackers: Sequence[str],
    full_speed: float | None,
) -> dict[str, Any]:
    """Write `trained/` and `answers.jsonl`; the receipt's metrics.

    Args:
        trackers: those that transformers tells, by its names.
        full_speed: tokens a second of this machine at its peak, where that is known.

    Raises:
        UserError: the training diverged or memory does not suffice; the last good checkpoint stays.
        Stopped: by a signal, after a checkpoint.
    """
    from transformers import AutoTokenizer, set_seed

    from train.preview import write_preview
    from train.trainer.metrics import curves

    method = import_module(f"train.methods.{recipe.train.method}")
    with recorded(recipe, run, resume_from) as journal:
        tokenizer, model = AutoTokenizer.from_pretrained(run.path("base")), model_to_train(recipe, run)
        trainer = method.trainer(
            recipe,
            run,
            tokenizer,
            model,
            tokens.datasets,
            trackers,
            journal=journal,
            full_speed=full_speed,
            callbacks=curves(recipe.train.tracker, run.path("logs", journal.began())),
        )
        write_preview(recipe, run, tokens, tokenizer, trainer.train_dataset, trainer.args.max_length)
        kept = run.path("checkpoints", "before.json")
        if not kept.is_file():  # nothing is trained yet, so this is the base; who resumes must not measure it again
            write_whole(kept, json.dumps(method.measure(trainer, recipe, run, "before")))
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        _tell("before", before)
        if resume_from:
            log.info("resuming from %s", resume_from)
        set_seed(recipe.seed)  # what was measured before has thrown dice, and is not measured again by who resumes
        trainer.train(resume_from, None if recipe.train.label_smoothing else before["validation_loss"])
        if trainer.stopping.wish:
            at = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, its checkpoint is saved"
            raise Stopped(f"{at}: 'make train RECIPE={recipe.name}' resumes from there", trainer.stopping.wish)
        after = method.measure(trainer, recipe, run, "after")
        _tell("after", after)
        save(recipe, trainer.model, run)
        _save_answers(run, before.pop("answers"), after.pop("answers"))
        return {
            "before": before,
            "after": after,
            **trainer.summary(),
            "interruptions": journal.interruptions(),
            "peak_gpu_bytes": _peak_gpu_bytes(),
        }


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def _tell(when: str, measured: dict[str, Any]) -> None:
    loss = "not measured" if measured["validation_loss"] is None else f"{measured['validation_loss']:.3f}"
    log.info("%s: validation loss %s, key facts %.0f %%", when, loss, 100 * measured["key_fact_accuracy"])


def _save_answers(run: Run, before: list[str], after: list[str]) -> None:
    rows = [
        {"question": question["messages"][-1]["content"], "facts": question["facts"], "before": old, "after": new}
        for question, old, new in zip(heldout(run.path("data")), before, after, strict=True)
    ]
    write_whole(run.path("answers.jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
