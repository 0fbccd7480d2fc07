"""Start the stack in containers, or stop it:  python -m serve.compose RECIPE [--check | --down]

`PROFILE` in the environment names one engine (`ollama`, `gpu`, `llamacpp`, `vllm`) and, if wanted, `playground`; or
`train`. Docker Compose's own progress goes to standard error, where to find what it started to standard output.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.files import write_whole
from pipeline.load import find
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import KEY_FILE, make_key, port_of_environment, port_problem, url_of, with_environment
from serve.engines.llamacpp import is_repeatable, refuse_long_context, served_file
from serve.engines.vllm import END_SECONDS, Model, machine_for, model_arguments
from serve.openwebui import EMAIL, PASSWORD_FILE, SECRET_FILE
from serve.running.backend import chosen, refuse_disproved, refuse_without_gguf

DOES = "Start the stack in containers; with --down, stop it"
READY_SECONDS = 1800
SETTINGS = Path(".env")
PLAYGROUND_TOKEN = Path(".secrets/playground-token")
# Who the containers are where root starts them: none of them runs as root.
NOBODY = 10001
OLDEST_COMPOSE = (2, 20)  # the first with dependencies that may be absent

STARTED = """
{name} ({type}) runs in containers
{windows}
  API    {url}/v1
  model  {name}
  key    in {key}

docker compose logs --follow    shows what they say
make down                       stops them
"""
WINDOW = """
  chat   {url}
         as {email}, password in {password}
"""
PLAYGROUND = """
  play   {url}/?token=$(cat {token})
"""


@dataclass(frozen=True)
class Engine:
    """Where the gateway finds an engine, and which of its addresses tells its health."""

    address: str
    health: str


ENGINES = {
    "ollama": Engine("ollama:11434", "/api/version"),
    "gpu": Engine("ollama:11434", "/api/version"),
    "llamacpp": Engine("llamacpp:8000", "/health"),
    "vllm": Engine("vllm:8000", "/health"),
}


def up(recipe: Recipe, file: str, profiles: list[str]) -> None:
    """Prove the model's file, write what the containers need, start them, wait until all are healthy, tell."""
    run, published = Run.of(recipe), ports(recipe, profiles)
    with run.lock():
        recipe = chosen(recipe, run)
        refuse_disproved(recipe, run)
        path, known = served_file(recipe, run)
        refuse_long_context(recipe.serve.context, path)
        if "vllm" in profiles:
            run.verified("merge")
        for secret in secrets(recipe, profiles):
            make_key(secret)
            hand_over(secret)
        hand_over(run.folder)
        write_settings(settings(recipe, find(file), profiles, path, str(known["sha256"])))
    started = services(recipe, profiles)
    compose("build", "--with-dependencies", *started)  # `create --build` would take old images of what these need
    compose("create", *started)  # what cannot be fetched or built leaves what runs alone
    stop_others({*answer("config", "--services")} - ({"openwebui", "playground"} - {*started}))
    compose("up", "--detach", "--wait", "--wait-timeout", str(READY_SECONDS), *started)
    sys.stdout.write(where(recipe, published))


def stop_others(wanted: set[str]) -> None:
    """Remove what an earlier start with other profiles left running."""
    if others := sorted({*answer("--profile", "*", "ps", "--services")} - wanted):
        compose("--profile", "*", "rm", "--stop", "--force", *others)


def where(recipe: Recipe, published: dict[str, int]) -> str:
    """Where to find what runs."""
    windows, urls = "", {variable: url_of(port) for variable, port in published.items()}
    if "UI_PORT" in urls:
        windows += WINDOW.format(url=urls["UI_PORT"], email=EMAIL, password=PASSWORD_FILE)
    if "PLAYGROUND_PORT" in urls:
        windows += PLAYGROUND.format(url=urls["PLAYGROUND_PORT"], token=PLAYGROUND_TOKEN)
    served, url = recipe.served_type, urls["PORT"]
    return STARTED.format(name=recipe.name, type=served, windows=windows, url=url, key=KEY_FILE)


def train(recipe: Recipe, file: str, profiles: list[str]) -> None:
    """Run `make train` in a container, on the GPU where PROFILE says so; its progress goes to this terminal."""
    write_settings(machine())
    hand_over(Run.of(recipe).folder)
    compose("run", "--rm", "--build", "train-gpu" if "gpu" in profiles else "train", "train", f"RECIPE={file}")


