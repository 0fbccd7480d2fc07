"""Virtual environments and what is installed into them: one set-up at a time, each step with its log and its progress.

Runs before any package exists: standard library only. A part whose pins conflict with ours has an environment of its
own, made on first use from `setup/locks/<name>.txt` beside `.venv`, since every recipe shares it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, CACHE, VERSION = Path(__file__).resolve().parent.parent, Path(".cache"), sys.version.split()[0]
LOCKS = ROOT / "setup/locks"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Converter, quantizer and comparison come from this one source, so they are the same llama.cpp commit.
LLAMA_CPP_PYTHON = "0.3.36"
LLAMA_CPP_PYTHON_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER = CACHE / f"llama.cpp-{LLAMA_CPP_PYTHON}"
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
OWN_NEEDED_GB = {"cpu": 5, "cuda": 15}
PROGRESS_EVERY_SECONDS = 10

log = logging.getLogger("truetune")


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


class SetupError(Exception):
    """What is wrong and what fixes it."""


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


def environment(name: str) -> Path:
    """The Python of `.venv-<name>`; an interrupted installation is resumed, changed requirements are installed anew.

    Raises:
        SetupError: no package index answers, the disk is full, or a package cannot be installed.
    """
    requirements, target = LOCKS / f"{name}.txt", device()
    place = Environment(ROOT / f".venv-{name}", ROOT / CACHE / f"{name}.log")
    if not is_complete(place, requirements, target):
        place.log.parent.mkdir(exist_ok=True)
        with alone(place):
            if not is_complete(place, requirements, target):  # another start may have made it meanwhile
                make(place, requirements, target)
    return place.python


def is_complete(place: Environment, requirements: Path, target: str) -> bool:
    """Whether the environment was made to its end from these very requirements."""
    made_from = place.stamp.read_text(encoding="utf-8") if place.stamp.is_file() else ""
    return made_from == pinned(requirements, target) and place.python.exists()


def pinned(requirements: Path, target: str) -> str:
    """What the environment is made from: the requirements, torch's build and Python's version."""
    pins = repr([TORCH, target, *sys.version_info[:2]]).encode()
    return hashlib.sha256(requirements.read_bytes() + pins).hexdigest() + "\n"


def make(place: Environment, requirements: Path, target: str) -> None:
    """Install what the requirements name, and torch, unless they name it, in the build that this machine uses."""
    begin = time.monotonic()
    if not place.python.exists() and shutil.disk_usage(ROOT).free < OWN_NEEDED_GB[target] * 1e9:
        raise SetupError(f"{ROOT} has less than {OWN_NEEDED_GB[target]} GB of disk free: free some, run again")
    log.info("%s is made on this first use: some minutes, its log is %s", place.folder, place.log)
    place.stamp.unlink(missing_ok=True)
    place.log.write_bytes(b"")
    make_venv(place, target)
    if not re.search(r"^torch==", requirements.read_text(encoding="utf-8"), re.M):
        install_torch(place, target)
    install_locked(place, requirements)
    place.stamp.write_text(pinned(requirements, target), encoding="utf-8")
    log.info("%s is complete in %.0f s", place.folder, time.monotonic() - begin)


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


def find_converter() -> Path | None:
    """`convert_hf_to_gguf.py` of the llama.cpp that the installed llama-cpp-python was built from.

    None where only training is installed, as in its container.
    """
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    script = ROOT / CACHE / f"llama.cpp-{version}" / "convert_hf_to_gguf.py"
    return script if script.is_file() else None


def find_compiler() -> str | None:
    """The C++ compiler that CMake will find."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def run(log: Path, what: str, command: list[str], may_fail: bool = False, **extra: str) -> bool:
    """Run a step, its output in the log, with a progress line every few seconds; False if it may fail and did."""
    say(what)
    start, skip = time.monotonic(), log.stat().st_size
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    clean = {key: value for key, value in os.environ.items() if key not in elsewhere} | extra
    with log.open("ab") as output, open(os.devnull) as none:
        # In a session of its own, so that Ctrl-C reaches it and its compilers once, from here.
        process = subprocess.Popen(  # with the lock of `alone`, the one file that is inherited
            command, stdin=none, stdout=output, stderr=output, env=clean, start_new_session=True, close_fds=False
        )
    while process.returncode is None:
        try:
            process.wait(PROGRESS_EVERY_SECONDS)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - start
            say(f"  {seconds:.0f} s{progress(printed(log, skip), seconds)}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()  # it tidies up; a second Ctrl-C does not wait
            raise
    if process.returncode and not may_fail:
        raise SetupError(reason(what, log, printed(log, skip)))
    return process.returncode == 0


def printed(log: Path, skip: int) -> str:
    return log.read_bytes()[skip:].decode(errors="replace")


def reason(what: str, log: Path, text: str) -> str:
    """Why a step failed, from its output."""
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return f"{what}: the disk is full: free some space and run again (see {log})"
    if re.search(r"from versions: none|ConnectionError|Max retries exceeded|Temporary failure in name", text):
        return f"{what}: no package index answers: connect to the network and run again (see {log})"
    return "\n  ".join([f"{what}: see {log}", *[line for line in text.splitlines() if line.strip()][-6:]])


def progress(text: str, seconds: float) -> str:
    """How far a step is: ninja's `[12/78]` while compiling, uv's megabytes, else pip's packages and last action."""
    if counts := re.findall(r"^\s*\[\s*(\d+)/(\d+)\]", text, re.M):
        done, total = map(int, counts[-1])
        left = f"{seconds * (total - done) / done / 60:.0f} min left"
        return f": {100 * done // total} %, {done} of {total} files, {left}"
    if sizes := dict(re.findall(r"^Downloading (\S+) \(([\d.]+)MiB\)", text, re.M)):
        megabytes = sum(map(float, sizes.values()))
        got = sum(float(sizes.get(name, 0)) for name in re.findall(r"^ Downloaded (\S+)", text, re.M))
        left = f", {got / seconds:.1f} MB a second, {seconds * (megabytes - got) / got:.0f} s left" if got else ""
        return f": {got:.0f} of {megabytes:.0f} MB{left}"
    packages = len(re.findall(r"^Collecting ", text, re.M))
    actions = re.findall(r"^\s*((?:Collecting|Downloading|Building|Preparing|Installing) \S+)", text, re.M)
    return f": {packages} packages, {packages / seconds:.1f} a second: {actions[-1]}" if actions else ""


def say(line: str) -> None:
    print(f"set-up: {line}", file=sys.stderr, flush=True)
