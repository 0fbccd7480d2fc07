"""TensorBoard's files of a training, without gaps or doubled steps however often it was killed."""

from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback


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
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self.first_step)
