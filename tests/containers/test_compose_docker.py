"""The stack in real containers: llama.cpp behind the gateway, asked as users ask it and as intruders would."""

import contextlib
import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compose_run import CHAT, PROJECT, QUESTION, Stack, docker_is_there
from gguf_fixture import NAME, write_run
from openai import DefaultHttpxClient, OpenAI

pytest_plugins = ["serve_fixtures"]
CONTAINERS = ("gateway", "llamacpp")


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not docker_is_there(), reason="no Docker Engine with Compose")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("containers")
    running = Stack(folder)
    write_run(folder, tiny_gguf)
    try:
        checked = running.up(f"{NAME}.yaml", "--check")
        assert checked.returncode == 0, checked.stderr
        started = running.up(f"{NAME}.yaml")
        assert started.returncode == 0, started.stderr
        assert f"http://127.0.0.1:{running.port}/v1" in started.stdout
        yield running
    finally:
        running.end()


def test_the_official_client_chats_through_the_gateway(stack: Stack) -> None:
    with DefaultHttpxClient(trust_env=False) as direct:
        client = OpenAI(base_url=f"http://127.0.0.1:{stack.port}/v1", api_key=stack.key, http_client=direct)
        assert [model.id for model in client.models.list()] == [NAME]
        answer = client.chat.completions.create(**QUESTION)
        assert answer.choices[0].message.content and answer.usage.completion_tokens == 4
        pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**QUESTION, stream=True)]
        assert "".join(filter(None, pieces)) == answer.choices[0].message.content
        assert client.completions.create(model=NAME, prompt="Hello", max_tokens=4).choices[0].text


def test_health_is_that_of_the_engine(stack: Stack) -> None:
    assert stack.ask("GET", "/health")[0::2] == (200, b'{"status":"ok"}')


# What llama.cpp, vLLM and Ollama have besides, then the allowed addresses in other spellings.
CLOSED = """
GET /  GET /metrics  GET /slots  GET /props  POST /props  POST /tokenize  POST /detokenize  POST /apply-template
POST /completion  POST /infill  GET /lora-adapters  POST /embedding  POST /v1/messages  POST /v1/responses
POST /invocations  POST /score  POST /v1/score  POST /rerank  POST /v1/rerank  POST /pooling  POST /classify
GET /version  GET /load  POST /pause  POST /v1/load_lora_adapter  GET /docs  GET /openapi.json  GET /ping
GET /api/tags  POST /api/create  POST /api/pull  POST /api/push  POST /api/generate  POST /api/chat  GET /api/version
DELETE /api/delete  POST /api/blobs/sha256:00  GET /debug/pprof/  GET /v1/models/another  GET /v1/health
POST /health  HEAD /v1/models  DELETE /v1/models  GET /v1/chat/completions  PUT /v1/chat/completions  OPTIONS /health
GET /v1/models/  GET /v1//models  GET //v1/models  GET /V1/models  GET /v1/Models  GET /v1/%6dodels  GET /v1%2fmodels
GET /v1/models%2f  GET /v1/models%00  GET /v1/models%20  GET /v1/models?a=1  GET /v1/models?  GET /v1/models;a
GET /./v1/models  GET /v1/../v1/models  GET /x/../v1/models  GET /v1/models/..  GET /v1/models/../../metrics
GET /v1/models/..%2f..%2fmetrics  GET /v1/models%2f..%2f..%2fmetrics  GET /v1/models/%2e%2e/%2e%2e/metrics
POST /v1/chat/completions/  POST /v1/chat/completions/../../../slots  GET /health/  GET /health/../metrics
GET http://gateway/v1/models  GET http://llamacpp:8000/metrics  GET /v1\\models  GET /v1/models,/metrics
"""


def test_every_other_address_is_refused(stack: Stack) -> None:
    let_in = {}
    for method, path in zip(*[iter(CLOSED.split())] * 2, strict=True):
        status, _, body = stack.ask(method, path, body=b"{}" if method in ("POST", "PUT") else b"")
        if status not in (400, 404) or b"prompt_tokens_total" in body or b'"object"' in body:
            let_in[method, path] = status, body
    assert let_in == {}


def test_the_model_is_described_by_its_name(stack: Stack) -> None:
    status, _, body = stack.ask("GET", "/v1/models/small")
    assert status == 200 and json.loads(body).items() >= {"id": "small", "object": "model"}.items()


