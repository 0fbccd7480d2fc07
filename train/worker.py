"""The work of a training: measure, train, measure again, save; what it finds is JSON, so a child can report it.

torchrun starts `python -m train.run TASK` (train.launch) in each process; all take part, the first one writes.
"""

import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError, load
from pipeline.error import Stopped
from pipeline.files import write_whole
from pipeline.methods import METHODS
from pipeline.model import answers
from pipeline.rows import heldout
from pipeline.scores import Score, key_fact_accuracy, line
from train.launch import is_launched, rank
from train.scoring.preference import less_likely
from train.tokens import Tokens, opened, write_preview
from train.trainer.journal import Diverged, is_shortage, recorded, shortage
from train.tuners import model_to_train, save

PARENT_SECONDS = 0.5

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

    from train.trainer.metrics import curves

    method = import_module(f"train.methods.{recipe.train.method}")
    first = rank() == 0
    with recorded(recipe, run, resume_from) if first else nullcontext() as journal:
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
            callbacks=curves(recipe.train.tracker, run.path("logs", journal.began())) if journal else (),
        )
        if first:
            write_preview(recipe, run, tokens, tokenizer, trainer.rows())
        kept = run.path("checkpoints", "before.json")

        def measured_before() -> float | None:
            """What the base scores; it throws dice, so that who trains takes the seed once more."""
            if not kept.is_file():  # nothing is trained yet, so this is the base; who resumes must not measure it again
                found = _measured(method, trainer, recipe, run, None)
                if first:
                    write_whole(kept, json.dumps(found))
            trainer.accelerator.wait_for_everyone()
            found = json.loads(kept.read_text(encoding="utf-8"))
            _tell(recipe, "before", found)
            set_seed(recipe.seed)
            return None if recipe.train.label_smoothing else found["validation_loss"]

        if resume_from:
            log.info("resuming from %s", resume_from)
        trainer.train(resume_from, measured_before)
        if trainer.stopping.wish:
            at = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, its checkpoint is saved"
            raise Stopped(f"{at}: 'make train RECIPE={recipe.given}' resumes from there", trainer.stopping.wish)
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        after = _measured(method, trainer, recipe, run, before)
        _tell(recipe, "after", after)
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_launched() else None  # all take part
        if journal is None:  # the first alone writes
            return {}
        save(recipe, trainer.accelerator.unwrap_model(trainer.model), run, weights)
        _save_answers(run, before.pop("answers"), after.pop("answers"))
        for measured in (before, after):
            measured.pop("rows", None)
        return {
            "scores": after.pop("scores", []),
            "before": before,
            "after": after,
            **trainer.summary(),
            "interruptions": journal.interruptions(),
            "peak_gpu_bytes": _peak_gpu_bytes(),
        }


def _measured(method: Any, trainer: Any, recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """Validation loss, key-fact accuracy, the answers that it was counted in, and what the method itself measures."""
    questions, loss = list(heldout(run.path("data"))), trainer.validation_loss()
    what = f"questions, {'after' if before else 'before'}"
    with trainer.autocast_smart_context_manager():
        found = answers(trainer.model, trainer.processing_class, questions, recipe.train.max_new_tokens, what)
    return {
        "validation_loss": loss,
        "key_fact_accuracy": round(key_fact_accuracy(found, questions), 4),
        "answers": found,
        **method.measure(trainer, recipe, run, before),
    }


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def _tell(recipe: Recipe, when: str, measured: dict[str, Any]) -> None:
    loss = "not measured" if measured["validation_loss"] is None else f"{measured['validation_loss']:.3f}"
    log.info("%s: validation loss %s, key facts %.0f %%", when, loss, 100 * measured["key_fact_accuracy"])
    found = [Score.of(row) for row in measured.get("scores", ())]
    for score in found:
        log.info("%s: %s", when, line(score))
    if fallen := less_likely(found):
        dearer = f", or raise train.{recipe.train.method}.beta" if METHODS[recipe.train.method].asked else ""
        log.warning("the better answers became less likely (%s): lower train.learning_rate%s", line(fallen), dearer)


def _save_answers(run: Run, before: list[str], after: list[str]) -> None:
    rows = [
        {"question": question["messages"][-1]["content"], "facts": question["facts"], "before": old, "after": new}
        for question, old, new in zip(heldout(run.path("data")), before, after, strict=True)
    ]
    write_whole(run.path("answers.jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def report(task: Path) -> int:
    """Do the work as one of several processes and write beside `task` what came of it; the exit status.

    It is 0 where all processes end alike. Else torchrun ends the others.
    """
    import torch

    given = json.loads(task.read_text(encoding="utf-8"))
    _end_with(os.getppid())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logging.getLogger().setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    name, *overrides = given["arguments"]
    recipe = load(name, overrides or None)
    run, status = Run.of(recipe), 0
    found: dict[str, Any] = {}
    resume_from = Path(given["resume_from"]) if given["resume_from"] else None
    try:
        tokens = opened(recipe, run)
        found["metrics"] = work(recipe, run, tokens, resume_from, given["trackers"], given["full_speed"])
    except Stopped as stopped:
        found = {"stopped": stopped.code - 128, "message": str(stopped)}
    except Diverged:  # the first process tells it
        found = {}
    except UserError as error:
        found, status = {"problems": error.problems}, 0 if isinstance(error.__context__, Diverged) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        words: dict[str, Any] = (
            {"problems": shortage(recipe, run).problems}
            if is_shortage(error)
            else {"traceback": traceback.format_exc()}
        )
        found, status = words | {"time": time.time()}, 1
    write_whole(task.with_name(f"{rank()}.json"), json.dumps(found))
    return status


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: no signal tells of one that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
