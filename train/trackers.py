"""W&B and MLflow, beside TensorBoard's files: installed where a recipe names one, and told where to write.

Without a login or a server of the user's own, both write below the run folder and send nothing anywhere.
"""

import importlib.util
import logging
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import Run, UserError
from pipeline.files import write_whole
from setup.install import LOCKS, SetupError, add, unfinished

PROJECT = "truetune"

log = logging.getLogger("truetune")


def prepare(tracker: str, place: Run, training: str) -> list[str]:
    """Make a tracker ready, before anything heavy starts; those that transformers tells, by its names.

    `training` names the training, so that the same run goes on when the training does.

    Raises:
        UserError: it is not installed and no package index answers.
    """
    if tracker not in ("wandb", "mlflow"):
        return []
    bring(tracker, f"train.tracker={tracker}")
    folder = place.path("logs", tracker).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = _wandb(folder, place.name, training) if tracker == "wandb" else _mlflow(folder)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return [tracker] if tracker == "wandb" else []  # train.trainer.metrics tells MLflow


def bring(package: str, key: str) -> None:
    """Install what only a recipe with that `key=value` needs, unless it is there.

    Raises:
        UserError: no package index answers.
    """
    requirements = LOCKS / f"{package}.txt"
    if importlib.util.find_spec(package) and not unfinished(requirements).is_file():
        return
    try:
        add(requirements)
    except SetupError as error:
        raise UserError(f"{key} is not installed: {error}") from None
    importlib.invalidate_caches()


def same_run(kept: Path, name: str) -> None:
    """Let MLflow go on with the run whose id stands in `kept`, or begin one and keep its id there.

    Raises:
        UserError: the server that the user named does not answer.
    """
    if "MLFLOW_RUN_ID" in os.environ:
        return
    from mlflow import MlflowClient, set_experiment
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        run_id = client.get_run(kept.read_text(encoding="utf-8")).info.run_id
        os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"  # they stand there, and MLflow refuses another value
    except (FileNotFoundError, MlflowException):
        try:
            experiment = set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id
            run_id = client.create_run(experiment, run_name=name).info.run_id
        except MlflowException as error:
            raise UserError(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']}: {error}") from None
        write_whole(kept, run_id)
    os.environ["MLFLOW_RUN_ID"] = run_id


def _wandb(folder: Path, name: str, training: str) -> dict[str, str]:
    mode = "online" if _logged_in() else "offline"
    if os.environ.get("WANDB_MODE", mode) == "offline":
        log.info("W&B: written to %s; 'wandb login', then 'wandb sync' sends it", folder)
    return {
        "WANDB_MODE": mode,
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": PROJECT,
        "WANDB_NAME": name,
        "WANDB_RUN_ID": training[:16],
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }


def _mlflow(folder: Path) -> dict[str, str]:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        log.info("MLflow: written to %s", folder)
    return {
        "MLFLOW_TRACKING_URI": folder.as_uri(),
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


def _logged_in() -> bool:
    """Whether W&B's key is in the environment or where `wandb login` puts it; it is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
