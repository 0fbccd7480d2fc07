"""What the gateway lets through to llama.cpp, what it refuses, and who waits."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from gguf_fixture import CONTEXT, NAME, ORIGIN, SLOTS, WORDS, Server, free_port, write_gguf, write_run

from pipeline.error import UserError
from serve.asking.endpoint import ask
from serve.engines.llamacpp import longest_token
from serve.gateway import gateway
from serve.gateway.gateway import ROOM_BYTES, Connection

pytest_plugins = ["serve_fixtures"]

CHAT = "/v1/chat/completions"
LONGEST = max(len(f" {word}") for word in WORDS)


def question(**more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "apple"}], "max_tokens": 1, **more}


def post(server: Server, body: Any, path: str = CHAT, key: str = "", **headers: str) -> tuple[int, Any, str | None]:
    """Status, JSON and `Retry-After` of one POST, its body as it stands; without a length if it comes in pieces."""
    authorization = {"Authorization": f"Bearer {key or server.key}"}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as client:
        client.request("POST", path, body, authorization | headers)
        response = client.getresponse()
        return response.status, json.loads(response.read()), response.headers["Retry-After"]


def metric(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(connection):
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {server.key}"})
        lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"llamacpp:{name} "))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe{}", b'{"max_tokens": NaN}', b'{"max_tokens": -Infinity}',
        b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "max_tokens": -2}',
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(server: Server, body: bytes) -> None:
    assert post(server, body)[0] == 400
    assert ask(server.port, CHAT, server.key, question())[0] == 200


@pytest.mark.parametrize("path", ["/slots", "/completion", "/v1/embeddings", "/v1", "//health"])
def test_there_is_nothing_else(server: Server, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        for key, status in ((server.key, 404), ("wrong", 401)):
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
                connection.request(method, path, headers={"Authorization": f"Bearer {key}"})
                assert connection.getresponse().status == status


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/apply-template", "/tokenize"])
def test_openais_questions_get_through(server: Server, path: str) -> None:
    more = {"prompt": "apple", "content": "apple"}
    assert ask(server.port, path, server.key, question(**more))[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_ten_megabytes_are_refused_before_anyone_tokenizes_them(server: Server, path: str, in_pieces: bool) -> None:
    body = json.dumps(question(content="apple " * 1_700_000)).encode()
    began = time.monotonic()
    status, answer, _ = post(server, iter([body[:100], body[100:]]) if in_pieces else body, path)
    assert (status, answer["error"]["type"], answer["error"]["n_ctx"]) == (413, "exceed_context_size_error", CONTEXT)
    assert answer["error"]["n_prompt_tokens"] > CONTEXT
    assert time.monotonic() - began < 10  # llama.cpp would take hours
    assert ask(server.port, CHAT, server.key, question())[0] == 200


@pytest.mark.parametrize("letter", ["a", "\\u0061"])  # the same letter, as others may write it
def test_the_bound_is_the_longest_text_of_a_context(server: Server, letter: str) -> None:
    most = ROOM_BYTES + CONTEXT * LONGEST - len(json.dumps({"content": ""}))
    for length, status in ((most, 200), (most + 1, 413)):
        body = json.dumps({"content": "TEXT"}).replace("TEXT", letter * length)
        assert post(server, body, "/tokenize")[0] == status


def test_the_longest_token_of_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    assert longest_token(path) == LONGEST
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        longest_token(path)


def test_more_questions_than_may_wait_are_refused_in_one_request_too(server: Server) -> None:
    status, answer, _ = post(server, json.dumps({"prompt": ["a"] * 1000, "max_tokens": 1}), "/v1/completions")
    assert (status, answer["error"]["message"]) == (400, f"1000 questions in one, {SLOTS + 64} may be asked at once")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes) -> Iterator[Server]:
    """A server where one question may wait."""
    folder = tmp_path_factory.mktemp("busy")
    write_run(folder, tiny_gguf)
    recipe = json.loads((folder / f"{NAME}.yaml").read_text())
    recipe["serve"] |= {"queue": 1, "origins": []}
    (folder / f"{NAME}.yaml").write_text(json.dumps(recipe))
    running = Server(folder)
    running.wait_for("Ctrl-C stops")
    yield running
    assert running.end() == 0


def test_who_finds_the_queue_full_is_told_when_to_come_back(busy: Server) -> None:
    body = json.dumps(question(max_tokens=CONTEXT))
    with ThreadPoolExecutor(30) as people:
        answers = list(people.map(lambda _: post(busy, body), range(30)))
    refused = [answer for answer in answers if answer[0] == 503]
    assert {status for status, *_ in answers} == {200, 503}
    assert len(answers) - len(refused) >= SLOTS + 1
    assert all(int(after) > 0 for _, _, after in refused)
    assert post(busy, json.dumps(question()))[0] == 200


def test_who_leaves_frees_the_slot_and_the_place_in_the_queue(busy: Server) -> None:
    body = json.dumps(question(max_tokens=CONTEXT, stream=True))
    for _ in range(5):
        leaving = [http.client.HTTPConnection("127.0.0.1", busy.port, timeout=10) for _ in range(SLOTS + 1)]
        for client in leaving:
            client.request("POST", CHAT, body, {"Authorization": f"Bearer {busy.key}"})
        for client in leaving:
            client.close()
    end = time.monotonic() + 5
    while metric(busy, "requests_processing") and time.monotonic() < end:
        time.sleep(0.02)
    assert metric(busy, "requests_processing") == 0
    assert post(busy, json.dumps(question()))[0] == 200


def test_there_is_no_way_around_the_gateway(server: Server) -> None:
    engine = psutil.Process(server.engine())
    listening = [c.laddr for c in engine.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [("127.0.0.1", server.port)]
    (path,) = [Path(c.laddr) for c in engine.net_connections("unix") if c.laddr and c.status == psutil.CONN_NONE][:1]
    assert path.name == "engine.sock"
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_llama_cpps_socket_goes_with_it(start: Any) -> None:
    server = start()
    server.wait_for("Ctrl-C stops")
    engine = psutil.Process(server.engine())
    (folder,) = {Path(c.laddr).parent for c in engine.net_connections("unix") if c.laddr}
    assert folder.is_dir()
    assert server.end() == 0
    assert not folder.exists()


def test_what_a_killed_engine_left_is_removed_at_the_next_start(start: Any) -> None:
    first = start()
    first.wait_for("Ctrl-C stops")
    engine = psutil.Process(first.engine())
    (folder,) = {Path(c.laddr).parent for c in engine.net_connections("unix") if c.laddr}
    for process in (first.process, engine):  # its watchdog has nothing left to end
        process.kill()
        process.wait()
    assert folder.is_dir()
    second = start()
    second.wait_for("Ctrl-C stops")
    assert not folder.exists()
    assert second.end() == 0


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that gives the head of a request a moment, and takes its time to answer."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] == "/" and (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0.6)
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    monkeypatch.setattr(gateway, "HEAD_SECONDS", 0.2)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(slow, port=port, http=Connection, lifespan="off", log_level="critical"))
    running = threading.Thread(target=server.run)
    running.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    running.join()


@pytest.mark.parametrize("half", [b"", b"GET / HTTP/1.1\r\nHost", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP"])
def test_a_head_that_stays_unfinished_is_closed(connections: int, half: bytes) -> None:
    with socket.create_connection(("127.0.0.1", connections), timeout=5) as client:
        client.sendall(half)
        said = b"".join(iter(lambda: client.recv(1000), b""))  # until it is closed
    assert said.count(b"204") == half.count(b"\r\n\r\n")


def test_a_body_that_stays_unfinished_is_closed_once_it_is_answered(connections: int) -> None:
    with socket.create_connection(("127.0.0.1", connections), timeout=5) as client:
        client.sendall(b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        assert b"204" in b"".join(iter(lambda: client.recv(1000), b""))


def test_a_body_and_an_answer_may_take_longer(connections: int) -> None:
    with socket.create_connection(("127.0.0.1", connections), timeout=5) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(0.5)
        client.sendall(b"b")
        assert b"204" in client.recv(1000)


@pytest.mark.parametrize(("origin", "is_let_in"), [(ORIGIN, True), ("http://evil.example", False), ("null", False)])
def test_pages_of_the_listed_origins_may_ask(server: Server, origin: str, is_let_in: bool) -> None:
    asks = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    allowed = origin if is_let_in else None
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as client:
        client.request("OPTIONS", CHAT, headers=asks)  # a browser sends no key with it
        answer = client.getresponse()
        answer.read()
        assert (answer.status == 200, answer.headers["Access-Control-Allow-Origin"]) == (is_let_in, allowed)
        assert answer.headers["Access-Control-Allow-Credentials"] is None
        for key, status in ((server.key, 200), ("wrong", 401)):  # which a page must be able to read
            client.request("GET", "/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {key}"})
            answer = client.getresponse()
            answer.read()
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, allowed)


def test_a_preflight_gets_no_further_than_any_question_where_no_origin_is_listed(busy: Server) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", busy.port, timeout=10)) as client:
        client.request("OPTIONS", CHAT, headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"})
        answer = client.getresponse()
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (401, None)
