"""Ctrl-C, SIGTERM and a closed terminal while training: a checkpoint is saved after this step, then training ends."""

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

log = logging.getLogger("truetune")
WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        if self.wish:
            raise Unvalidated

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wish:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Let signals do again what they did before training."""
        for wish, handler in self.before.items():
            signal.signal(wish, handler)
