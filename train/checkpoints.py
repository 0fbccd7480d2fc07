"""The last checkpoint that is whole, and that belongs to this very training.

transformers writes a checkpoint's files in place and takes the highest number for the latest, so that a kill while
saving leaves a folder that cannot be loaded; here such a folder is set aside.
"""

import json
import shutil
import zipfile
from pathlib import Path

from recipe import UserError
from recipe.files import write_whole
from train.base import safetensors_header

NEEDED = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def last_complete(folder: Path) -> Path | None:
    """The newest whole `checkpoint-<step>` below `folder`; broken ones are renamed to `<name>.incomplete`."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.suffix == ""}
    for step in sorted(steps, reverse=True):
        if _is_whole(steps[step]):
            return steps[step]
        aside = steps[step].with_suffix(".incomplete")
        shutil.rmtree(aside, ignore_errors=True)
        steps[step].rename(aside)
    return None


def open_folder(folder: Path, key: str) -> bool:
    """Make `folder` hold checkpoints of the training named by `key` only; True if it has some to go on from."""
    mark = folder / "training.key"
    if folder.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != key):
        shutil.rmtree(folder)
    write_whole(mark, key)
    return last_complete(folder) is not None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        safetensors_header(checkpoint / "adapter_model.safetensors")
        return all((checkpoint / name).is_file() for name in NEEDED) and all(
            zipfile.is_zipfile(checkpoint / name) for name in NEEDED if name.endswith((".pt", ".pth"))
        )
    except (OSError, ValueError, UserError):
        return False
