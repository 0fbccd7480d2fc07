"""Checkpoints that appear whole or not at all, and the newest that is whole and belongs to this very training.

transformers writes a checkpoint's files in place and takes the highest number for the latest, so that a kill while
saving leaves a folder that cannot be loaded. Here a checkpoint is written below `.saving`, listed with the hash of each
of its files, and only then renamed. What is cut off, filled with zeros or changed is set aside as `<name>.incomplete`
until the next start, so that many kills do not fill the disk.
"""

import json
import logging
from pathlib import Path

from pipeline.files import files_below, fingerprint, put_in_place, remove, write_whole

SAVING = ".saving"
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"

log = logging.getLogger("truetune")


def open_folder(folder: Path, key: str) -> Path | None:
    """Make `folder` hold checkpoints of the training named by `key` only; the one to resume from, if there is any."""
    mark = folder / "training.key"
    if folder.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != key):
        for old in folder.iterdir():  # the folder itself may be a disk of its own
            remove(old)
    write_whole(mark, key)
    for aside in folder.glob(f"checkpoint-*{INCOMPLETE}"):
        remove(aside)
    for unfinished in (folder / SAVING).glob("checkpoint-*"):
        _set_aside(unfinished, folder / unfinished.name, "it was being written when the training ended")
    remove(folder / SAVING)
    for replaced in folder.glob(".checkpoint-*.old"):
        remove(replaced)
    return last_complete(folder)


def last_complete(folder: Path) -> Path | None:
    """The newest whole `checkpoint-<step>` below `folder`; damaged ones are renamed to `<name>.incomplete`."""
    for checkpoint in reversed(_checkpoints(folder)):
        damaged = damage(checkpoint)
        if damaged is None:
            return checkpoint
        _set_aside(checkpoint, checkpoint, damaged)
    return None


def complete(folder: Path, step: int, best_step: int | None) -> None:
    """Give the checkpoint written below `.saving` its name, then remove those that are neither needed nor the best.

    Two stay: the new one, and the best or, if that is the new one, the one before.
    """
    written, final = folder / SAVING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    made = {str(file.relative_to(written)): fingerprint(file) for file in files_below(written)}
    write_whole(written / MANIFEST, json.dumps(made, indent=2))
    put_in_place(written, final)
    remove(folder / SAVING)
    *older, _ = _checkpoints(folder)
    best = folder / f"checkpoint-{best_step}"
    second = best if best in older else older[-1] if older else final
    for checkpoint in older:
        if checkpoint != second:  # renamed first: a kill leaves no half of it under its name
            remove(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if each of its files is what was written."""
    try:
        made = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, mark in made.items():
            file = checkpoint / name
            if file.stat().st_size != mark["bytes"]:
                return f"{name} has {file.stat().st_size} of {mark['bytes']} bytes"
            if fingerprint(file) != mark:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def set_aside_from(folder: Path, step: int) -> Path | None:
    """Set the checkpoints aside that were written at or after a step; the newest of the others, if there is one."""
    for checkpoint in _checkpoints(folder):
        if step_of(checkpoint) >= step:
            _set_aside(checkpoint, checkpoint, f"the training was astray from step {step} on")
    return last_complete(folder)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    """Those with a name of their own, oldest first."""
    named = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(named, key=step_of)


def _set_aside(checkpoint: Path, name: Path, why: str) -> None:
    aside = name.with_name(name.name + INCOMPLETE)
    remove(aside)
    checkpoint.rename(aside)
    log.warning("%s cannot be gone on from, %s: set aside as %s", name, why, aside.name)
