"""The stack in real containers, in a folder of its own."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gguf_fixture import NAME, free_port

from pipeline import UserError
from serve.compose import refuse_without_docker

REPOSITORY = Path(__file__).parent.parent
PARTS = (".dockerignore", "compose.yaml", "pipeline", "recipes", "requirements.lock", "serve", "setup")
PROJECT = f"truetune-test-{os.getpid()}"
CHAT = "/v1/chat/completions"
QUESTION = {"model": NAME, "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}


def docker_is_there() -> bool:
    try:
        refuse_without_docker()
    except UserError:
        return False
    return True


class Stack:
    """`make up PROFILE=llamacpp UI=none`, or with another profile, in a folder with a copy of what it reads."""

    def __init__(self, folder: Path, profile: str = "llamacpp", **more: str) -> None:
        for part in PARTS:
            source = REPOSITORY / part
            shutil.copytree(source, folder / part) if source.is_dir() else shutil.copy2(source, folder)
        self.folder, self.port = folder, free_port()
        self.environment = {
            key: value for key, value in os.environ.items() if key not in ("RECIPE", "PYTHONPATH", "UI_PORT")
        } | {"COMPOSE_PROJECT_NAME": PROJECT, "PROFILE": profile, "UI": "none", "PORT": str(self.port), **more}

    @property
    def key(self) -> str:
        return (self.folder / ".secrets/api-key").read_text().strip()

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.compose", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def docker(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        identity = self.docker("compose", "ps", "--all", "--quiet", service).strip()
        described: dict[str, Any] = json.loads(self.docker("inspect", identity))[0]
        return described

    def inside(self, service: str, path: str) -> str:
        """A file as the container's own processes see it."""
        return self.docker("compose", "exec", "-T", service, "cat", path)

    def ask(
        self, method: str, path: str, key: str | None = None, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request, its path sent as it is written; no key stands for the right one."""
        bearer = {"Authorization": f"Bearer {self.key if key is None else key}"} if key != "" else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body or None, bearer | (headers or {}))
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def send(self, raw: str) -> bytes:
        """What comes back for these very bytes, until the other end closes or says no more."""
        reply = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=3) as connection:
            connection.sendall(raw.encode())
            with contextlib.suppress(TimeoutError):
                while piece := connection.recv(65536):
                    reply += piece
        return reply

    def answers(self) -> bool:
        try:
            return self.ask("POST", CHAT, body=json.dumps(QUESTION).encode())[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait(self, seconds: float = 60) -> float:
        """Seconds until a question is answered."""
        begin = time.monotonic()
        while not self.answers():
            assert time.monotonic() - begin < seconds, self.docker("compose", "logs", "--tail", "20")
            time.sleep(0.2)
        return time.monotonic() - begin

    def end(self) -> None:
        """`make down`, and nothing is left, not even what was uploaded."""
        down = self.up("--down")
        self.docker("compose", "--profile", "*", "down", "--volumes", "--timeout", "1")
        assert down.returncode == 0, down.stderr
        assert self.docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""
