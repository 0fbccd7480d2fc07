"""Print the commands that serve the model on several machines:  make cluster HOSTS="10.0.0.1 10.0.0.2" [WAY=...]

One model over all machines, by vLLM's own processes (`nodes`) or by Ray (`ray`), or a copy of it on each behind
vllm-router (`replicas`). The commands are printed, not run: they belong on other machines, in a checkout with this run.
"""

import os
import re
import shlex
from dataclasses import dataclass, replace

from recipe.command import boundary, recipe_of_arguments
from recipe.error import UserError
from recipe.run import Run
from recipe.schema import Recipe
from serve.endpoint import with_environment
from serve.key import KEY_FILE
from serve.vllm import Machine, Model, folders, impossible_sizes, model_arguments

WAYS = ("replicas", "nodes", "ray")
PYTHON = ".venv-vllm/bin/python"
SERVE = ("-P", "-m", "vllm.entrypoints.cli.main", "serve")
MASTER_PORT, RAY_PORT, METRICS_PORT = 29501, 6379, 29000
KEY = f'export VLLM_API_KEY="$(cat {KEY_FILE})"'
GPUS_OF_A_HOST = 8  # that each host has them is the reader's to know
WARNING = """\
# The machines talk to one another without encryption or password, and who reaches those ports can run programs:
# give them a network of their own. Copy runs/{name} and {key} to each, and run 'make vllm' there once."""


@dataclass(frozen=True)
class Step:
    """Commands for one machine, in their order."""

    host: str
    commands: tuple[str, ...]


def commands(recipe: Recipe, model: Model, hosts: list[str], way: str) -> list[Step]:
    """What to run where; nothing secret is in it, since each machine reads its own key file."""
    make = {"replicas": replicas, "nodes": nodes, "ray": ray}
    return make[way](recipe, model, hosts)


def replicas(recipe: Recipe, model: Model, hosts: list[str]) -> list[Step]:
    """A whole server on each host, and the router in front of them on the first."""
    port = recipe.serve.port
    servers = [Step(host, (KEY, server(recipe, model, host))) for host in hosts]
    workers = [f"http://{host}:{port}" for host in hosts]
    return [*servers, Step(hosts[0], (line("", PYTHON, *router(workers, port + 1)),))]


def nodes(recipe: Recipe, model: Model, hosts: list[str]) -> list[Step]:
    """One server whose processes are on all hosts; only the first one answers."""
    steps = []
    for rank, host in enumerate(hosts):
        more = ["--nnodes", str(len(hosts)), "--node-rank", str(rank)]
        more += ["--master-addr", hosts[0], "--master-port", str(MASTER_PORT)]
        steps.append(Step(host, (KEY, server(recipe, model, host, *more, *(["--headless"] if rank else [])))))
    return steps


def ray(recipe: Recipe, model: Model, hosts: list[str]) -> list[Step]:
    """One server, whose processes Ray places on the hosts that joined it."""
    head, *others = hosts
    start = f"{PYTHON} -m ray.scripts.scripts start"
    first = f"{start} --head --port {RAY_PORT} --node-ip-address {head} --include-dashboard=false"
    joining = [Step(host, (f"{start} --address {head}:{RAY_PORT} --node-ip-address {host}",)) for host in others]
    final = Step(head, (KEY, server(recipe, model, head, "--distributed-executor-backend", "ray")))
    return [Step(head, (first,)), *joining, final]


def server(recipe: Recipe, model: Model, host: str, *more: str) -> str:
    """`vllm serve` on that host's own address; the guard lets no one in without the key."""
    machine = Machine(gpus=GPUS_OF_A_HOST, precision="bfloat16", cores=0)
    where = ("--host", host, "--port", str(recipe.serve.port))
    settings = f"VLLM_HOST_IP={host} VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_PLUGINS= PYTHONPATH=."
    return line(settings, PYTHON, *SERVE, str(model.weights), *where, *model_arguments(recipe, model, machine), *more)


def router(workers: list[str], port: int, metrics_port: int = METRICS_PORT) -> tuple[str, ...]:
    """vllm-router's arguments; it passes on the client's key, so it needs none of its own.

    A worker that fails is asked no more after two failures, and again after ten seconds; a request that found it
    dead is sent to another worker before the client sees anything.
    """
    return (
        *("-P", "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *workers, "--policy", "power_of_two"),
        *("--retry-max-retries", "5", "--retry-initial-backoff-ms", "50"),
        *("--cb-failure-threshold", "2", "--cb-timeout-duration-secs", "10"),
        *("--health-check-interval-secs", "5", "--health-failure-threshold", "2", "--health-success-threshold", "1"),
        *("--max-payload-size", "4000000", "--request-timeout-secs", "600"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
    )


def line(settings: str, *words: str) -> str:
    """One command, quoted for a shell."""
    return f"{settings} {shlex.join(words)}".strip()
