"""Make `.venv` and `.cache`, in which every command runs:  python3.11 recipe/environment.py

Runs by path before any package exists: standard library only. Goes on where an interrupted run stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT, VENV, CACHE = Path(__file__).resolve().parent.parent, Path(".venv"), Path(".cache")
STAMP, LOG, PYTHON, VERSION = VENV / ".complete", CACHE / "setup.log", VENV / "bin/python", sys.version.split()[0]
INSTALL = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
LOCKED = [*INSTALL, "--no-deps", "--require-hashes", "--requirement"]
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BITSANDBYTES = "0.50.2"
# Converter, quantizer and comparison come from this one source, so they are the same llama.cpp commit.
LLAMA_CPP_PYTHON = "0.3.36"
LLAMA_CPP_PYTHON_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
CONVERTER = CACHE / f"llama.cpp-{LLAMA_CPP_PYTHON}"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
ELSEWHERE = ["--retries", "1", "--timeout", "15", "--extra-index-url"]  # out of reach must not cost minutes
COMPILER_HELP = "Debian/Ubuntu 'apt install build-essential', macOS 'xcode-select --install', or name yours in CXX"
PYTHON_HELP = "'apt install python3 python3-venv', 'brew install python@3.12' or 'uv python install 3.12'"
PROGRESS_EVERY_SECONDS, NEEDED_GB = 10, {"cpu": 4, "cuda": 12}


class SetupError(Exception):
    """What is wrong and what mends it."""


def main() -> None:
    start = time.monotonic()
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise SetupError(f"Python {VERSION} is not 3.11 or 3.12: get one with {PYTHON_HELP}")
    os.chdir(ROOT)
    target = device()
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        current = STAMP.is_file() and STAMP.read_text(encoding="utf-8") == digest(target)
        if current and CONVERTER.is_dir() and works(""):
            STAMP.touch()  # Make compares times, and a checkout renews those of the files behind the stamp
            return
        if not PYTHON.exists() and shutil.disk_usage(ROOT).free < NEEDED_GB[target] * 1e9:
            raise SetupError(f"{ROOT} has less than {NEEDED_GB[target]} GB of disk free: free some and run again")
        STAMP.unlink(missing_ok=True)
        LOG.write_bytes(b"")
        for leftover in CACHE.glob("setup-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="setup-", dir=CACHE) as scratch:
            make_venv(target)
            run("packages of requirements.lock", [*LOCKED, "requirements.lock"])
            install_torch(target)
            source = Path(scratch, "source.txt")
            source.write_text(f"llama-cpp-python=={LLAMA_CPP_PYTHON} --hash=sha256:{LLAMA_CPP_PYTHON_SHA256}\n")
            if not CONVERTER.is_dir():
                unpack_converter(source)
            install_llama_cpp_python(source)
            verify(target)
        STAMP.write_text(digest(target), encoding="utf-8")
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
    pins = [target, TORCH, BITSANDBYTES, LLAMA_CPP_PYTHON_SHA256, *python]
    files = Path("requirements.lock").read_bytes() + Path("pyproject.toml").read_bytes()
    return hashlib.sha256(files + repr(pins).encode()).hexdigest() + "\n"


def works(code: str) -> bool:
    """Whether the environment's Python runs this code."""
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], capture_output=True, check=False).returncode == 0


def make_venv(target: str) -> None:
    """An empty environment; one that is broken, of another Python or for another device is made anew."""
    other = "truetune-cuda" if target == "cpu" else "truetune-cpu"
    usable = works(f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})")
    if not usable or other in (VENV / "pyvenv.cfg").read_text(encoding="utf-8"):
        command = [sys.executable, "-m", "venv", "--clear", "--prompt", f"truetune-{target}", str(VENV)]
        if not run(f".venv with Python {VERSION}", command, may_fail=True):
            raise SetupError(f"{sys.executable} makes no .venv (Debian: 'apt install python3-venv'): see {LOG}")
    # pip writes INSTALLER last: what lacks it was cut off half-way, and pip would take it for installed.
    for installed in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (installed / "INSTALLER").is_file():
            shutil.rmtree(installed)


