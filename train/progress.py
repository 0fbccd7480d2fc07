"""Training's progress: a bar with tokens a second, loss and time left, or a line every few seconds."""

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

log = logging.getLogger("truetune")
SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows each step; tokens are those of whole rows, prompts included."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.loss = self.validation_loss = float("nan")
        self.tokens = 0.0
        self.last_line = 0.0
        self.busy_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, text="")
        self.first_step = state.global_step
        self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.busy_seconds += time.monotonic() - self.step_start

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self.validation_loss = logs["eval_loss"]
        if "loss" not in logs:
            return
        self.loss, self.tokens = logs["loss"], logs.get("step_tokens", 0.0) + self.tokens
        steps = state.global_step - self.first_step
        rate = self.tokens / max(self.busy_seconds, 1e-9)
        text = f"loss {self.loss:.3f}  validation {self.validation_loss:.3f}  {rate:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, text=text)
        now = time.monotonic()
        if not self.console.is_terminal and (
            now - self.last_line > SECONDS_BETWEEN_LINES or state.global_step == state.max_steps
        ):
            self.last_line = now
            left = self.busy_seconds / max(steps, 1) * (state.max_steps - state.global_step)
            log.info("train %d/%d  %s  %.0f s left", state.global_step, state.max_steps, text, left)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
