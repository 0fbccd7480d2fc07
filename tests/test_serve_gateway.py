"""What the gateway lets through to llama.cpp, what it refuses, and who waits:  pytest tests/test_serve_gateway.py"""

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf_fixture import CONTEXT, NAME, SLOTS, WORDS, Server, write_gguf, write_run

from pipeline.error import UserError
from serve.asking.endpoint import ask
from serve.gateway.context import longest_token
from serve.gateway.gateway import ROOM_BYTES, questions

pytest_plugins = ["serve_fixtures"]

CHAT = "/v1/chat/completions"
LONGEST = max(len(f" {word}") for word in WORDS)


def question(**more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "apple"}], "max_tokens": 1, **more}


def post(server: Server, body: Any, path: str = CHAT, key: str = "", **headers: str) -> tuple[int, Any, str | None]:
    """Status, JSON and `Retry-After` of one POST, its body as it stands; without a length if it comes in pieces."""
    authorization = {"Authorization": f"Bearer {key or server.key}"}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", path, body, authorization | headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers["Retry-After"]


def metric(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(connection):
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {server.key}"})
        lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"llamacpp:{name} "))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"])
@pytest.mark.parametrize("length", [-1, -2, -1.5, -(10**30)])
def test_a_negative_length_is_refused(server: Server, name: str, length: float) -> None:
    status, answer = ask(server.port, CHAT, server.key, question(**{name: length}))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert f"{name} is {length}: give a length from 0 on" in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe{}", b'{"max_tokens": NaN}', b'{"max_tokens": -Infinity}',
        b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "max_tokens": -1}',
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(server: Server, body: bytes) -> None:
    assert post(server, body)[0] == 400
    assert ask(server.port, CHAT, server.key, question())[0] == 200


@pytest.mark.parametrize(
    "path", ["/slots", "/completion", "/infill", "/models/load", "/", "/v1", "/v1/chat", "//health"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_there_is_nothing_else(server: Server, path: str, method: str) -> None:
    for key, status in ((server.key, 404), ("wrong", 401)):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.request(method, path, headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/apply-template", "/tokenize"])
def test_openais_questions_get_through(server: Server, path: str) -> None:
    more = {"prompt": "apple", "input": "apple", "content": "apple", "max_output_tokens": 1}
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


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"messages": []}, 1), ({"prompt": "a"}, 1), ({"prompt": [1, 2, 3]}, 1), ({"prompt": []}, 1),
        ({"prompt": ["a", "b"]}, 2), ({"prompt": [[1, 2], [3]]}, 2), ({"input": ["a", "b", "c"]}, 3),
    ],
)  # fmt: skip
def test_how_many_questions_one_request_has(asked: dict[str, Any], count: int) -> None:
    assert questions(asked) == count


def test_more_questions_than_may_wait_are_refused_in_one_request_too(server: Server) -> None:
    status, answer, _ = post(server, json.dumps({"prompt": ["a"] * 1000, "max_tokens": 1}), "/v1/completions")
    assert (status, answer["error"]["message"]) == (400, f"1000 questions in one, {SLOTS + 64} may be asked at once")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes) -> Iterator[Server]:
    """A server where one question may wait."""
    folder = tmp_path_factory.mktemp("busy")
    write_run(folder, tiny_gguf)
    recipe = json.loads((folder / f"{NAME}.yaml").read_text())
    recipe["serve"]["queue"] = 1
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
        for connection in leaving:
            connection.request("POST", CHAT, body, {"Authorization": f"Bearer {busy.key}"})
        for connection in leaving:
            connection.close()
    end = time.monotonic() + 5
    while metric(busy, "requests_processing") and time.monotonic() < end:
        time.sleep(0.02)
    assert metric(busy, "requests_processing") == 0
    assert post(busy, json.dumps(question()))[0] == 200


def test_there_is_no_way_around_the_gateway(server: Server) -> None:
    engine = psutil.Process(server.engine())
    listening = [c.laddr for c in engine.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [("127.0.0.1", server.port)]
    (socket,) = [Path(c.laddr) for c in engine.net_connections("unix") if c.laddr and c.status == psutil.CONN_NONE][:1]
    assert socket.name == "engine.sock"
    assert socket.parent.stat().st_mode & 0o777 == 0o700


def test_llama_cpps_socket_goes_with_it(start: Any) -> None:
    server = start()
    server.wait_for("Ctrl-C stops")
    engine = psutil.Process(server.engine())
    (folder,) = {Path(c.laddr).parent for c in engine.net_connections("unix") if c.laddr}
    assert folder.is_dir()
    assert server.end() == 0
    assert not folder.exists()