def install_torch(target: str) -> None:
    """PyPI's build brings CUDA with it; the CPU build comes from the machine's own indexes or from PyTorch's."""
    if target == "cuda":
        run("torch with CUDA", [*INSTALL, f"torch=={TORCH}"])
        run("bitsandbytes", [*INSTALL, "--no-deps", f"bitsandbytes=={BITSANDBYTES}"])
        return
    install = [*INSTALL, "--no-deps", f"torch=={TORCH}" if sys.platform == "darwin" else f"torch=={TORCH}+cpu"]
    found = run("torch for the processor", install, may_fail=True)
    if not found and not run(f"torch from {TORCH_CPU_INDEX}", [*install, *ELSEWHERE, TORCH_CPU_INDEX], may_fail=True):
        wheels = f"connect to {TORCH_CPU_INDEX} or take PyPI's larger build with TRUETUNE_DEVICE=cuda"
        raise SetupError(f"no CPU build of torch {TORCH} in reach (see {LOG}): {wheels}")


def unpack_converter(source: Path) -> None:
    """llama.cpp's converter out of llama-cpp-python's source, whole or not at all."""
    get = [*INSTALL[:3], "download", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes"]
    run("llama.cpp's converter (77 MB)", [*get, "-r", str(source), "--dest", str(source.parent)])
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
    wanted = ["--no-deps", "--only-binary=:all:", f"llama-cpp-python=={LLAMA_CPP_PYTHON}"]
    if run("llama-cpp-python, if prebuilt", [*INSTALL, *wanted, *ELSEWHERE, LLAMA_CPP_WHEELS], may_fail=True):
        return
    if not find_compiler():
        raise SetupError(f"no C++ compiler, which llama-cpp-python needs: {COMPILER_HELP}")
    # NATIVE off: the wheel that pip keeps must run on every machine that shares this home.
    flags = os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF")
    compiling = [*LOCKED, str(source), "--verbose"]
    run("llama-cpp-python, compiled unless pip kept it (5 to 15 min)", compiling, CMAKE_ARGS=flags)


def find_compiler() -> str | None:
    """The C++ compiler that CMake will find."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def verify(target: str) -> None:
    """Everything imports, torch is the right build, and a machine without a GPU has no CUDA package."""
    code = "import llama_cpp, transformers, torch; assert (torch.version.cuda is not None) == " + str(target == "cuda")
    run("check of what was installed", [str(PYTHON), "-c", code])
    unwanted = sorted(path.name for path in VENV.glob("lib/python*/site-packages/nvidia_*.dist-info"))
    if target == "cpu" and unwanted:
        raise SetupError(f"CUDA packages on a machine without a GPU ({unwanted[0]}): delete .venv and run again")


def run(what: str, command: list[str], may_fail: bool = False, **extra: str) -> bool:
    """Run a step, its output in the log, with a progress line every few seconds; False if it may fail and did."""
    say(what)
    start, skip = time.monotonic(), LOG.stat().st_size
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    clean = {key: value for key, value in os.environ.items() if key not in elsewhere} | extra
    with LOG.open("ab") as log, open(os.devnull) as none:
        # In a session of its own, so that Ctrl-C reaches it and its compilers once, from here.
        process = subprocess.Popen(command, stdin=none, stdout=log, stderr=log, env=clean, start_new_session=True)
    while process.returncode is None:
        try:
            process.wait(PROGRESS_EVERY_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"  {time.monotonic() - start:.0f} s{progress(skip, time.monotonic() - start)}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()  # it tidies up; a second Ctrl-C does not wait
            raise
    if process.returncode and not may_fail:
        useful = [line for line in LOG.read_text(errors="replace").splitlines() if line.strip()]
        raise SetupError("\n  ".join([f"{what}: see {LOG}", *useful[-6:]]))
    return process.returncode == 0


def progress(skip: int, seconds: float) -> str:
    """How far a step is: ninja's `[12/180]` while compiling, else pip's last action."""
    text = LOG.read_bytes()[skip:].decode(errors="replace")
    if counts := re.findall(r"^\s*\[\s*(\d+)/(\d+)\]", text, re.M):
        done, total = map(int, counts[-1])
        left = f"{seconds * (total - done) / done / 60:.0f} min left"
        return f": {100 * done // total} %, {done} of {total} files, {left}"
    actions = re.findall(r"^\s*((?:Collecting|Downloading|Building|Preparing) \S+|Installing \w+ \w+)", text, re.M)
    return f": {actions[-1]}" if actions else ""


def say(line: str) -> None:
    print(f"set-up: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say("stopped: the same command goes on from here")
        sys.exit(130)
