"""Make `.venv` and `.cache`, in which every command runs:  python3.11 -m setup.environment

Runs before any package exists: standard library only. Goes on where an interrupted run stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from setup.install import (
    CACHE,
    COMPILER_HELP,
    CONVERTER,
    ELSEWHERE,
    LLAMA_CPP_PYTHON,
    LLAMA_CPP_PYTHON_SHA256,
    LOCKED,
    NEEDED_GB,
    OURS,
    PYTHON_HELP,
    ROOT,
    VERSION,
    SetupError,
    alone,
    device,
    digest,
    find_compiler,
    install_locked,
    install_torch,
    make_venv,
    run,
    say,
    works,
)

LLAMA_CPP_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
COMPILED = ROOT / "setup/llama_cpp.cmake"


def main() -> None:
    start = time.monotonic()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise SetupError(f"Python {VERSION} is not 3.11 or 3.12: get one with {PYTHON_HELP}")
    os.chdir(ROOT)
    target = device()
    CACHE.mkdir(exist_ok=True)
    with alone(OURS):
        current = OURS.stamp.is_file() and OURS.stamp.read_text(encoding="utf-8") == digest(target)
        if current and CONVERTER.is_dir() and works(OURS, ""):
            OURS.stamp.touch()  # Make compares times, and a checkout renews those of the files behind the stamp
            return
        if not OURS.python.exists() and shutil.disk_usage(ROOT).free < NEEDED_GB[target] * 1e9:
            raise SetupError(f"{ROOT} has less than {NEEDED_GB[target]} GB of disk free: free some and run again")
        OURS.stamp.unlink(missing_ok=True)
        OURS.log.write_bytes(b"")
        for leftover in CACHE.glob("setup-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="setup-", dir=CACHE) as scratch:
            make_venv(OURS, target)
            locked, uv, source = Path("requirements.lock"), Path(scratch, "uv.txt"), Path(scratch, "source.txt")
            uv.write_text("".join(re.findall(r"^uv==.*(?:\n {4}--hash=.*)*", locked.read_text(encoding="utf-8"), re.M)))
            run(OURS.log, "uv, which installs the others", OURS.pip("install", *LOCKED, str(uv)))
            install_locked(OURS, locked)
            install_torch(OURS, target)
            source.write_text(f"llama-cpp-python=={LLAMA_CPP_PYTHON} --hash=sha256:{LLAMA_CPP_PYTHON_SHA256}\n")
            if not CONVERTER.is_dir():
                unpack_converter(source)
            install_llama_cpp_python(source)
            verify(target)
        OURS.stamp.write_text(digest(target), encoding="utf-8")
    say(f"complete in {time.monotonic() - start:.0f} s, for {target}")


def unpack_converter(source: Path) -> None:
    """llama.cpp's converter out of llama-cpp-python's source, whole or not at all."""
    get = OURS.pip("download", "--no-binary", "llama-cpp-python", "--dest", str(source.parent), *kept(), *LOCKED)
    run(OURS.log, "llama.cpp's converter (77 MB)", [*get, str(source)])
    inside, unpacked = f"llama_cpp_python-{LLAMA_CPP_PYTHON}/vendor/llama.cpp/", source.parent / "unpacked"
    with tarfile.open(source.parent / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz") as archive:
        if hasattr(tarfile, "data_filter"):  # Debian 12's Python lacks it; the hash has been checked there too
            archive.extraction_filter = tarfile.data_filter
        for member in archive:
            parts = member.name.removeprefix(inside).split("/")
            if member.name.startswith(inside) and parts[0] in CONVERTER_PARTS and member.isfile() and ".." not in parts:
                archive.extract(member, unpacked)
    (unpacked / inside).rename(CONVERTER)


def install_llama_cpp_python(source: Path) -> None:
    """A prebuilt wheel where one is in reach, else compiled; pip keeps what it compiled for the next checkout."""
    wanted = ["--no-deps", "--only-binary=:all:", f"llama-cpp-python=={LLAMA_CPP_PYTHON}", *ELSEWHERE, LLAMA_CPP_WHEELS]
    if run(OURS.log, "llama-cpp-python, if prebuilt", OURS.pip("install", *wanted), may_fail=True):
        return
    if not find_compiler():
        raise SetupError(f"no C++ compiler, which llama-cpp-python needs: {COMPILER_HELP}")
    compiling = OURS.pip("install", "--verbose", *kept(), *LOCKED, str(source))
    flags = f"-DCMAKE_PROJECT_INCLUDE={shlex.quote(str(COMPILED))} {os.environ.get('CMAKE_ARGS', '')}"
    run(OURS.log, "llama-cpp-python, compiled unless pip kept it (3 to 8 min)", compiling, CMAKE_ARGS=flags)


def kept() -> list[str]:
    """A part of pip's cache for what is compiled so: pip itself knows a compiled wheel by its source alone."""
    cache, made_from = OURS.asked("cache", "dir"), COMPILED.read_bytes() + os.environ.get("CMAKE_ARGS", "").encode()
    return ["--cache-dir", f"{cache}/truetune-{hashlib.sha256(made_from).hexdigest()[:12]}"] if cache else []


def verify(target: str) -> None:
    """Everything imports, torch is the right build, and a machine without a GPU has no CUDA package."""
    code = "import llama_cpp, transformers, torch; assert (torch.version.cuda is not None) == " + str(target == "cuda")
    run(OURS.log, "check of what was installed", [str(OURS.python), "-c", code])
    unwanted = sorted(path.name for path in OURS.folder.glob("lib/python*/site-packages/nvidia_*.dist-info"))
    if target == "cpu" and unwanted:
        raise SetupError(f"CUDA packages on a machine without a GPU ({unwanted[0]}): delete .venv and run again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say("stopped: the same command resumes from here")
        sys.exit(130)
