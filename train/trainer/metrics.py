"""What a training shows while it runs: its pace, the time left, its curves in TensorBoard and MLflow."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback

from pipeline.machine import resident_bytes
from pipeline.progress import Tell, progress
from train.launch import everyones
from train.template import IGNORED

EVENTS = "events.out.tfevents."


class Pace:
    """Counts from one log to the next; a training's totals are those of its history, which outlives the process."""

    def __init__(self, full_speed: float | None = None) -> None:
        self.full_speed = full_speed  # tokens a second at the device's peak, where that is known
        self._reset()

    def _reset(self) -> None:
        self.tokens = self.supervised = self.padding = 0
        self.began: float | None = None

    def begin(self) -> None:
        """A micro-batch of a step begins."""
        self.began = self.began or time.monotonic()

    def count(self, inputs: dict[str, Any]) -> None:
        """Tokens of whole rows, prompts included, those whose loss is learned, and padding; `inputs` are (batch, time).

        Of packed rows TRL's collator gives padding position 0 each, others have a mask. A row without labels is one
        that Accelerate repeats. Answers that are compared have a mask of their own.
        """
        compared = inputs.get("completion_mask")
        learned = (inputs["labels"] != IGNORED if compared is None else compared == 1)[:, 1:]
        if "attention_mask" in inputs:
            tokens = int(inputs["attention_mask"][learned.any(1)].sum())
        else:
            counted = inputs["position_ids"][0].nonzero()
            tokens = int(counted[-1]) + 1 if len(counted) else 0
        self.tokens += tokens
        self.padding += inputs["input_ids"].numel() - tokens
        self.supervised += int(learned.sum())

    def read(self) -> dict[str, float]:
        """The step's measures by their names in the logs; tokens are those of all processes."""
        seconds = time.monotonic() - (self.began or time.monotonic())
        counts = everyones(self.tokens, self.supervised, self.padding)
        self.tokens, self.supervised, self.padding = (round(sum(each)) for each in counts)
        measured = {
            "step_tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "padding_tokens": self.padding,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "memory_bytes": memory_bytes(),
        }
        if self.full_speed:
            measured["mfu"] = round(self.tokens / max(seconds, 1e-9) / self.full_speed, 4)
        self._reset()
        return measured


def memory_bytes() -> int:
    """What training holds now: of the GPU where there is one, else of this process."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()[0]


def totals(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and speed of a whole training, however many processes it took."""
    steps = [row for row in history if "step_tokens" in row]
    tokens, seconds = sum(row["step_tokens"] for row in steps), sum(row["step_seconds"] for row in steps)
    peaks = [(row["mfu"], row["step_seconds"]) for row in steps if "mfu" in row]
    used = sum(mfu * spent for mfu, spent in peaks) / max(sum(spent for _, spent in peaks), 1e-9)
    return ({"mfu": round(used, 4)} if peaks else {}) | {
        "tokens": tokens,
        "supervised_tokens": sum(row["supervised_tokens"] for row in steps),
        "padding_tokens": sum(row.get("padding_tokens", 0) for row in steps),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows each step until `shown` is closed; tokens are those of whole rows, prompts included."""

    def __init__(self) -> None:
        self.shown = ExitStack()
        self.tell: Tell | None = None
        self.loss = self.validation_loss = math.nan
        self.steps = self.validations = self.batches = 0
        self.tokens = self.step_seconds = self.validation_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell = self.shown.enter_context(progress("train", state.max_steps))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.step_seconds += time.monotonic() - self.step_start

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.loss, self.tokens = logs["loss"], self.tokens + logs.get("step_tokens", 0)
            self._show(state, validated=state.global_step - 1)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.validation_loss = metrics["eval_loss"]
        self._show(state, validated=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell = None

    @contextmanager
    def validation(self, batches: int) -> Iterator[None]:
        """Show and time a pass over the validation data."""
        start, self.batches = time.monotonic(), 0
        with progress("validation", batches, "batches") as self.tell_batch:
            yield
        self.validations += 1
        self.validation_seconds += time.monotonic() - start

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        self.tell_batch(self.batches)

    def _show(self, state: Any, validated: int) -> None:
        """`validated` is the last step that has been validated, if it was to be."""
        if self.tell is None or not self.steps:
            return
        left = self.step_seconds / self.steps * (state.max_steps - state.global_step)
        if self.validations:
            coming = state.max_steps // state.eval_steps - validated // state.eval_steps
            left += self.validation_seconds / self.validations * coming
        notes = [f"loss {self.loss:.3f}"]
        if math.isfinite(self.validation_loss):
            notes.append(f"validation {self.validation_loss:.3f}")
        notes.append(f"{self.tokens / max(self.step_seconds, 1e-9):,.0f} tokens/s")
        self.tell(state.global_step, *notes, seconds_left=left)


class Curves(TensorBoardCallback):  # type: ignore[misc]
    """One folder a training, those before it beside it; steps that a resumed training takes again are forgotten.

    So is the step that it goes on from, which is written anew: a kill may have come while it was validated.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)
        self.first_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        super().on_train_begin(args, state, control, **kwargs)
        for row in state.log_history:
            if row["step"] == state.global_step:
                self.on_log(args, state, control, {name: value for name, value in row.items() if name != "step"})

    def _init_summary_writer(self, args: Any) -> None:
        # TensorBoard reads files by name, which begins with the time: after a clock was set back, not in their order.
        for number, file in enumerate(sorted(Path(self.logging_dir).glob(f"{EVENTS}*"))):
            rest = file.name.removeprefix(EVENTS).partition(".")[2]
            file.rename(file.with_name(f"{EVENTS}{number:010d}.{rest}"))
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self.first_step)


class MlflowCurves(MLflowCallback):  # type: ignore[misc]
    """Tells MLflow, which forgets nothing, each loss once: steps that are taken again are the same as before.

    What a kill kept from it, since it is told in the background, it is told from the checkpoint's history.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        client, run_id = self._ml_flow.MlflowClient(), self._ml_flow.active_run().info.run_id
        self.known = {
            (name, metric.step) for name in ("loss", "eval_loss") for metric in client.get_metric_history(run_id, name)
        }
        for row in state.log_history:
            if not self._is_known(row, row["step"]):
                self._ml_flow.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self._is_known(logs, state.global_step):
            super().on_log(args, state, control, logs, **kwargs)

    def _is_known(self, logs: dict[str, float], step: int) -> bool:
        return any((name, step) in self.known for name in logs)


def curves(tracker: str, folder: Path) -> list[TrainerCallback]:
    """What the recipe's tracker adds to a training; TensorBoard's files are written beside any other."""
    found: list[TrainerCallback] = [] if tracker == "none" else [Curves(folder)]
    return [*found, MlflowCurves()] if tracker == "mlflow" else found
