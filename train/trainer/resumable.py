"""A trainer that lasts: its checkpoints are whole, signals end it cleanly, and it resumes exactly where it stood."""

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from pipeline import Recipe, Run, UserError
from pipeline.command import FULL
from pipeline.files import files_below, remove
from pipeline.machine import fast_precision
from pipeline.progress import progress
from pipeline.recipe import Train
from pipeline.units import size
from train.launch import everyones, gathered, is_launched, plugin
from train.packing import Layout, told
from train.template import IGNORED
from train.trainer.checkpoints import SAVING, complete, damage
from train.trainer.journal import Diverged, Journal, Watch
from train.trainer.metrics import Pace, TrainingProgress, totals

DAYS_TO_WAIT = 7  # for another process, as when the first asks the questions: who died is seen by torchrun
MOMENTS = 2  # Adam keeps two numbers for each weight that is trained
WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = logging.getLogger("truetune")


def settings(recipe: Recipe, run: Run, validated: bool, trackers: Sequence[str] = ()) -> dict[str, Any]:
    """transformers' TrainingArguments that no method changes, from the recipe."""
    knobs = recipe.train
    precision = fast_precision() if knobs.precision == "auto" else knobs.precision
    return {
        "output_dir": str(run.path("checkpoints")),
        "num_train_epochs": knobs.epochs,
        "learning_rate": knobs.learning_rate,
        "lr_scheduler_type": knobs.lr_scheduler,
        "warmup_steps": knobs.warmup_ratio,
        "per_device_train_batch_size": knobs.batch_size,
        "per_device_eval_batch_size": knobs.batch_size,
        "gradient_accumulation_steps": knobs.gradient_accumulation,
        "gradient_checkpointing": knobs.gradient_checkpointing,
        "bf16": precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "steps" if validated else "no",
        "save_strategy": "steps",
        "restore_callback_states_from_checkpoint": True,
        "load_best_model_at_end": validated,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide a loss that is no number
        "report_to": list(trackers),
        "run_name": recipe.name,
        "disable_tqdm": True,
        "seed": recipe.seed,
        "full_determinism": knobs.deterministic,
        "ddp_timeout": DAYS_TO_WAIT * 24 * 3600,
    } | (plugin(recipe) if is_launched() else {})


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Its parent, which after a stop that was not finished must not train on: transformers forgets the stop."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class Often(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint when the last one is older than so many minutes; when it is saved changes no step."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= any(everyones(time.monotonic() - self.last > self.seconds)[0])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()


class Unvalidated(Exception):
    """A signal ended a validation: the step that it was of is saved without, and validated by who goes on."""


