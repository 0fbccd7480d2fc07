"""The API key: one line in a file that only its owner can read, made on the first start."""

import logging
import os
import re
import secrets
from pathlib import Path

from pipeline.error import UserError

KEY_FILE = Path(".secrets/api-key")

log = logging.getLogger("truetune")


def make_key(path: Path = KEY_FILE) -> str:
    """The key in `path`, made there if there is none; the file's mode becomes 0600, its folder's 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _create(path)
    for place, mode in ((path.parent, 0o700), (path, 0o600)):
        if place.stat().st_mode & 0o777 != mode:
            try:
                place.chmod(mode)
            except OSError as error:  # a secret that a container mounts read-only
                log.warning("%s is open to others and stays so: %s", place, error.strerror)
            else:
                log.warning("%s was open to others: its mode is now %o", place, mode)
    return read_key(path)


def read_key(path: Path = KEY_FILE) -> str:
    """The key in `path`.

    Raises:
        UserError: there is no file, or it does not hold one key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: 'make serve' makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, 'make serve' makes a new one") from None
    if not re.fullmatch(r"[!-~]+", key):
        found = "is empty" if not key else "is not one line of plain characters"
        raise UserError(f"{path} {found}: delete it, 'make serve' makes a new one")
    return key


def _create(path: Path) -> None:
    """A finished key or none: written beside, then linked, so that two starts at once agree on one key."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
