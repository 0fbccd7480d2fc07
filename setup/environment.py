"""Make `.venv` and `.cache`, in which every command runs:  python3.11 -m setup.environment

Runs before any package exists: standard library only. Goes on where an interrupted run stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setup.step import SetupError, run, say

ROOT, CACHE, VERSION = Path(__file__).resolve().parent.parent, Path(".cache"), sys.version.split()[0]
LOCKS = ROOT / "setup/locks"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Converter, quantizer and comparison come from this one source, so they are the same llama.cpp commit.
LLAMA_CPP_PYTHON = "0.3.36"
LLAMA_CPP_PYTHON_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
CONVERTER = CACHE / f"llama.cpp-{LLAMA_CPP_PYTHON}"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
COMPILED = ROOT / "setup/llama_cpp.cmake"
LOCKED = ["--no-deps", "--require-hashes", "--requirement"]
# pip's settings under uv's names for them, which does not read pip's configuration. Not extra indexes: of a wheel for
# each Python that partial indexes share out, uv takes one for another Python; what is only there pip installs.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
ELSEWHERE = ["--retries", "1", "--timeout", "15", "--extra-index-url"]  # out of reach must not cost minutes
COMPILER_HELP = "Debian/Ubuntu 'apt install build-essential', macOS 'xcode-select --install', or name yours in CXX"
PYTHON_HELP = "'apt install python3 python3-venv', 'brew install python@3.12' or 'uv python install 3.12'"
NEEDED_GB = {"cpu": 4, "cuda": 12}


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the file that its set-up logs to."""

    folder: Path
    log: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def stamp(self) -> Path:
        """What the environment was made from; written last."""
        return self.folder / ".complete"

    def pip(self, *command: str) -> list[str]:
        return [str(self.python), "-m", "pip", "--no-input", "--disable-pip-version-check", *command]

    def asked(self, *command: str) -> str:
        """What pip answers; nothing where it fails."""
        return subprocess.run(self.pip(*command), capture_output=True, text=True, check=False).stdout.strip()


OURS = Environment(Path(".venv"), CACHE / "setup.log")


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


def device() -> str:
    """`cuda` where an NVIDIA GPU is, else `cpu`; TRUETUNE_DEVICE overrides."""
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, check=False).stdout if tool else b""
    found = "cuda" if listed.startswith(b"GPU ") or Path("/proc/driver/nvidia/version").exists() else "cpu"
    target = os.environ.get("TRUETUNE_DEVICE") or found
    if target not in NEEDED_GB:
        raise SetupError(f"TRUETUNE_DEVICE={target}: choose one of: {', '.join(NEEDED_GB)}")
    return target


def digest(target: str, python: tuple[int, ...] = sys.version_info[:2]) -> str:
    """What the environment is made from."""
    pins = [target, TORCH, LLAMA_CPP_PYTHON_SHA256, *python]
    files = Path("requirements.lock").read_bytes() + Path("pyproject.toml").read_bytes()
    return hashlib.sha256(files + repr(pins).encode()).hexdigest() + "\n"


def works(place: Environment, code: str) -> bool:
    """Whether the environment's Python runs this code."""
    command = [str(place.python), "-c", code]
    return place.python.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def make_venv(place: Environment, target: str) -> None:
    """An empty environment; one that is broken, of another Python or for another device is made anew."""
    other = "truetune-cuda" if target == "cpu" else "truetune-cpu"
    usable = works(place, f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})")
    if not usable or other in (place.folder / "pyvenv.cfg").read_text(encoding="utf-8"):
        command = [sys.executable, "-m", "venv", "--clear", "--prompt", f"truetune-{target}", str(place.folder)]
        if not run(place.log, f"{place.folder.name} with Python {VERSION}", command, may_fail=True):
            makes_none = f"{sys.executable} makes no {place.folder.name}"
            raise SetupError(f"{makes_none} (Debian: 'apt install python3-venv'): see {place.log}")
    forget_halves(place)


def forget_halves(place: Environment) -> None:
    """Let pip install again what was cut off half-way, which it would take for installed: it writes INSTALLER last."""
    for installed in place.folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (installed / "INSTALLER").is_file():
            shutil.rmtree(installed)


@contextlib.contextmanager
def alone(place: Environment) -> Iterator[None]:
    """One at a time works on an environment; pip inherits the lock, so one that outlives its parent is waited for."""
    with place.log.with_suffix(".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up of {place.folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unfinished(requirements: Path) -> Path:
    """A file that is there while these requirements are added, and stays when that was cut off."""
    return OURS.folder / f".{requirements.stem}.unfinished"


def add(requirements: Path) -> None:
    """Install what only some recipes need beside what is there."""
    with alone(OURS):
        unfinished(requirements).touch()
        OURS.log.touch()
        forget_halves(OURS)
        install_locked(OURS, requirements)
        unfinished(requirements).unlink()


def install_locked(place: Environment, requirements: Path) -> None:
    """Install what is locked by uv; where that fails by pip, which looks where uv does not and says what is wrong."""
    uv, named = ROOT / OURS.folder / "bin/uv", re.findall(r"^\S+==", requirements.read_text(encoding="utf-8"), re.M)
    what = f"{len(named)} packages of {requirements.name}"
    by_uv = [str(uv), "pip", "install", "--no-config", "--python", str(place.python), *LOCKED, str(requirements)]
    if not uv.is_file() or not run(place.log, what, by_uv, may_fail=True, **indexes(place)):
        run(place.log, f"{what}, by pip", place.pip("install", *LOCKED, str(requirements)))


def indexes(place: Environment) -> dict[str, str]:
    """Where pip is told to look for packages, as uv takes it; with a hash each, it does not matter who has them."""
    rows = re.findall(r"^(global|install|:env:)\.(\S+)='(.*)'$", place.asked("config", "list"), re.M)
    rows.sort(key=lambda row: ("global", "install", ":env:").index(row[0]))  # the last one holds
    return {UV_NAMES[key]: " ".join(value.replace(r"\n", " ").split()) for _, key, value in rows if key in UV_NAMES}


def install_torch(place: Environment, target: str) -> None:
    """PyPI's build brings CUDA with it; the CPU build comes from the machine's own indexes or from PyTorch's."""
    if target == "cuda":
        run(place.log, "torch with CUDA", place.pip("install", f"torch=={TORCH}"))
        return
    build = TORCH if sys.platform == "darwin" else f"{TORCH}+cpu"
    install = place.pip("install", "--no-deps", f"torch=={build}")
    found = run(place.log, "torch for the processor", install, may_fail=True)
    elsewhere = [*install, *ELSEWHERE, TORCH_CPU_INDEX]
    if not found and not run(place.log, f"torch from {TORCH_CPU_INDEX}", elsewhere, may_fail=True):
        wheels = f"connect to {TORCH_CPU_INDEX} or take PyPI's larger build with TRUETUNE_DEVICE=cuda"
        raise SetupError(f"no CPU build of torch {TORCH} in reach (see {place.log}): {wheels}")


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


def find_compiler() -> str | None:
    """The C++ compiler that CMake will find."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


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
        say("stopped: the same command goes on from here")
        sys.exit(130)
