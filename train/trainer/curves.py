"""The curves of a training in TensorBoard and MLflow, without gaps or doubled steps however often it was killed."""

from pathlib import Path
from typing import Any

from transformers.integrations import MLflowCallback, TensorBoardCallback

EVENTS = "events.out.tfevents."


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