def check(recipe: Recipe, profiles: list[str]) -> None:
    """Before minutes of training: what would stop the containers after it.

    Raises:
        UserError: Docker is missing or does not answer, or a port is taken.
    """
    refuse_without_docker()
    if "train" not in profiles:
        refuse_without_gguf(recipe, "the gateway in its container")
    if "train" in profiles or answer("ps", "--quiet", "gateway"):
        return  # nothing is published, or what holds the ports is about to be replaced
    for variable, port in ports(recipe, profiles).items():
        if problem := port_problem(port):
            raise UserError(f"port {port} {problem}: stop the other program or choose another, {variable}={port + 1}")


def refuse_without_docker() -> None:
    """Docker Engine and Compose are there and answer.

    Raises:
        UserError: with what is missing.
    """
    instead = "or use 'make serve', which needs no Docker"
    if not shutil.which("docker"):
        raise UserError(f"no docker on this machine: install Docker Engine (docs.docker.com/engine/install), {instead}")
    shown = "".join(answer("version", "--short")) or "missing"
    if tuple(int(part) for part in shown.lstrip("v").split(".")[:2] if part.isdigit()) < OLDEST_COMPOSE:
        oldest = ".".join(map(str, OLDEST_COMPOSE))
        raise UserError(f"Docker Compose is {shown}: install docker-compose-plugin {oldest} or newer, {instead}")
    info = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if info.returncode:
        reason = (info.stderr.strip() or "it does not say why").splitlines()[-1]
        raise UserError(f"Docker does not answer ({reason}): start it, or join its group, {instead}")


def compose(*arguments: str) -> None:
    """Run Docker Compose.

    Raises:
        UserError: with the last words of the container that failed.
    """
    done = subprocess.run(["docker", "compose", *arguments], stdout=sys.stderr, check=False)
    if done.returncode == 0:
        return
    shown = "{{.Service}}|{{.State}}|{{.Health}}|{{.ExitCode}}"
    rows = [line.split("|") for line in answer("ps", "--all", "--format", shown)]
    # What ended first: others are only unhealthy because of it.
    for service, state, health, code in sorted(rows, key=lambda row: row[1] != "exited"):
        if state == "restarting" or health == "unhealthy" or (state == "exited" and code not in ("0", "143")):
            lines = answer("logs", "--no-log-prefix", "--tail", "20", service) or ["it logged nothing"]
            raise UserError(f"the container {service} is {health or state}: {lines[-1]}")
    raise UserError(f"'docker compose {arguments[0]}' failed with code {done.returncode}: its output is above")


def answer(*arguments: str) -> list[str]:
    """The lines of Docker Compose's answer; none where it has nothing to say."""
    done = subprocess.run(["docker", "compose", *arguments], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.strip()]


def profiles_of_environment() -> list[str]:
    """`PROFILE` of the environment: one engine and perhaps the playground, or `train` and perhaps `gpu`.

    Raises:
        UserError: a name is unknown, or they do not go together.
    """
    named = (os.environ.get("PROFILE") or "ollama").replace(",", " ").split()
    known = [*ENGINES, "playground", "train"]
    if unknown := [name for name in named if name not in known]:
        raise UserError(f"PROFILE={unknown[0]!r} is unknown: choose from {', '.join(known)}")
    if "train" in named:
        if set(named) - {"train", "gpu"}:
            raise UserError(f"PROFILE={' '.join(named)!r}: 'train' goes alone or with 'gpu'; start the rest after it")
        return named
    engines = [name for name in named if name in ENGINES]
    if len(engines) > 1:
        raise UserError(f"PROFILE={' '.join(named)!r} has {len(engines)} engines: choose one of {', '.join(ENGINES)}")
    return named if engines else ["ollama", *named]


