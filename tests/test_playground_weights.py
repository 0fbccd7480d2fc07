"""A model folder behind OpenAI's API, as the playground asks it before anything is converted."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

KEY = {"Authorization": "Bearer sesame"}
QUESTION = [{"role": "user", "content": "Héllo 😀?"}]


@pytest.fixture(scope="module")
def speaker(base_folder: Path) -> Any:
    from serve.engines.weights import Settings, Speaker

    return Speaker(Settings(str(base_folder), "base", "", 0, ""))


@pytest.fixture(scope="module")
def client(speaker: Any) -> Any:
    from starlette.testclient import TestClient

    from serve.engines.weights import app

    return TestClient(app(speaker, "sesame"), headers=KEY)


def asked(**changes: Any) -> dict[str, Any]:
    return {
        "model": "base",
        "messages": QUESTION,
        "max_tokens": 5,
        "temperature": 1.5,
        "seed": 3,
        "stream": True,
    } | changes


def chunks(client: Any, **changes: Any) -> list[dict[str, Any]]:
    """The parts of a streamed answer, which ends as OpenAI's do."""
    lines = client.post("/v1/chat/completions", json=asked(**changes)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def text(parts: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for part in parts for choice in part["choices"])


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/apply-template"])
def test_every_route_needs_the_key(client: Any, path: str) -> None:
    method = "GET" if path == "/v1/models" else "POST"
    assert client.request(method, path, headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ("[]", 400),
        ("{}", 400),
        (json.dumps(asked(messages="Hi")), 400),
        (json.dumps(asked(model="x")), 404),
    ],
)
def test_a_bad_request_is_refused_in_json(client: Any, body: str, status: int) -> None:
    refused = client.post("/v1/chat/completions", content=body)
    assert refused.status_code == status and refused.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_refused_as_llama_cpp_does(client: Any, speaker: Any) -> None:
    long = [{"role": "user", "content": "word " * speaker.known}]
    refused = client.post("/v1/chat/completions", json=asked(messages=long))
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", speaker.known)


def test_an_answer_says_how_long_it_is_and_why_it_ended(client: Any) -> None:
    parts = chunks(client)
    ended = [choice["finish_reason"] for part in parts for choice in part["choices"] if "finish_reason" in choice]
    usage = parts[-1]["usage"]
    assert usage["completion_tokens"] <= 5 and ended == ["length" if usage["completion_tokens"] == 5 else "stop"]
    assert usage["prompt_tokens"] == len(client.post("/tokenize", json={"content": prompt(client)}).json()["tokens"])


def test_the_same_seed_gives_the_same_answer_and_another_another(client: Any) -> None:
    assert text(chunks(client)) == text(chunks(client)) != text(chunks(client, seed=4))


def test_temperature_zero_is_the_most_likely_whatever_the_seed(client: Any) -> None:
    assert text(chunks(client, temperature=0)) == text(chunks(client, temperature=0, seed=4))


def prompt(client: Any) -> str:
    return str(client.post("/apply-template", json={"messages": QUESTION}).json()["prompt"])


def test_the_prompt_and_its_tokens_are_the_tokenizers(client: Any, tokenizer: Any) -> None:
    assert prompt(client) == tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    tokens = client.post("/tokenize", json={"content": prompt(client)}).json()["tokens"]
    assert [token["id"] for token in tokens] == tokenizer(prompt(client), add_special_tokens=False)["input_ids"]
    assert "".join(token["piece"] for token in tokens) == prompt(client)


def test_who_leaves_stops_the_answer(speaker: Any) -> None:
    left = threading.Event()
    left.set()
    ids = [token["id"] for token in speaker.tokens("Hello")]
    parts = list(speaker.answer(asked(max_tokens=400), ids, left))
    assert parts[-1]["usage"]["completion_tokens"] == 1
