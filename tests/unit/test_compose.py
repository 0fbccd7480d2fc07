"""compose.yaml: what every container must be, what it is told, and what stops `make up` before it starts."""

import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import UserError, load
from pipeline.command import SILENT
from serve import compose, openwebui
from serve.asking.endpoint import with_environment
from serve.compose import check, refuse_without_docker
from serve.engines import vllm
from serve.running.backend import Endpoint
from setup import install

TEXT = Path("compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = Path("serve/containers/Dockerfile").read_text(encoding="utf-8")
GROUPS = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
VLLM_VERSION = next(pin.partition("==")[2] for pin in GROUPS["vllm"] if pin.startswith("vllm=="))
ONCE = {"register", "train", "train-gpu"}
PUBLISHED = {"gateway", "openwebui", "playground"}
ENGINES = {"llamacpp", "ollama", "ollama-gpu", "vllm"}


def variables(text: str) -> set[str]:
    return set(re.findall(r"\$\{(\w+)", text))


def settings() -> dict[str, str]:
    return compose.settings(
        load("tiny", []), Path("recipes/tiny.yaml"), ["llamacpp", "playground"], Path("t.gguf"), "5a"
    )


def test_the_profiles_are_those_that_the_readme_promises() -> None:
    assert {profile for service in SERVICES.values() for profile in service.get("profiles", [])} == {
        "ollama", "llamacpp", "vllm", "gpu", "playground", "train", "train-gpu"
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "${TRUETUNE_USER:-10001:10001}"
    assert service["read_only"] is True and service["init"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0 and service["mem_limit"] and service["stop_grace_period"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert "network_mode" not in service and "docker.sock" not in str(service.get("volumes"))
    assert all(mount.startswith("/tmp:") for mount in service["tmpfs"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_server_has_a_health_check_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    if name in ONCE:
        assert service["healthcheck"] == {"disable": True} and service["restart"] == "no"
    else:
        assert service["healthcheck"]["test"][0].startswith("CMD") and service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_container_waits_for_has_a_condition(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        assert how["condition"] == ("service_completed_successfully" if needed in ONCE else "service_healthy")


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_of_one_version(name: str) -> None:
    image = SERVICES[name]["image"]
    if "build" in SERVICES[name]:
        assert re.fullmatch(r"truetune-[a-z-]+:\d+\.\d+\.\d+", image)
        assert f" AS {SERVICES[name]['build']['target']}\n" in DOCKERFILE
    elif name == "vllm":  # the very version whose arguments are tested; its digest is not known here
        assert image == f"vllm/vllm-openai:v{VLLM_VERSION}"
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}", image)


def test_vllm_is_told_what_make_vllm_tells_it(tmp_path: Path) -> None:
    recipe = load("tiny", ["serve.vllm.tensor=2", "serve.queue=7", "serve.vllm.precision=bfloat16"])
    told = compose.settings(recipe, Path("recipes/tiny.yaml"), ["vllm"], Path("t.gguf"), "5a")
    command = re.sub(r"\$\{(\w+):-[^}]*\}", lambda found: told[found[1]], SERVICES["vllm"]["command"])
    wanted = vllm.arguments(recipe, vllm.Model(Path("/model")), vllm.Machine(2, "bfloat16", 1), 8000)
    words = [*SERVICES["vllm"]["entrypoint"][1:], *shlex.split(command)]
    assert words == ["vllm", "serve", *("0.0.0.0" if word == "127.0.0.1" else word for word in wanted[3:])]
    silent = {name: SILENT[name] for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")}
    assert SERVICES["vllm"]["environment"].items() >= (silent | vllm.QUIET | {"PYTHONPATH": "/truetune"}).items()
    (template,) = [word for word in wanted if word.endswith(".jinja")]
    assert template == "/model/chat_template.jinja"
    assert "./serve/gateway/auth.py:/truetune/serve/gateway/auth.py:ro" in SERVICES["vllm"]["volumes"]


@pytest.mark.skipif(not shutil.which("docker"), reason="no Docker Compose")
def test_compose_reads_vllms_arguments_as_a_shell_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compose.yaml").write_text(TEXT)
    (tmp_path / "serve/containers").mkdir(parents=True)
    (tmp_path / "serve/containers/openwebui.env").touch()
    told = compose.settings(load("tiny", []), Path("recipes/tiny.yaml"), ["vllm"], Path("t.gguf"), "5a")
    monkeypatch.chdir(tmp_path)
    compose.write_settings(told)
    done = subprocess.run(["docker", "compose", "config", "--format", "json"], capture_output=True, text=True)
    if "is not a docker command" in done.stderr or "unknown flag: --format" in done.stderr:
        pytest.skip("no Docker Compose")
    assert done.returncode == 0, done.stderr
    command = json.loads(done.stdout)["services"]["vllm"]["command"]
    assert command == ["--host", "0.0.0.0", "--port", "8000", *shlex.split(told["TRUETUNE_VLLM"])]


def test_the_gateway_is_healthy_only_once_the_engine_has_the_model(tmp_path: Path) -> None:
    """Compose takes a failed `register` for an absent one, so that the window waits for the gateway's health."""
    _, test = SERVICES["gateway"]["healthcheck"]["test"]
    (tmp_path / "wget").write_text('#!/bin/sh\necho "$SAYS"\n')
    (tmp_path / "wget").chmod(0o755)
    for name, healthy in (("mine", True), ("mine:latest", True), ("mine-base", False), ("notmine", False)):
        says = json.dumps({"data": [{"id": name}]})
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "mine", "SAYS": says}
        assert (subprocess.run(["sh", "-c", test.replace("$$", "$")], env=environment).returncode == 0) is healthy
    assert SERVICES["openwebui"]["depends_on"]["gateway"] == {"condition": "service_healthy"}


def test_only_the_gateway_and_the_windows_are_published_and_only_on_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == PUBLISHED
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_the_engines_are_on_a_network_that_leads_nowhere() -> None:
    assert COMPOSE["networks"]["engines"] == {"internal": True}
    assert all(set(SERVICES[name]["networks"]) == {"engines"} for name in ENGINES)


def test_only_the_gateway_stands_between_the_windows_and_the_engines() -> None:
    both = {name for name, service in SERVICES.items() if {"engines", "windows"} <= set(service["networks"])}
    assert both == {"gateway"}
    assert COMPOSE["networks"]["windows"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_as_files_and_never_as_variables(name: str) -> None:
    told = SERVICES[name].get("environment", {}) | {line.partition("=")[0]: 0 for line in env_file(name)}
    assert [key for key in told if re.search(r"(KEY|SECRET|PASSWORD|TOKEN)$", key)] == []
    for mount in SERVICES[name].get("volumes", []):
        assert ".secrets" not in mount


def env_file(name: str) -> list[str]:
    file = SERVICES[name].get("env_file")
    return Path(file).read_text(encoding="utf-8").splitlines() if file else []


def test_open_webui_is_told_what_make_serve_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES["openwebui"]
    lines = [line.partition("=")[::2] for line in env_file("openwebui") if not line.startswith("#")]
    told = {key: value.strip("'") for key, value in lines}
    monkeypatch.chdir(tmp_path)
    native = openwebui.settings(Endpoint("url", "model", "key"), 3000, tmp_path)
    here = set(service["environment"]) | {secret["target"] for secret in service["secrets"]}
    assert told == {key: value for key, value in native.items() if key not in here}
    assert here <= set(native)


def test_every_secret_is_a_file_below_the_secrets() -> None:
    assert {secret["file"].rpartition("/")[0] for secret in COMPOSE["secrets"].values()} == {".secrets"}


def test_every_volume_is_declared_and_every_mounted_model_is_read_only() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", [])]
    named = {mount.partition(":")[0] for mount in mounts if not mount.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    assert all(mount.endswith(":ro") for mount in mounts if "MODEL" in mount or "MERGED" in mount)


def test_make_up_sets_what_the_file_asks_for() -> None:
    asked = variables(TEXT)
    assert asked == {name for name in settings() if name.startswith("TRUETUNE_")}
    assert all(re.search(rf"\$\{{{name}:-", TEXT) for name in asked), "each has a default, so that config works alone"


def test_the_images_have_the_versions_of_the_environment() -> None:
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE, re.M))
    for name in ("TORCH", "LLAMA_CPP_PYTHON"):
        assert pins[name] == getattr(install, name)
    assert re.search(r"openwebui:([\d.]+)$", SERVICES["openwebui"]["image"])[1] in re.findall(
        r"^open-webui==([\d.]+)", Path("setup/locks/openwebui.txt").read_text(encoding="utf-8"), re.M
    )


def test_no_image_runs_as_root_or_on_a_moving_base() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)
    bases = {part.split()[0] for part in stages[1:]}
    named = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.M))
    assert bases - named == {"${PYTHON_IMAGE}", "scratch"}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11-slim-bookworm$", DOCKERFILE, re.M)
    for service in SERVICES.values():
        if "build" in service:
            assert "USER 10001:10001" in stage_of(service["build"]["target"])


def stage_of(name: str) -> str:
    """The text of a stage of the Dockerfile, and of those that it is made from."""
    base, text = re.search(rf"^FROM (\S+) AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S).groups()
    return text + (stage_of(base) if f" AS {base}\n" in DOCKERFILE else "")


def test_the_builder_sees_code_and_locks_only() -> None:
    lines = [
        line for line in Path(".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert lines[0] == "*"
    seen = [line for line in lines[1:] if line.startswith("!")]
    assert all(re.match(r"!(pipeline|setup|serve|requirements\.lock)", line) for line in seen)
    # A folder is named by itself: Docker's older builder looks into none that only `**` names.
    assert not any("**" in line for line in seen)


@pytest.mark.parametrize(
    ("given", "profiles"),
    [
        ("", ["ollama"]),
        ("playground", ["ollama", "playground"]),
        ("llamacpp playground", ["llamacpp", "playground"]),
        ("llamacpp,playground", ["llamacpp", "playground"]),
        ("train gpu", ["train", "gpu"]),
    ],
)
def test_a_profile_is_an_engine_and_what_goes_with_it(
    given: str, profiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROFILE", given)
    assert compose.profiles_of_environment() == profiles


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("olama", "PROFILE='olama' is unknown: choose from ollama, gpu, llamacpp, vllm, playground, train"),
        ("ollama vllm", "has 2 engines"),
        ("gpu ollama", "has 2 engines"),
        ("train llamacpp", "'train' goes alone or with 'gpu'"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(given: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILE", given)
    with pytest.raises(UserError, match=re.escape(problem)):
        compose.profiles_of_environment()


def test_the_settings_are_kept_private_and_the_users_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("MINE=1\nTRUETUNE_NAME=old\n")
    compose.write_settings({"TRUETUNE_NAME": "new"})
    assert Path(".env").read_text() == "MINE=1\nTRUETUNE_NAME=new\n"
    assert stat.S_IMODE(Path(".env").stat().st_mode) == 0o600


def test_containers_are_never_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert compose.machine()["TRUETUNE_USER"] == "10001:10001"
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    assert compose.machine()["TRUETUNE_USER"].startswith("1234:")


@pytest.mark.parametrize(
    ("docker", "problem"),
    [
        (None, "no docker on this machine: install Docker Engine"),
        ("exit 1", "Docker Compose is missing: install docker-compose-plugin 2.20 or newer"),
        ("echo 2.3.3", "Docker Compose is 2.3.3: install docker-compose-plugin 2.20 or newer"),
        ("echo v2.19.1", "Docker Compose is v2.19.1"),
        ("[ $1 = compose ] && echo 2.40.3 || { echo permission denied >&2; exit 1; }", "(permission denied)"),
    ],
)
def test_a_missing_docker_is_told_with_what_works_without(
    docker: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if docker:
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{docker}\n")
        (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        refuse_without_docker()
    assert str(caught.value).endswith("or use 'make serve', which needs no Docker")


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\n[ "$2" = ps ] || echo 2.40.3\n')
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("PORT", str(port))
        with pytest.raises(UserError, match=f"port {port} is in use: .* PORT={port + 1}"):
            check(with_environment(load("tiny", [])), ["llamacpp"])
