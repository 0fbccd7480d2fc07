"""Training's progress: steps, loss, tokens a second, and the time left with the validations that are still to come."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import TrainerCallback

from pipeline.progress import Tell, progress


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
