"""Files that appear whole or not at all, and the fingerprints that identify them."""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.error import UserError

# What a data file's name may end in, before the ending of a compression.
JSONS = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", *JSONS)
TEXTS = (".txt", ".md", ".text", ".raw", ".tokens")
PACKED = (".gz", ".zst", ".bz2", ".xz")
# A data set of the Hub: `owner/name@revision:config:split`.
HUB = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?"
)
MOST_JSON_BYTES = 1 << 28  # the largest tokenizers take a tenth


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name, replacing what stood there."""
    _sync_tree(temporary)
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if final.is_dir():
        final.rename(old)
    temporary.rename(final)
    remove(old)
    _sync_folder(final.parent)


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`, whatever an interrupted run left there."""
    remove(path)
    path.mkdir(parents=True)
    return path


@contextmanager
def own_folder(name: str) -> Iterator[Path]:
    """A folder of this process in the system's temporary one; those of processes that were killed are removed."""
    import psutil

    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{name}-*-*"):
        pid = left.name.removeprefix(f"{name}-").partition("-")[0]
        with suppress(OSError, psutil.Error, ValueError):
            made_at = left.stat().st_ctime
            if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).create_time() > made_at:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-{os.getpid()}-") as folder:
        yield Path(folder)


def read_json(path: Path) -> Any:
    """The value in a JSON file that may come from anywhere.

    Raises:
        UserError: names the file, which is none, is not JSON or is larger than any that is made in earnest.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file, where a JSON file is needed: fetch it again")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, where {MOST_JSON_BYTES:,} are the most: fetch it again"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The keys and values in a JSON file that may come from anywhere.

    Raises:
        UserError: as `read_json`, or it holds something else.
    """
    loaded = read_json(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no JSON object but a {type(loaded).__name__}: fetch it again")
    return loaded


def fingerprint(path: Path) -> dict[str, str | int]:
    """`{"sha256": hex digest, "bytes": size}` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def files_below(path: Path) -> list[Path]:
    """`path` itself if it is a file, else every file below it, sorted."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def unusable(name: str) -> str:
    """Why no file or folder can have this name, whether there is one or not; empty if it can."""
    if not name.strip():
        return "is empty: name a file or a folder"
    try:
        Path(name).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except RuntimeError:
        return "there is no such user, whose home folder it names"
    except OSError as error:
        return f"the system takes no such name ({error.strerror})"
    except ValueError as error:
        return f"the system takes no such name ({error})"
    return ""


def matching(name: str) -> list[Path]:
    """The files that a path, a folder (with all below it) or a glob names, sorted; hidden ones are left out."""
    path = Path(name)
    if path.is_file():
        return [path]
    found = glob.glob(glob.escape(name) + "/**" if path.is_dir() else name, recursive=True)
    return sorted(file for file in map(Path, found) if file.is_file())


def ending(path: Path) -> str:
    """The name's ending, without that of a compression."""
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def remove(path: Path) -> None:
    """A file or a folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    for file in files_below(path):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for folder in [path, *path.rglob("*")]:
        if folder.is_dir():
            _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
