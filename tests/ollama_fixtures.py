"""Fixtures of `make register`: the run, and the double or the real Ollama; loaded by `pytest_plugins`, not imported."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from ollama_run import Registering

from serve.engines.ollama.server import server_url

REAL = os.environ.get("TEST_OLLAMA_HOST", "")


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OllamaDouble]:
    """An Ollama whose faults a test may choose."""
    server = OllamaDouble(tmp_path / "ollama")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def registering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Registering]:
    """A run to register, with the real Ollama where TEST_OLLAMA_HOST names one and the test takes no double."""
    if REAL and "double" in request.fixturenames:
        pytest.skip("faults are the double's")
    url = REAL if REAL else request.getfixturevalue("double").url
    monkeypatch.setenv("OLLAMA_HOST", url)
    monkeypatch.delenv("OLLAMA_API_KEY", raising=False)
    with contextlib.chdir(tmp_path):
        registering = Registering(server_url(url))
        yield registering
        registering.clean()
