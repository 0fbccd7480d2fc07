"""The engine's doors, its context and its end."""

import http.client
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from gguf_fixture import CONTEXT, NAME, SLOTS, TRAINED, WORDS, Server, gone, write_gguf, write_run
from openai import OpenAI

from pipeline.error import UserError
from pipeline.reference import Probe
from serve.asking.endpoint import ask
from serve.asking.probe import Answer, LlamaCpp, Told, answer, changes
from serve.engines.llamacpp import is_repeatable, trained_context

pytest_plugins = ["serve_fixtures"]

QUESTION = [{"role": "user", "content": "apple"}]


@pytest.fixture
def client(server: Server):
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


def test_answers_the_official_client(client: OpenAI):
    answer = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=5)
    assert answer.model == NAME
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].message.content.split()[0].isalpha()


def test_streams(client: OpenAI):
    settings = {"model": NAME, "messages": QUESTION, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) >= 5


@pytest.mark.parametrize("key", ["wrong", ""])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/props", "/slots", "/metrics", "/tokenize"])
def test_refuses_without_the_key(server: Server, path: str, key: str):
    body = {"messages": QUESTION, "content": ""} if path in ("/v1/chat/completions", "/tokenize") else None
    status, answer = ask(server.port, path, key, body)
    assert (status, answer["error"]["type"]) == (401, "authentication_error")


def test_names_the_model_and_its_context(client: OpenAI):
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.meta["n_ctx"] == CONTEXT


def test_each_slot_has_the_whole_context(server: Server):
    status, properties = ask(server.port, "/props", server.key)
    assert status == 200
    assert properties["total_slots"] == SLOTS
    assert properties["default_generation_settings"]["n_ctx"] == CONTEXT


def test_renders_the_models_own_template(server: Server):
    _, answer = ask(server.port, "/apply-template", server.key, {"messages": QUESTION})
    assert answer["prompt"] == "user: apple\nassistant:"


def test_default_temperature_is_the_recipes(server: Server):
    _, properties = ask(server.port, "/props", server.key)
    assert properties["default_generation_settings"]["params"]["temperature"] == pytest.approx(0.2)


def test_refuses_a_prompt_that_is_too_long_and_goes_on(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "apple " * CONTEXT}])
    answer = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=1)
    assert answer.usage.completion_tokens == 1


def test_an_answer_ends_with_the_context(client: OpenAI):
    answer = client.chat.completions.create(model=NAME, messages=QUESTION)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens <= CONTEXT


@pytest.mark.parametrize("body", [b"{bad", b"[]", b'{"messages": 1}', b"\xff\xfe", b'{"messages": [{"role": 1}]}'])
def test_refuses_malformed_requests_and_goes_on(server: Server, body: bytes):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {server.key}"})
    assert 400 <= connection.getresponse().status < 500
    connection.close()
    assert ask(server.port, "/health") == (200, {"status": "ok"})


def test_no_other_origin_is_let_in(server: Server):
    key = {"Authorization": f"Bearer {server.key}"}
    for method, more in (("OPTIONS", {}), ("OPTIONS", key), ("GET", key)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request(method, "/v1/models", headers={"Origin": "http://evil.example", **more})
        headers = connection.getresponse().headers
        connection.close()
        assert headers["Access-Control-Allow-Origin"] in (None, server.url)
        assert headers["Access-Control-Allow-Credentials"] != "true"


def test_listens_on_loopback_only(server: Server):
    listening = "0A"
    doors = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = row.split()
            address, _, port = local.partition(":")
            if int(port, 16) == server.port and state == listening:
                doors.add(address)
    assert doors == {"0100007F"}


def test_key_shows_in_no_process_and_no_log(server: Server):
    key = server.key.encode()
    for process in Path("/proc").glob("[0-9]*"):
        for view in ("cmdline", "environ"):
            try:
                assert key not in (process / view).read_bytes(), f"{process / view}"
            except OSError:
                continue
    assert server.key not in server.log + server.out.read_text() + server.err.read_text()
    assert server.key not in (server.folder / "runs" / NAME / "serve.json").read_text()


def test_prompts_are_not_logged(server: Server):
    ask(
        server.port,
        "/v1/chat/completions",
        server.key,
        {"messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 1},
    )
    assert "xyzzy" not in server.log


def test_ends_with_its_supervisor(start):
    server = start()
    server.wait_for("Ctrl-C stops")
    engine = server.engine()
    assert engine
    os.kill(server.process.pid, signal.SIGKILL)
    assert gone(engine, 3)


@pytest.mark.parametrize(
    "kind, wanted, repeatable",
    [("Q8_0", None, True), ("Q8_0", False, False), ("Q5_0", True, True), ("Q5_0", None, False), ("F32", True, False)],
)
def test_a_question_is_answered_alike_new_cached_and_beside_others(
    tmp_path: Path, kind: str, wanted: bool | None, repeatable: bool
):
    path = tmp_path / "model.gguf"
    write_gguf(path, kind=kind)
    assert is_repeatable(wanted, path) == repeatable
    write_run(tmp_path, path.read_bytes(), repeatable=wanted)
    server = Server(tmp_path)
    try:
        server.wait_for("Ctrl-C stops")
        engine = LlamaCpp(server.port, server.key, NAME)
        probes = [question(" ".join(WORDS[number % 8] for number in range(length))) for length in (2, 6, 9, 13, 20, 22)]
        cold = [answer(engine, probe, CONTEXT, engine.new) for probe in probes]
        cached = [answer(engine, probe, CONTEXT) for probe in probes]
        with ThreadPoolExecutor(SLOTS) as others:
            beside = list(others.map(lambda probe: answer(engine, probe, CONTEXT), probes))
    finally:
        server.end()
    assert all(found.status == 200 and found.tokens for found in cold)
    found = changes("again", cold, cached) | changes("beside", cold, beside)
    same = {"changed_again": 0, "moved_again": 0, "changed_beside": 0, "moved_beside": 0}
    assert (found == same) == repeatable, found


def question(text: str) -> Probe:
    return Probe(text, [{"role": "user", "content": text}], [], [], "", [], False, 0)


def test_what_changes_between_answers_is_counted():
    def said(text: str, *scores: float) -> Answer:
        return Answer(200, text, tokens=tuple(Told(0, score, {0: score}) for score in scores))

    before = [said("meow", -1.0, -0.5), said("moo", -2.0), said("oink")]
    after = [said("meow", -1.0, -0.75), said("wow", -9.0), Answer(503, "busy")]
    assert changes("again", before, before) == {"changed_again": 0, "moved_again": 0}
    assert changes("again", before, after) == {"changed_again": 2, "moved_again": 0.25}


def test_trained_context_of_a_gguf(tmp_path: Path, tiny_gguf: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf)
    assert trained_context(path) == TRAINED


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not a model</html>"])
def test_trained_context_of_something_else(tmp_path: Path, content: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is not a whole GGUF file"):
        trained_context(path)


def test_the_fixture_is_the_same_every_time(tmp_path: Path, tiny_gguf: bytes):
    write_gguf(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == tiny_gguf
