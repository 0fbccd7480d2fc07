"""Several machines: the commands for each way, and what cannot be shared among them."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import Recipe
from pipeline.recipe import Data, Serve, Vllm
from serve.cluster import WAYS, commands, problems
from serve.engines.vllm import Model

REPOSITORY = Path(__file__).parents[2]
HOSTS = ["10.0.0.1", "10.0.0.2"]
MODEL = Model(Path("runs/mine/merged"))


def recipe_with(**sizes: int) -> Recipe:
    return Recipe("mine", data=Data(train=("talks.jsonl",)), serve=Serve(vllm=Vllm(**sizes)))  # type: ignore[arg-type]


def servers(steps: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    return [(host, words) for host, words in steps if "serve" in words]


def words_of(recipe: Recipe, way: str) -> list[tuple[str, list[str]]]:
    """(host, words) of each command, without the settings in front."""
    found = []
    for step in commands(recipe, MODEL, HOSTS, way):
        for command in step.commands:
            words = shlex.split(command)
            found.append((step.host, [word for word in words if not ("=" in word and word.split("=")[0].isupper())]))
    return found


def test_replicas_are_whole_servers_with_a_router_in_front() -> None:
    steps = words_of(recipe_with(tensor=2), "replicas")
    found = servers(steps)
    assert [host for host, _ in found] == HOSTS
    for host, words in found:
        assert words[:6] == [".venv-vllm/bin/vllm", "serve", "runs/mine/merged", "--host", host, "--port"]
        assert words[words.index("--tensor-parallel-size") + 1] == "2"
    router = [
        ".venv-vllm/bin/python",
        "-m",
        "serve.cluster",
        "--route",
        "8001",
        "http://10.0.0.1:8000",
        "http://10.0.0.2:8000",
    ]
    assert steps[-1] == ("10.0.0.1", router)


def test_nodes_are_one_server_of_which_the_first_answers() -> None:
    (first, head), (second, other) = servers(words_of(recipe_with(tensor=8, pipeline=2), "nodes"))
    assert (first, second) == ("10.0.0.1", "10.0.0.2")
    assert head[-8:] == ["--nnodes", "2", "--node-rank", "0", "--master-addr", "10.0.0.1", "--master-port", "29501"]
    assert other[-9:] == [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master-addr",
        "10.0.0.1",
        "--master-port",
        "29501",
        "--headless",
    ]


def test_ray_is_joined_by_all_before_one_server_starts() -> None:
    steps = words_of(recipe_with(tensor=8, pipeline=2), "ray")
    starts = [(host, words) for host, words in steps if "start" in words]
    assert [host for host, _ in starts] == HOSTS
    assert "--head" in starts[0][1] and "10.0.0.1:6379" in starts[1][1]
    assert steps[-1][0] == "10.0.0.1" and steps[-1][1][-2:] == ["--distributed-executor-backend", "ray"]


@pytest.mark.parametrize("way", WAYS)
def test_each_server_has_the_guard_and_reads_its_key_from_a_file(way: str) -> None:
    for step in commands(recipe_with(pipeline=2), MODEL, HOSTS, way):
        for command in step.commands:
            if " serve " in command:
                assert (
                    "--middleware serve.gateway.auth.ApiKeyAuth" in command and f"VLLM_HOST_IP={step.host} " in command
                )
                assert step.commands[0] == 'export VLLM_API_KEY="$(cat .secrets/api-key)"'


@pytest.mark.parametrize(
    ("sizes", "hosts", "way", "told"),
    [
        ({}, HOSTS, "replicas", []),
        ({"pipeline": 2}, HOSTS, "ray", []),
        ({"tensor": 2}, HOSTS, "nodes", []),
        ({}, HOSTS, "nodes", ["serve.vllm.tensor 1 x pipeline 1 cannot be shared by 2 machines"]),
        ({}, [], "replicas", ["no machines given"]),
        ({}, ["a;reboot", "$(x)"], "replicas", ["'a;reboot' is no address", "'$(x)' is no address"]),
        ({}, HOSTS, "slurm", ["WAY=slurm: choose one of: replicas, nodes, ray"]),
    ],
)
def test_what_cannot_be_is_told(sizes: dict[str, int], hosts: list[str], way: str, told: list[str]) -> None:
    found = problems(recipe_with(**sizes), hosts, way)
    assert len(found) == len(told)
    assert all(part in problem for part, problem in zip(told, found, strict=True))


def test_an_adapter_is_served_on_several_machines_too() -> None:
    steps = commands(recipe_with(), replace(MODEL, adapter=Path("runs/mine/adapter")), HOSTS, "replicas")
    assert "--lora-modules mine=runs/mine/adapter" in steps[0].commands[1]


def test_the_command_prints_and_runs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve.cluster", "assistant"],
        cwd=REPOSITORY,
        env={"HOSTS": "10.0.0.1 10.0.0.2", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "# on 10.0.0.2\n" in done.stdout and done.stdout.count(" serve runs/assistant/merged ") == 2
