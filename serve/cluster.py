"""Print the commands that serve the model on several machines:  make cluster HOSTS="10.0.0.1 10.0.0.2" [WAY=...]

`.venv-vllm/bin/python -m serve.cluster --route PORT URL ...` is one of them: vllm-router over several servers. It needs
no key of its own: a client's is good if a server behind it takes it. Without that, which vllm-router's command line
cannot ask for, anyone who reaches the port could add a server that reads what is asked.

One model over all machines, by vLLM's own processes (`nodes`) or by Ray (`ray`), or a copy of it on each behind
vllm-router (`replicas`). The commands are printed, not run: they belong on other machines, in a checkout with this run.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import KEY_FILE
from serve.engines.vllm import Machine, Model, model_arguments, model_of

WAYS = ("replicas", "nodes", "ray")
PROGRAMS = ".venv-vllm/bin"
MASTER_PORT, RAY_PORT = 29501, 6379
METRICS_PORT_OFFSET = 1000
KEY = f'export VLLM_API_KEY="$(cat {KEY_FILE})"'
BEFORE = """\
# On each machine: this checkout, runs/{name} and {key}, and 'make vllm' run once, which makes .venv-vllm.
# The machines talk to one another without password or encryption, and whoever reaches their ports can run programs
# on them: give them a network of their own.
"""


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
    return [*servers, Step(hosts[0], (f"{PROGRAMS}/python -m serve.cluster --route {port + 1} {' '.join(workers)}",))]


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
    start = f"RAY_USAGE_STATS_ENABLED=0 VLLM_HOST_IP={{}} PYTHONPATH=. {PROGRAMS}/ray start --node-ip-address {{}}"
    first = f"{start.format(head, head)} --head --port {RAY_PORT} --include-dashboard=false"
    joining = [Step(host, (f"{start.format(host, host)} --address {head}:{RAY_PORT}",)) for host in others]
    final = Step(head, (KEY, server(recipe, model, head, "--distributed-executor-backend", "ray")))
    return [Step(head, (first,)), *joining, final]


def server(recipe: Recipe, model: Model, host: str, *more: str) -> str:
    """`vllm serve` on that host's own address; the guard lets no one in without the key."""
    machine = Machine(gpus=1, precision="bfloat16", cores=0)  # how many GPUs there are, the recipe's sizes say
    settings = f"VLLM_HOST_IP={host} VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_PLUGINS= PYTHONPATH=."
    where = ("--host", host, "--port", str(recipe.serve.port))
    words = (f"{PROGRAMS}/vllm", "serve", str(model.weights), *where, *model_arguments(recipe, model, machine), *more)
    return f"{settings} {shlex.join(words)}"


def problems(recipe: Recipe, hosts: list[str], way: str) -> list[str]:
    """What is wrong with the machines that were named, or with the sizes for so many."""
    found = [] if hosts else ["no machines given: make cluster HOSTS='10.0.0.1 10.0.0.2'"]
    found += [
        f"HOSTS: {host!r} is no address" for host in hosts if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:-]*", host)
    ]
    if way not in WAYS:
        return [*found, f"WAY={way}: choose one of: {', '.join(WAYS)}"]
    knobs = recipe.serve.vllm
    if way != "replicas" and hosts and (knobs.tensor * knobs.pipeline) % len(hosts):
        sizes = f"serve.vllm.tensor {knobs.tensor} x pipeline {knobs.pipeline}"
        found.append(
            f"{sizes} cannot be shared by {len(hosts)} machines: set pipeline={len(hosts)}, tensor=GPUs of one"
        )
    return found


def text(recipe: Recipe, steps: list[Step]) -> str:
    """The commands as a person reads them: where, then what."""
    return BEFORE.format(name=recipe.name, key=KEY_FILE) + "".join(
        f"\n# on {step.host}\n" + "".join(f"{command}\n" for command in step.commands) for step in steps
    )


def router_settings(port: int, servers: list[str]) -> dict[str, Any]:
    """The settings of the router.

    A server is out after two failures and tried again after ten seconds; a request that found it dead goes to another
    before its client sees anything. A stream that has begun ends with the server that wrote it.
    """
    return {
        "worker_urls": servers,
        "host": "127.0.0.1",
        "port": port,
        "api_key_validation_urls": [f"{server}/v1/models" for server in servers],
        "worker_startup_check_interval": 1,
        "retry_max_retries": 5,
        "retry_initial_backoff_ms": 50,
        "cb_failure_threshold": 2,
        "cb_success_threshold": 1,
        "cb_timeout_duration_secs": 10,
        "health_check_interval_secs": 5,
        "health_failure_threshold": 2,
        "health_success_threshold": 1,
        "max_payload_size": 4_000_000,
        "request_timeout_secs": 600,
        "log_level": "warn",
        "prometheus_host": "127.0.0.1",
        "prometheus_port": port + METRICS_PORT_OFFSET,
    }


def route(port: int, servers: list[str]) -> None:
    """Be the router until a signal."""
    from vllm_router_rs import PolicyType, Router

    Router(policy=PolicyType.PowerOfTwo, **router_settings(port, servers)).start()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--route"]:
        route(int(sys.argv[2]), sys.argv[3:])
        sys.exit()
    with boundary():
        recipe = recipe_of_arguments("serve.cluster", "Print the commands that serve the model on several machines")
        hosts, way = os.environ.get("HOSTS", "").split(), os.environ.get("WAY") or WAYS[0]
        if found := problems(recipe, hosts, way):
            raise UserError(*found)
        sys.stdout.write(text(recipe, commands(recipe, model_of(recipe, Run.of(recipe)), hosts, way)))
