"""Train the model by the recipe's method:  python -m train.run RECIPE

What can be told before it costs is told first. A killed training resumes from its last whole checkpoint.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from pipeline import Made, Recipe, Run, command
from pipeline.command import boundary, recipe_of_arguments
from pipeline.machine import gpus
from pipeline.stages import stage
from train.config import read_config
from train.inspection import refuse, refuse_long_questions
from train.launch import is_launched, launch
from train.launch import run as train_in_processes
from train.planning.prediction import check, check_disk
from train.tokens import tokenized
from train.trackers import bring, prepare, same_run
from train.trainer.checkpoints import open_folder
from train.worker import report, work

# A change of these resumes from the last checkpoint; so does one of batch_size whose product with
# gradient_accumulation is the same.
LEARNS_THE_SAME = (
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "checkpoint_minutes",
    "stop_on_divergence",
    "tracker",
)
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def run(recipe: Recipe, run: Run) -> Made:
    """Write `trained/` (an adapter or whole weights) and `answers.jsonl` (what was answered before and after).

    Raises:
        UserError: base and recipe do not go together, memory or disk do not suffice, or the training diverged, whose
            last good checkpoint stays.
        Stopped: by a signal, after a checkpoint.
    """
    refuse(recipe, read_config(recipe, run))
    refuse_long_questions(recipe, run)
    devices = gpus()
    launched = launch(recipe, devices)
    if devices > launched.world == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if launched.world > 1 and recipe.launch.strategy.startswith("zero"):
        bring("deepspeed", f"launch.strategy={recipe.launch.strategy}")
    check_disk(recipe, run.receipt("base").metrics["parameters"], run.folder)
    key = training_key(recipe, run, launched.world)
    trackers = prepare(recipe.train.tracker, run, key)
    resume_from = open_folder(run.path("checkpoints"), key)
    if recipe.train.tracker == "mlflow":
        same_run(run.path("checkpoints", "mlflow.run"), recipe.name)
    tokens = tokenized(recipe, run)
    planned = check(recipe, run, tokens.counts)
    full_speed = planned.get("peak_tokens_per_second")
    if launched.world > 1:
        task = {"resume_from": resume_from and str(resume_from), "trackers": trackers, "full_speed": full_speed}
        metrics = train_in_processes(recipe, run, launched, devices, task)
    else:
        metrics = work(recipe, run, tokens, resume_from, trackers, full_speed)
    return Made(
        outputs=[run.path("trained"), run.path("answers.jsonl")],
        metrics=metrics | {"data": tokens.counts, "planned": planned},
        packages=PACKAGES,
    )


def training_key(recipe: Recipe, run: Run, processes: int = 1) -> str:
    """Identifies a training: what of its knobs changes what is learned, its data and its base."""
    knobs = {name: value for name, value in asdict(recipe.train).items() if name not in LEARNS_THE_SAME}
    rows, steps = recipe.train.batch_size, recipe.train.gradient_accumulation * processes
    knobs["batch_size"] = [rows, steps] if recipe.train.method == "kto" else rows * steps  # kto compares a batch's rows
    if processes > 1 and recipe.launch.strategy != "ddp":
        knobs["strategy"] = recipe.launch.strategy  # whose checkpoints are of a form of their own
    outputs = [run.receipt(stage).outputs for stage in ("data", "base")]
    return hashlib.sha256(json.dumps([knobs, recipe.seed, outputs]).encode()).hexdigest()


def join() -> None:
    """Train on this host with the first one, which writes all that is made, on storage that they share."""
    stage_of = stage("train")
    recipe, devices = recipe_of_arguments(stage_of.module, stage_of.does), gpus()
    train_in_processes(recipe, Run.of(recipe), launch(recipe, devices), devices)


def take_part(task: Path) -> NoReturn:
    """Be one of the processes that train together, started by `train.launch` with a task."""
    with boundary():
        status = report(task)
    sys.stderr.flush()
    os._exit(status)  # not held up by threads of a process group whose other members are gone


if __name__ == "__main__":
    if is_launched():
        take_part(Path(sys.argv[1]))
    elif os.environ.get("NODE_RANK", "0") in ("", "0"):
        command("train", run)
    else:
        with boundary():
            join()