@pytest.mark.parametrize("path", ["/health", CHAT, "/metrics"])
@pytest.mark.parametrize("key", ["", "wrong", "{key}x", "*", "{env.API_KEY}", "{key},Bearer {key}"])
def test_nobody_without_the_key_learns_anything(stack: Stack, path: str, key: str) -> None:
    given = key.replace("{key}", stack.key)
    method = "GET" if path in ("/health", "/metrics") else "POST"
    bearer = f"Authorization: Bearer {given}\r\n" if given else ""
    reply = stack.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{bearer}\r\n")
    assert reply.startswith(b"HTTP/1.1 401"), reply[:200]
    assert b"invalid_api_key" in reply


def test_the_other_ways_to_show_a_key_are_no_ways(stack: Stack) -> None:
    for header in (f"X-Api-Key: {stack.key}", f"Authorization: {stack.key}", f"Authorization: Basic {stack.key}"):
        reply = stack.send(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 401"), header


# A second request hidden in the first: where the two ends of a proxy count bytes differently, it gets through.
HIDDEN = "GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
LENGTH = len(HIDDEN.format(key="k" * 43))
SMUGGLED = {
    "length then chunks": f"Content-Length: {LENGTH + 5}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}",
    "two lengths": f"Content-Length: 0\r\nContent-Length: {LENGTH}\r\n\r\n{HIDDEN}",
    "odd coding": f"Content-Length: 0\r\nTransfer-Encoding: xchunked\r\n\r\n{HIDDEN}",
    "blank before colon": f"Content-Length: 0\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n{HIDDEN}",
    "folded coding": f"Content-Length: 0\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{HIDDEN}",
    "signed length": f"Content-Length: +0\r\n\r\n{HIDDEN}",
    "lone line feeds": f"Content-Length: 0\n\n{HIDDEN}",
    "pipelined": f"Content-Length: 2\r\n\r\n[]{HIDDEN}",
    "upgrade": f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n{HIDDEN}",
}


@pytest.mark.parametrize("trick", SMUGGLED)
def test_no_request_hides_in_another(stack: Stack, trick: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\n"
    reply = stack.send(head + SMUGGLED[trick].replace("{key}", stack.key))
    assert b"llamacpp:" not in reply and b"101 Switching" not in reply
    assert b"HTTP/1.1 200" not in reply, reply
    assert stack.answers()


def test_a_name_or_path_in_a_header_leads_nowhere_else(stack: Stack) -> None:
    extra = {"X-Original-URL": "/metrics", "X-Rewrite-URL": "/metrics", "X-HTTP-Method-Override": "POST"}
    status, _, body = stack.ask("GET", "/v1/models", headers=extra | {"Host": "llamacpp:8000"})
    assert status == 200 and b'"object"' in body and b"llamacpp:" not in body


@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_large_is_refused(stack: Stack, told: bool) -> None:
    body = b'{"prompt": "' + b"x" * 10_000_000
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=60)
    headers = {"Authorization": f"Bearer {stack.key}"}
    pieces = body if told else (body[at : at + 65536] for at in range(0, len(body), 65536))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
        connection.request("POST", CHAT, pieces, headers, encode_chunked=not told)
    assert connection.getresponse().status == 413
    connection.close()
    assert stack.answers()


def test_many_at_once_are_answered_or_told_to_come_back(stack: Stack) -> None:
    def one(_: int) -> tuple[int, str]:
        status, headers, _ = stack.ask("POST", CHAT, body=json.dumps(QUESTION).encode())
        return status, headers.get("retry-after", "")

    with ThreadPoolExecutor(100) as pool:
        found = set(pool.map(one, range(200)))
    assert (200, "") in found
    assert found <= {(200, ""), (503, "5")}


def test_only_the_gateway_is_published_and_only_on_this_machine(stack: Stack) -> None:
    published = {name: stack.container(name)["NetworkSettings"]["Ports"] for name in CONTAINERS}
    assert published["gateway"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}
    assert not any((published["llamacpp"] or {}).values())


@pytest.mark.parametrize("service", CONTAINERS)
def test_a_running_container_has_no_privileges(stack: Stack, service: str) -> None:
    status = dict(
        line.split(":\t", 1) for line in stack.inside(service, "/proc/1/status").splitlines() if ":\t" in line
    )
    assert "0" not in status["Uid"].split() and "0" not in status["Gid"].split()
    assert all(int(status[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"))
    assert status["NoNewPrivs"] == "1"
    host = stack.container(service)["HostConfig"]
    assert host["ReadonlyRootfs"] and not host["Privileged"] and host["PidsLimit"] > 0 and host["Memory"] > 0
    assert host["LogConfig"]["Config"]["max-size"] == "10m"
    mounts = {
        line.split()[1]: line.split()[3].split(",") for line in stack.inside(service, "/proc/mounts").splitlines()
    }
    assert "ro" in mounts["/"]
    assert [
        place for place, ways in mounts.items() if place.startswith(("/run/secrets", "/model")) and "rw" in ways
    ] == []


@pytest.mark.parametrize("network", ["engines", "windows"])
def test_there_is_no_way_out(stack: Stack, network: str) -> None:
    server = re.search(r"^nameserver (\d\S+)", Path("/etc/resolv.conf").read_text(), re.M)
    if not server or not reaches(server[1], "bridge"):
        pytest.skip("no container gets out of this machine anyway")
    assert not reaches(server[1], f"{PROJECT}_{network}")


def reaches(address: str, network: str) -> bool:
    """Whether a container on this network connects to a name server outside."""
    code = f"import socket; socket.create_connection(({address!r}, 53), 3)"
    image = ["--entrypoint", "python", "truetune-engine:0.1.0", "-c", code]
    return subprocess.run(["docker", "run", "--rm", "--network", network, *image], capture_output=True).returncode == 0


def test_the_key_shows_nowhere(stack: Stack) -> None:
    stack.ask("GET", "/metrics")
    shown = stack.docker("compose", "logs") + stack.docker("compose", "config")
    for service in CONTAINERS:
        container = stack.container(service)
        shown += json.dumps(container) + stack.docker("history", "--no-trunc", container["Image"])
        shown += json.dumps(json.loads(stack.docker("inspect", container["Image"])))
        shown += stack.docker("compose", "top", service)
    assert NAME in shown and stack.key not in shown
    assert stack.key not in (stack.folder / ".env").read_text()


def test_a_second_start_changes_nothing(stack: Stack) -> None:
    before = {service: stack.container(service)["Id"] for service in CONTAINERS}
    assert stack.up(f"{NAME}.yaml", "--check").returncode == 0, "its own port is no other program's"
    assert stack.up(f"{NAME}.yaml").returncode == 0
    assert {service: stack.container(service)["Id"] for service in CONTAINERS} == before


def test_every_profile_is_a_configuration(stack: Stack) -> None:
    for profile in ("ollama", "gpu", "llamacpp", "vllm", "playground", "train", "train-gpu", "*"):
        stack.docker("compose", "--profile", profile, "config", "--quiet")


def test_a_killed_engine_comes_back_and_meanwhile_says_so(stack: Stack) -> None:
    before = stack.container("llamacpp")
    subprocess.run(["kill", "-9", str(before["State"]["Pid"])], check=True)
    status, headers, body = stack.ask("POST", CHAT, body=json.dumps(QUESTION).encode())
    if status != 200:  # it may be back already
        assert (status, headers["retry-after"]) == (503, "5") and b"try again" in body
    assert stack.wait() < 30
    after = stack.container("llamacpp")
    assert after["RestartCount"] == before["RestartCount"] + 1 and after["State"]["Pid"] != before["State"]["Pid"]


def test_a_killed_gateway_comes_back(stack: Stack) -> None:
    subprocess.run(["kill", "-9", str(stack.container("gateway")["State"]["Pid"])], check=True)
    assert stack.wait() < 30


def test_another_model_in_the_same_place_is_not_served(stack: Stack) -> None:
    model = stack.folder / f"runs/{NAME}/gguf/{NAME}-Q8_0.gguf"
    honest = model.read_bytes()
    model.write_bytes(honest[:-4] + b"\0\0\0\1")
    try:
        subprocess.run(["kill", "-9", str(stack.container("llamacpp")["State"]["Pid"])], check=True)
        deadline = time.monotonic() + 30
        while "not the file that was proved" not in stack.docker("compose", "logs", "llamacpp"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert stack.ask("GET", "/v1/models")[0] == 503
        refused = stack.up(f"{NAME}.yaml")
        assert refused.returncode == 1 and "its sha256 differs" in refused.stderr
    finally:
        model.write_bytes(honest)
    stack.wait()
