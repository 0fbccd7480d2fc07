"""What the containers are told: profiles, ports, user, memory and the proved model, as compose.yaml's variables."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.error import UserError
from pipeline.files import write_whole
from pipeline.recipe import Recipe
from serve.asking.endpoint import port_of_environment
from serve.asking.key import KEY_FILE
from serve.engines.vllm import END_SECONDS, Model, machine_for, model_arguments
from serve.openwebui import PASSWORD_FILE, SECRET_FILE

SETTINGS = Path(".env")
PLAYGROUND_TOKEN = Path(".secrets/playground-token")
# Who the containers are where root starts them: none of them runs as root.
NOBODY = 10001


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