def settings(recipe: Recipe, file: Path, profiles: list[str], model: Path, sha256: str) -> dict[str, str]:
    """What compose.yaml asks for to serve this model, by name."""
    engine = next(ENGINES[name] for name in profiles if name in ENGINES)
    return {
        **machine(),
        "COMPOSE_PROFILES": ",".join(profiles),
        "TRUETUNE_ENGINE": engine.address,
        "TRUETUNE_HEALTH": engine.health,
        "TRUETUNE_NAME": recipe.name,
        "TRUETUNE_RECIPE": os.path.relpath(file),
        "TRUETUNE_MODEL": str(model),
        "TRUETUNE_MODEL_SHA256": sha256,
        "TRUETUNE_CONTEXT": str(recipe.serve.context),
        "TRUETUNE_SLOTS": str(recipe.serve.slots),
        "TRUETUNE_QUEUE": str(recipe.serve.queue),
        "TRUETUNE_THREADS": str(recipe.serve.threads),
        "TRUETUNE_REPEATABLE": json.dumps(model.is_file() and is_repeatable(recipe.serve.repeatable, model)),
        "TRUETUNE_TEMPERATURE": str(recipe.serve.temperature),
        "TRUETUNE_VLLM": vllm_arguments(recipe),
        "TRUETUNE_GRACE": str(recipe.serve.vllm.grace + END_SECONDS),
        **{f"TRUETUNE_{variable}": str(port) for variable, port in ports(recipe, profiles).items()},
    }


def vllm_arguments(recipe: Recipe) -> str:
    """What `make vllm` tells vLLM of the merged weights on GPUs, as a shell would read it."""
    return shlex.join(model_arguments(recipe, Model(Path("/model")), replace(machine_for(recipe), gpus=1)))


def machine() -> dict[str, str]:
    """Who the containers are, and the most memory that an engine or a training may take: three quarters of it all."""
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{NOBODY}:{NOBODY}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"TRUETUNE_USER": user, "TRUETUNE_MEMORY": f"{total * 3 // 4 // 2**20}m"}


def ports(recipe: Recipe, profiles: list[str]) -> dict[str, int]:
    """What is published on 127.0.0.1, by the variable that chooses it.

    Raises:
        UserError: one is no port, or two are the same.
    """
    found = {"PORT": recipe.serve.port}
    if has_window(recipe):
        found["UI_PORT"] = recipe.serve.ui_port
    if "playground" in profiles:
        found["PLAYGROUND_PORT"] = port_of_environment(recipe.serve.playground_port, "PLAYGROUND_PORT")
    if len(set(found.values())) < len(found):
        raise UserError(f"{' and '.join(found)} are the same port, {found['PORT']}: change one")
    return found


def services(recipe: Recipe, profiles: list[str]) -> list[str]:
    """What is started by name; what these depend on comes with them."""
    return ["gateway", *["openwebui"] * has_window(recipe), *["playground"] * ("playground" in profiles)]


def secrets(recipe: Recipe, profiles: list[str]) -> list[Path]:
    """The files that the started containers read their secrets from; each has one."""
    window, playground = has_window(recipe), "playground" in profiles
    return [KEY_FILE, *[PASSWORD_FILE, SECRET_FILE] * window, *[PLAYGROUND_TOKEN] * playground]


def has_window(recipe: Recipe) -> bool:
    """Whether Open WebUI is wanted; `UI=none` does without.

    Raises:
        UserError: it is another window, which the gateway would not let through.
    """
    if recipe.serve.ui == "builtin":
        raise UserError("UI=builtin is no window of the containers: choose openwebui or none")
    return recipe.serve.ui == "openwebui"


def write_settings(values: dict[str, str]) -> None:
    """Put them into `.env`, which only its owner reads; the lines that the user added stay."""
    kept = SETTINGS.read_text(encoding="utf-8").splitlines() if SETTINGS.is_file() else []
    others = [line for line in kept if line.partition("=")[0] not in values]
    write_whole(SETTINGS, "\n".join([*others, *(f"{name}={value}" for name, value in values.items())]) + "\n")
    SETTINGS.chmod(0o600)


def hand_over(place: Path) -> None:
    """Where root starts the containers, which are another user: give that one this file or folder."""
    if os.getuid() == 0:
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


def main() -> None:
    wanted = {argument for argument in sys.argv[1:] if argument in ("--check", "--down")}
    sys.argv = [argument for argument in sys.argv if argument not in wanted]
    if "--down" in wanted:
        refuse_without_docker()
        compose("--profile", "*", "down", "--remove-orphans")
        return
    recipe = with_environment(recipe_of_arguments("serve.compose", DOES))
    profiles = profiles_of_environment()
    if "--check" in wanted:
        check(recipe, profiles)
    elif "train" in profiles:
        train(recipe, sys.argv[1], profiles)
    else:
        up(recipe, sys.argv[1], profiles)


if __name__ == "__main__":
    with boundary():
        main()
