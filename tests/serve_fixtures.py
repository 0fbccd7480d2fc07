"""Fixtures of the serving tests; loaded by `pytest_plugins`, not imported."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_fixture import Server, Window, free_port, write_gguf, write_run


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path, tiny_gguf: bytes) -> Path:
    """A folder with a run that is ready to be served."""
    write_run(tmp_path, tiny_gguf)
    return tmp_path


@pytest.fixture
def start(folder: Path):
    """Start a server in `folder`; it is ended with the test."""
    started: list[Server] = []

    def starting(**settings: object) -> Server:
        started.append(Server(folder, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield starting
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes):
    """One running server for all tests of a module that only ask it."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder, tiny_gguf)
    running = Server(folder)
    running.wait_for("Ctrl-C stops")
    yield running
    assert running.end() == 0


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes) -> Iterator[Window]:
    """Open WebUI takes a minute to start and its environment minutes to make: once for all tests."""
    folder, port = tmp_path_factory.mktemp("window"), free_port()
    write_run(folder, tiny_gguf)
    server = Server(folder, UI="openwebui", UI_PORT=str(port))
    window = Window(server, port)
    try:
        server.wait_for("Ctrl-C stops", seconds=900)
        yield window
    finally:
        code = window.server.end()
    assert code == 0
