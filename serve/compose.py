"""Start the stack in containers, or stop it:  python -m serve.compose RECIPE [--check | --down]

`PROFILE` in the environment names one engine (`ollama`, `gpu`, `llamacpp`, `vllm`) and, if wanted, `playground`; or
`train`. Docker Compose's own progress goes to standard error, where to find what it started to standard output.
"""

import shutil
import subprocess
import sys

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.load import find
from pipeline.recipe import Recipe
from pipeline.recommend import chosen
from pipeline.run import Run
from serve.api import refuse_disproved
from serve.asking.endpoint import port_problem, url_of, with_environment
from serve.asking.key import KEY_FILE, make_key
from serve.containers import stack
from serve.engines.llamacpp import refuse_long_context, served_file
from serve.openwebui import EMAIL, PASSWORD_FILE

DOES = "Start the stack in containers; with --down, stop it"
READY_SECONDS = 1800
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


def up(recipe: Recipe, file: str, profiles: list[str]) -> None:
    """Prove the model's file, write what the containers need, start them, wait until all are healthy, tell."""
    run, published = Run(recipe.name), stack.ports(recipe, profiles)
    with run.lock():
        recipe = chosen(recipe, run)
        refuse_disproved(recipe, run)
        path, known = served_file(recipe, run)
        refuse_long_context(recipe.serve.context, path)
        if "vllm" in profiles:
            run.verified("merge")
        for secret in stack.secrets(recipe, profiles):
            make_key(secret)
            stack.hand_over(secret)
        stack.hand_over(run.folder)
        stack.write_settings(stack.settings(recipe, find(file), profiles, path, str(known["sha256"])))
    started = stack.services(recipe, profiles)
    compose("build", "--with-dependencies", *started)  # `create --build` would take old images of what these need
    compose("create", *started)  # what cannot be fetched or built leaves what runs alone
    stop_others({*answer("config", "--services")} - ({"openwebui", "playground"} - {*started}))
    compose("up", "--detach", "--wait", "--wait-timeout", str(READY_SECONDS), *started)
    sys.stdout.write(told(recipe, published))


def stop_others(wanted: set[str]) -> None:
    """Remove what an earlier start with other profiles left running."""
    if others := sorted({*answer("--profile", "*", "ps", "--services")} - wanted):
        compose("--profile", "*", "rm", "--stop", "--force", *others)


def told(recipe: Recipe, published: dict[str, int]) -> str:
    """Where to find what runs."""
    windows, urls = "", {variable: url_of(port) for variable, port in published.items()}
    if "UI_PORT" in urls:
        windows += WINDOW.format(url=urls["UI_PORT"], email=EMAIL, password=PASSWORD_FILE)
    if "PLAYGROUND_PORT" in urls:
        windows += PLAYGROUND.format(url=urls["PLAYGROUND_PORT"], token=stack.PLAYGROUND_TOKEN)
    served, url = recipe.served_type, urls["PORT"]
    return STARTED.format(name=recipe.name, type=served, windows=windows, url=url, key=KEY_FILE)


def train(recipe: Recipe, file: str, profiles: list[str]) -> None:
    """Run `make train` in a container, on the GPU where PROFILE says so; its progress goes to this terminal."""
    stack.write_settings(stack.machine())
    stack.hand_over(Run(recipe.name).folder)
    compose("run", "--rm", "--build", "train-gpu" if "gpu" in profiles else "train", "train", f"RECIPE={file}")


def check(recipe: Recipe, profiles: list[str]) -> None:
    """Before minutes of training: what would stop the containers after it.

    Raises:
        UserError: Docker is missing or does not answer, or a port is taken.
    """
    refuse_without_docker()
    if "train" in profiles or answer("ps", "--quiet", "gateway"):
        return  # nothing is published, or what holds the ports is about to be replaced
    for variable, port in stack.ports(recipe, profiles).items():
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
            said = answer("logs", "--no-log-prefix", "--tail", "20", service) or ["it said nothing"]
            raise UserError(f"the container {service} is {health or state}: {said[-1]}")
    raise UserError(f"'docker compose {arguments[0]}' failed with code {done.returncode}: what it said is above")


def answer(*arguments: str) -> list[str]:
    """The lines of Docker Compose's answer; none where it has nothing to say."""
    done = subprocess.run(["docker", "compose", *arguments], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.strip()]


def main() -> None:
    wanted = {argument for argument in sys.argv[1:] if argument in ("--check", "--down")}
    sys.argv = [argument for argument in sys.argv if argument not in wanted]
    if "--down" in wanted:
        refuse_without_docker()
        compose("--profile", "*", "down", "--remove-orphans")
        return
    recipe = with_environment(recipe_of_arguments("serve.compose", DOES))
    profiles = stack.profiles_of_environment()
    if "--check" in wanted:
        check(recipe, profiles)
    elif "train" in profiles:
        train(recipe, sys.argv[1], profiles)
    else:
        up(recipe, sys.argv[1], profiles)


if __name__ == "__main__":
    with boundary():
        main()
