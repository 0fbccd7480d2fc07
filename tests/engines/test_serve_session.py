"""What other terminals see and do, the overrides of the environment, and environments of their own."""

import logging
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_fixture import NAME, Server, environment, gone

from pipeline import Recipe, Run, UserError
from pipeline.recipe import Data, Serve
from serve.api import refuse_taken_ports, ui_url
from serve.asking.endpoint import ask, with_environment
from serve.running.session import Session, find, held, report
from serve.running.supervisor import Supervisor
from setup import install as own
from setup.install import Environment, SetupError

pytest_plugins = ["serve_fixtures"]

RECIPE = Recipe("mine", data=Data(train=("talks.jsonl",)))


def told(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m serve.status small.yaml` in another terminal."""
    command = [sys.executable, "-m", "serve.status", f"{NAME}.yaml", *options]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_ctrl_c_is_heeded_again_after_the_services_ended() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Supervisor([]):
        pass
    assert signal.getsignal(signal.SIGINT) is before is not signal.SIG_IGN


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Serve()),
        ({"PORT": "8001", "UI_PORT": "3001"}, Serve(port=8001, ui_port=3001)),
        ({"ENGINE": "vllm", "UI": "none"}, Serve(engine="vllm", ui="none")),
        ({"UI": "builtin"}, Serve(ui="builtin")),
    ],
)
def test_the_environment_overrides_the_recipe(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: Serve
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert with_environment(RECIPE).serve == wanted


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"UI": "gradio"}, "UI='gradio' is unknown: choose one of openwebui, builtin, none"),
        ({"ENGINE": "tgi"}, "ENGINE='tgi' is unknown: choose one of llamacpp, ollama, vllm"),
        ({"UI_PORT": "http"}, "UI_PORT='http' is not a port"),
        ({"UI_PORT": "8000"}, "port 8000 is to be the engine's and the chat window's"),
        ({"ENGINE": "vllm", "UI": "builtin"}, "UI=builtin is llama.cpp's own page, vllm has none"),
    ],
)
def test_a_bad_override_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=problem):
        with_environment(RECIPE)


def test_taken_ports_are_told_together() -> None:
    with socket.socket() as engine, socket.socket() as window:
        for door in (engine, window):
            door.bind(("127.0.0.1", 0))
            door.listen()
        serve = replace(RECIPE.serve, port=engine.getsockname()[1], ui_port=window.getsockname()[1])
        with pytest.raises(UserError) as refused:
            refuse_taken_ports(replace(RECIPE, serve=serve))
    assert [" PORT=" in p.replace("'", " ") for p in refused.value.problems] == [True, False]
    assert "'UI_PORT=" in refused.value.problems[1]


def test_where_the_window_is() -> None:
    def url(ui: str) -> str:
        return ui_url(replace(RECIPE, serve=replace(RECIPE.serve, ui=ui)))

    assert [url(ui) for ui in ("openwebui", "builtin", "none")] == [
        "http://127.0.0.1:3000",
        "http://127.0.0.1:8000",
        "",
    ]


def test_a_session_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    run = Run("mine", tmp_path)
    session = Session(os.getpid(), "llamacpp", "none", "http://127.0.0.1:1/v1", "", "mine", "", [])
    assert find(run) is None
    with held(run):
        report(run, session)
        assert find(run) == session
        with pytest.raises(UserError, match="is already being served on http:"), held(run):
            pass
    assert find(run) is None
    report(run, session)  # as a killed process leaves it
    assert find(run) is None


def test_status_and_stop_from_another_terminal(start) -> None:
    server: Server = start()
    server.wait_for("Ctrl-C stops")
    pids = [server.process.pid, *server.children()]
    assert len(pids) == 3  # supervisor, engine, watchdog
    shown = told(server.folder)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"small is served at {server.url}/v1 by llamacpp, process {pids[0]}" in shown.stdout
    assert f"answers │ {server.port}" in shown.stdout
    assert told(server.folder, "--stop").stderr == f"runs/{NAME} is no longer served\n"
    assert server.process.wait(5) == 0
    assert all(gone(pid, 2) for pid in pids)
    assert "is not being served: 'make serve" in told(server.folder).stderr
    assert told(server.folder, "--stop").returncode == 0


def test_a_second_start_after_kill_9(start) -> None:
    first: Server = start()
    first.wait_for("Ctrl-C stops")
    pids = [first.process.pid, *first.children()]
    first.process.kill()
    first.process.wait()
    assert all(gone(pid, 3) for pid in pids)
    second: Server = start(port=first.port)
    second.wait_for("Ctrl-C stops")
    assert second.end() == 0


def test_llama_cpps_own_page_needs_the_key_only_for_the_model(start) -> None:
    import gzip
    import urllib.request

    server: Server = start(UI="builtin")
    server.wait_for("asks for the key once")
    request = urllib.request.Request(f"{server.url}/", headers={"Accept-Encoding": "gzip"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as page:
        content = page.read()
    assert b"<html" in (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    assert server.key.encode() not in content
    for key, refused in ((server.key, False), ("wrong", True)):  # what the page asks when it is opened again
        status = ask(server.port, "/v1/streams/lookup", key, {"conversation_ids": ["none"]})[0]
        assert (status == 401) is refused and status != 404
    assert server.end() == 0


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A checkout of its own with `setup/locks/part.txt`; the steps of an installation are noted, not done."""
    (tmp_path / "setup/locks").mkdir(parents=True)
    (tmp_path / "setup/locks/part.txt").write_text("one==1 --hash=sha256:1\ntwo==2 --hash=sha256:2\n")
    steps: list[str] = []

    def make_venv(place: Environment, target: str) -> None:
        steps.append("venv")
        place.python.parent.mkdir(parents=True, exist_ok=True)
        place.python.touch()

    monkeypatch.setattr(own, "ROOT", tmp_path)
    monkeypatch.setattr(own, "LOCKS", tmp_path / "setup/locks")
    monkeypatch.setenv("TRUETUNE_DEVICE", "cpu")
    monkeypatch.setattr(own, "make_venv", make_venv)
    monkeypatch.setattr(own, "install_torch", lambda *_: steps.append("torch"))
    monkeypatch.setattr(own, "install_locked", lambda _, requirements: steps.append(requirements.read_text()[:7]))
    return steps


def test_an_environment_is_made_once(requirements: list[str], tmp_path: Path) -> None:
    python = own.environment("part")
    assert python == tmp_path / ".venv-part/bin/python"
    assert requirements == ["venv", "torch", "one==1 "]
    assert own.environment("part") == python
    assert len(requirements) == 3


def test_changed_requirements_are_installed_and_torch_only_once(requirements: list[str], tmp_path: Path) -> None:
    own.environment("part")
    (tmp_path / "setup/locks/part.txt").write_text("torch==2.13.0 --hash=sha256:1\n")
    own.environment("part")
    assert requirements[3:] == ["venv", "torch=="]


def test_an_installation_that_failed_goes_on_next_time(
    requirements: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise SetupError("part.txt: no package index answers: connect to the network and run again")

    with monkeypatch.context() as failing:
        failing.setattr(own, "install_locked", fail)
        with pytest.raises(SetupError, match="no package index answers"):
            own.environment("part")
    with caplog.at_level(logging.INFO, "truetune"):
        own.environment("part")
    assert "is complete in" in caplog.text
    assert requirements[-1] == "one==1 "