class Stopping(TrainerCallback):  # type: ignore[misc]
    """`wish` is the signal that ended the training, None if none did; a second one does not wait for the checkpoint."""

    def __init__(self) -> None:
        self.wish: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            # `nohup` ignores SIGHUP, and so does what it starts.
            wishes = [wish for wish in WISHES if signal.getsignal(wish) is not signal.SIG_IGN]
            self.before = {wish: signal.signal(wish, self._heed) for wish in wishes}

    def _heed(self, number: int, frame: Any) -> None:
        self.wish = signal.Signals(number)
        for wish in self.before:
            signal.signal(wish, signal.default_int_handler)
        log.warning("%s: saving a checkpoint after this step; once more stops at once", self.wish.name)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed():
            raise Unvalidated

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed():
            control.should_save = control.should_training_stop = True

    def _agreed(self) -> bool:
        """Whether a signal has reached any process: all of them stop after the same step."""
        heard = int(max(everyones(self.wish or 0)[0]))
        self.wish = signal.Signals(heard) if heard else None
        return heard > 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Let signals do again what they did before training."""
        for wish, handler in self.before.items():
            signal.signal(wish, handler)


class Resumable(Trainer):  # type: ignore[misc]
    """Mixed into any trainer: its checkpoints are complete or absent, two at most, the best among them.

    Args:
        knobs: what the recipe says of checkpoints, validation, patience and divergence.
        layout: whether rows are packed.
        journal: is told each step as a sign of life.
        full_speed: tokens a second of devices at their peak, where that is known.
    """

    saving = apart = False

    def __init__(
        self,
        *,
        knobs: Train,
        layout: Layout,
        journal: Journal | None = None,
        full_speed: float | None = None,
        callbacks: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        self.stopping, self.pace, self.progress = Stopping(), Pace(full_speed), TrainingProgress()
        self.watch = Watch() if knobs.stop_on_divergence else None
        self.journal, self.layout = journal, layout
        self.batches: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.step_loss = 0.0
        ours: list[Any] = [Often(knobs.checkpoint_minutes), self.stopping, self.progress]
        if knobs.early_stopping_patience and kwargs.get("eval_dataset") is not None:
            ours.append(Patience(knobs.early_stopping_patience))
        if kwargs["args"].n_gpu > 1:
            raise UserError(
                "one process sees several GPUs, which would be DataParallel: set CUDA_VISIBLE_DEVICES to one"
            )
        if kwargs["args"].fsdp and kwargs["args"].device.type == "cpu":
            # Accelerate has FSDP for GPUs alone; torch's works on the processor, where it is tested.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(callbacks=[*ours, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        self.collator, self.data_collator = self.data_collator, self._collate
        for weights in self.model.parameters():  # TRL rounds those of a QLoRA to bfloat16, which loses small steps
            if weights.requires_grad:
                weights.data = weights.data.float()
        rows_a_step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        steps_an_epoch = math.ceil(len(self.train_dataset) / rows_a_step)
        self.args.eval_steps = self.args.save_steps = math.ceil(steps_an_epoch / knobs.evals_per_epoch)

    def train(self, resume_from: Path | None = None, measured: Callable[[], float | None] = lambda: None) -> Any:
        """Train, from a checkpoint on if one is given.

        Args:
            measured: measures the model as it is, and tells its loss in nats a token: far above it, training diverged.
        """
        # Of several processes, once the model is wrapped: Accelerate takes one that was evaluated before for prepared,
        # and each process would train alone. Nor does any of them have all weights before they are shared.
        self.measured = measured if is_launched() else None
        if not is_launched():
            self._measure_base(measured)
        with self.progress.shown:
            try:
                return super().train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            finally:
                self.stopping.restore()

    def _measure_base(self, measured: Callable[[], float | None]) -> None:
        loss = measured()
        if self.watch:
            self.watch.base_loss = loss

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.measured:
            self._measure_base(self.measured)
        return prepared

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        rows_at_once = self.args.eval_batch_size * self.args.world_size
        # Its data loader throws a die: without the fork, what is trained would depend on how often is validated.
        with self.progress.validation(math.ceil(len(self.eval_dataset) / rows_at_once)), torch.random.fork_rng([]):
            lengths = self.lengths  # of the training's batch that comes next
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.lengths = lengths

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Unvalidated:
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True
            self._save_checkpoint(self.model_wrapped, None)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if not self.args.eval_on_start:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Unvalidated:
            self.control.should_training_stop = True  # its checkpoint is the one that training went on from
            return {}
        self.args.eval_on_start = False
        self._determine_best_metric(metrics, trial)
        self._load_rng_state(os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        if self.pace.began is None:
            self.batches, self.step_loss = [], 0.0
        self.pace.begin()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.pace.count(inputs)
        self.batches.append(inputs)
        self.step_loss += loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called before the weights move: what diverged leaves them as they were."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses, step = everyones(float(self.step_loss))[0], self.state.global_step + 1
        loss, norm = sum(losses) / len(losses), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if self.watch and (why := self.watch.see(loss, norm)):
            first, rate = step - max(0, self.watch.above - 1), self._get_learning_rate()
            raise Diverged(step, first, why, loss, norm, rate, gathered(self.batches))
        return norm

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        """A batch of the trainer's own collator, which may lay its rows end to end."""
        self.lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
        return self.collator(rows)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Supervised tokens of a step; rows that Accelerate repeats, to give each process as many, become padding."""
        state, rows = self.accelerator.gradient_state, self.args.train_batch_size
        if batch_samples and self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            kept = max(0, state.remainder - self.args.process_index * rows)
            labels, positions = (batch_samples[-1].get(name) for name in ("labels", "position_ids"))
            if labels is not None and len(labels) < len(self.lengths):
                kept = sum(self.lengths[:kept])
                labels[:, kept:], positions[:, kept:] = IGNORED, 0
            elif labels is not None:
                labels[kept:] = IGNORED
                if positions is not None:
                    positions[kept:] = 0
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.apart:
            return
        for metrics in getattr(self, "_metrics", {}).values():
            metrics.pop("num_tokens", None)  # TRL's count of this process alone: ours go on
        if "train_runtime" in logs:  # totals of this process alone, which are not those of a training that went on
            return
        if "loss" in logs:
            logs |= self.pace.read()
            if self.journal:
                self.journal.beat(self.state.global_step)
        super().log(logs, start_time)

    def validation_loss(self) -> float | None:
        """The loss of the model as it is, apart from the curves; None without validation data."""
        if self.eval_dataset is None:
            return None
        self.apart = True
        try:
            return float(self.evaluate()["eval_loss"])
        finally:
            self.apart = False
            getattr(self, "_metrics", {"eval": {}})["eval"].clear()  # TRL would log them with the next validation's

    def rows(self) -> dict[str, Any]:
        """How the rows are laid out, and how full they are; TRL fills packed ones best-fit, a thousand at a time."""
        return told(self.layout, self.train_dataset, self.args.max_length, self.args.train_batch_size)

    def summary(self) -> dict[str, Any]:
        """What the receipt tells of the training: steps, tokens, speed and the loss curves."""
        history = self.state.log_history
        return {
            "packing": self.rows(),
            "steps": self.state.global_step,
            "ended": "all epochs were done"
            if self.state.global_step >= self.state.max_steps
            else "the validation loss fell no more",
            "best_step": self.state.best_global_step,
            **totals(history),
            "precision": "bfloat16" if self.args.bf16 else "float32",
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "loss_curve": _curve(history, "loss"),
            "validation_curve": _curve(history, "eval_loss"),
        }

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self.saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step, best = Path(self.args.output_dir), self.state.global_step, self.state.best_global_step
        needed = self._checkpoint_bytes(folder)
        if shutil.disk_usage(folder).free < needed:
            raise _no_space(folder, step, needed)
        self.saving = True
        try:
            with progress(f"saving checkpoint-{step}, {size(needed)}"):
                Trainer._save_checkpoint(self, model, trial)  # TRL's own adds a model card each time
                self.accelerator.wait_for_everyone()
                # The parent takes the folder that is being written for the best one's place.
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}") if best else None
                if self.args.should_save:
                    self.state.save_to_json(str(folder / SAVING / f"checkpoint-{step}" / TRAINER_STATE_NAME))
                    complete(folder, step, best)
        except (OSError, RuntimeError) as error:
            remove(folder / SAVING)
            # torch tells a failed write by a RuntimeError without the system's number.
            if (
                getattr(error, "errno", None) in FULL
                or "file write failed" in str(error)
                or "os error 28" in str(error)
            ):
                raise _no_space(folder, step, needed) from None
            raise
        finally:
            self.saving = False
        self.accelerator.wait_for_everyone()

    def _checkpoint_bytes(self, folder: Path) -> int:
        """What a checkpoint takes: as much as the last one, else the trained weights and the optimizer's moments."""
        for last in folder.glob("checkpoint-*[0-9]"):
            return sum(file.stat().st_size for file in files_below(last))
        return (1 + MOMENTS) * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        begun: tuple[int, int] = super()._init_training_state(*args)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.watch:
            self.watch.learn(row["loss"] for row in self.state.log_history if "loss" in row)
        if self.state.best_global_step is not None:
            damaged = damage(best)
            if damaged is None:
                self.state.best_model_checkpoint = str(best)
            else:
                self._forget_best(best, damaged)
        self.args.eval_on_start = self._is_unvalidated()
        return begun

    def _is_unvalidated(self) -> bool:
        """Whether a signal ended the validation of the step that training resumes from: it comes first then."""
        state, step = self.state, self.state.global_step
        due = step > 0 and (step % state.eval_steps == 0 or step >= state.max_steps)
        return (
            due
            and self.eval_dataset is not None
            and not any(row["step"] == step and "eval_loss" in row for row in state.log_history)
        )

    def _forget_best(self, best: Path, damaged: str) -> None:
        """Let the checkpoint that training resumes from be the best, if it was validated."""
        state, here = self.state, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        log.warning("%s, the best so far, is lost (%s): the best of the others will be kept", best, damaged)
        losses = [
            row["eval_loss"] for row in state.log_history if row["step"] == state.global_step and "eval_loss" in row
        ]
        state.best_metric = losses[-1] if losses else None
        state.best_global_step = state.global_step if losses else None
        state.best_model_checkpoint = str(here) if losses else None

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the checkpoint is of a training that had ended
            return
        super()._run_epoch(**kwargs)


def _curve(history: list[dict[str, Any]], name: str) -> list[list[float]]:
    """[step, value] of each log that has it as a number."""
    return [[row["step"], round(row[name], 5)] for row in history if math.isfinite(row.get(name, math.nan))]


def _no_space(folder: Path, step: int, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"the disk of {folder} has {free / 1e6:,.1f} MB free, checkpoint-{step} needs {needed / 1e6:,.1f} MB: "
        "free some space, the same command resumes from the last checkpoint"
    )
