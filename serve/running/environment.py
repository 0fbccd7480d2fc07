"""An environment of its own for a part whose pins conflict with ours, made on first use from `setup/locks/<name>.txt`.

Beside `.venv`, not in the run folder: every recipe shares it. `make lock` writes the requirements, with their hashes.
"""

import hashlib
import logging
import re
import shutil
import sys
import time
from pathlib import Path

from pipeline.error import UserError
from setup.install import (
    CACHE,
    LOCKS,
    ROOT,
    TORCH,
    Environment,
    SetupError,
    alone,
    device,
    install_locked,
    install_torch,
    make_venv,
)

NEEDED_BYTES = {"cpu": 5_000_000_000, "cuda": 15_000_000_000}

log = logging.getLogger("truetune")


def environment(name: str) -> Path:
    """The Python of `.venv-<name>`; an interrupted installation is resumed, changed requirements are installed anew.

    Raises:
        UserError: no package index answers, the disk is full, or a package cannot be installed.
    """
    requirements = LOCKS / f"{name}.txt"
    place = Environment(ROOT / f".venv-{name}", ROOT / CACHE / f"{name}.log")
    try:
        target = device()
        if not is_complete(place, requirements, target):
            place.log.parent.mkdir(exist_ok=True)
            with alone(place):
                if not is_complete(place, requirements, target):  # another start may have made it meanwhile
                    make(place, requirements, target)
    except SetupError as error:
        raise UserError(str(error)) from None
    return place.python


def is_complete(place: Environment, requirements: Path, target: str) -> bool:
    """Whether the environment was made to its end from these very requirements."""
    made_from = place.stamp.read_text(encoding="utf-8") if place.stamp.is_file() else ""
    return made_from == digest(requirements, target) and place.python.exists()


def digest(requirements: Path, target: str) -> str:
    """What the environment is made from: the requirements, torch's build and Python's version."""
    pins = repr([TORCH, target, *sys.version_info[:2]]).encode()
    return hashlib.sha256(requirements.read_bytes() + pins).hexdigest() + "\n"


def make(place: Environment, requirements: Path, target: str) -> None:
    """Install what the requirements name, and torch, unless they name it, in the build that this machine uses."""
    begin = time.monotonic()
    if not place.python.exists() and shutil.disk_usage(ROOT).free < NEEDED_BYTES[target]:
        raise SetupError(f"{ROOT} has less than {NEEDED_BYTES[target] / 1e9:.0f} GB of disk free: free some, run again")
    log.info("%s is made on this first use: some minutes, its log is %s", place.folder, place.log)
    place.stamp.unlink(missing_ok=True)
    place.log.write_bytes(b"")
    make_venv(place, target)
    if not re.search(r"^torch==", requirements.read_text(encoding="utf-8"), re.M):
        install_torch(place, target)
    install_locked(place, requirements)
    place.stamp.write_text(digest(requirements, target), encoding="utf-8")
    log.info("%s is complete in %.0f s", place.folder, time.monotonic() - begin)
