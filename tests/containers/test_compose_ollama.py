"""The stack with a real Ollama in containers: what is registered there answers, and nothing opens without it.

Where the published image is not in reach, TEST_OLLAMA_IMAGE names another with the same entry point.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ollama_run
import pytest
import yaml
from compose_run import REPOSITORY, Stack, docker_is_there
from openai import DefaultHttpxClient, OpenAI

IMAGE = (
    os.environ.get("TEST_OLLAMA_IMAGE")
    or yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["ollama"]["image"]
)
NAME = ollama_run.NAME


def image_is_there() -> bool:
    return (
        docker_is_there() and subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode == 0
    )


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not image_is_there(), reason="no image of Ollama: docker pull it")]


def made(folder: Path) -> Stack:
    """A stack that is not started, with a run to register."""
    (folder / "image.yaml").write_text(json.dumps({"services": {"ollama": {"image": IMAGE}}}))
    stack = Stack(folder, "ollama", COMPOSE_FILE="compose.yaml:image.yaml")
    with contextlib.chdir(folder):
        ollama_run.Registering("http://127.0.0.1:9").write()
    return stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = made(tmp_path_factory.mktemp("ollama"))
    try:
        started = running.up(f"{NAME}.yaml")
        assert started.returncode == 0, started.stderr
        yield running
    finally:
        running.end()


def test_the_registered_model_answers_through_the_gateway(stack: Stack) -> None:
    with DefaultHttpxClient(trust_env=False) as direct:
        client = OpenAI(base_url=f"http://127.0.0.1:{stack.port}/v1", api_key=stack.key, http_client=direct)
        assert f"{NAME}:latest" in [model.id for model in client.models.list()]
        question = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.create(model=NAME, messages=question, temperature=0)  # type: ignore[call-overload]
        pieces = client.chat.completions.create(model=NAME, messages=question, temperature=0, stream=True)  # type: ignore[call-overload]
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.choices[0].message.content


def test_register_waited_for_ollama_and_the_gateway_for_register(stack: Stack) -> None:
    ollama, register, gateway = (stack.container(name)["State"] for name in ("ollama", "register", "gateway"))
    assert ollama["StartedAt"] < register["StartedAt"] < register["FinishedAt"] < gateway["StartedAt"]
    assert (register["ExitCode"], ollama["Health"]["Status"], gateway["Health"]["Status"]) == (0, "healthy", "healthy")


@pytest.mark.parametrize("path", ["/api/create", "/api/pull", "/api/push", "/api/delete", "/api/chat", "/api/tags"])
def test_ollamas_own_addresses_stay_inside(stack: Stack, path: str) -> None:
    assert stack.ask("POST", path, body=b"{}")[0] == 404


def test_what_cannot_be_registered_opens_nothing(tmp_path: Path, stack: Stack) -> None:
    stack.up("--down")
    stack.docker("compose", "--profile", "*", "down", "--volumes", "--timeout", "1")
    failing = made(tmp_path)
    probes = tmp_path / "runs" / NAME / "reference" / "probes.jsonl"
    probes.write_text(probes.read_text().replace("Who are you?", "Who are they?"))
    started = failing.up(f"{NAME}.yaml")
    assert started.returncode == 1
    assert "error: the container register is exited: error: " in started.stderr
    assert failing.container("gateway")["State"]["Health"]["Status"] != "healthy"
