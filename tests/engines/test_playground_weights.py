"""A model folder behind the gateway, as the playground asks it before anything is converted."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from gguf_fixture import free_port
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject

from serve.asking.endpoint import ask
from serve.gateway.gateway import Connection

KEY, CHAT = "sesame", "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Héllo 😀?"}]
ASKED: dict[str, Any] = {"model": "base", "messages": QUESTION, "max_tokens": 5, "temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def generator(base_folder: Path) -> Any:
    from serve.engines.weights import Generator, Settings

    return Generator(Settings(str(base_folder), "base", "", 0, ""))


@pytest.fixture(scope="module")
def port(generator: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    from serve.engines.weights import application

    port, socket = free_port(), tmp_path_factory.mktemp("engine") / "engine.sock"
    engine, gateway = application(generator, socket, KEY)
    servers = [
        uvicorn.Server(uvicorn.Config(engine, uds=str(socket), lifespan="off", log_level="critical")),
        uvicorn.Server(uvicorn.Config(gateway, port=port, http=Connection, lifespan="off", log_level="critical")),
    ]

    async def gateway_until_told() -> None:
        async with gateway.engine:  # whose connections would else be left open
            await servers[1].serve()

    running = [
        threading.Thread(target=servers[0].run),
        threading.Thread(target=asyncio.run, args=[gateway_until_told()]),
    ]
    for server, thread in zip(servers, running, strict=True):
        thread.start()
        while not server.started:
            time.sleep(0.01)
    yield port
    for server, thread in zip(servers, running, strict=True):
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(port: int) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def text(client: OpenAI, **changes: Any) -> str:
    return str(client.chat.completions.create(**ASKED | changes).choices[0].message.content)


@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/tokenize", "/apply-template"])
def test_every_route_needs_the_key(port: int, path: str) -> None:
    assert ask(port, path, "wrong", None if path == "/v1/models" else ASKED)[0] == 401


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "x"}, 404, "model"), ({"messages": "Hi"}, 400, "messages"), ({"messages": []}, 400, "messages"),
        ({"stop": ""}, 400, "stop"), ({"max_tokens": -2}, 400, "max_tokens"), ({"n": 0}, 400, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"), ({"logprobs": True}, 400, "logprobs"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"), ({"top_k": "x"}, 400, None), ({"top_k": -1}, 400, None),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_with_its_name(
    port: int, changes: dict[str, Any], status: int, param: str
) -> None:
    got, answer = ask(port, CHAT, KEY, ASKED | changes)
    assert (got, ErrorObject.model_validate(answer["error"]).param) == (status, param), answer


def test_what_asks_for_nothing_is_let_through(client: OpenAI) -> None:
    assert client.chat.completions.create(
        **ASKED, frequency_penalty=0, logprobs=False, response_format={"type": "text"}
    )


def test_a_prompt_beyond_the_context_is_refused_as_llama_cpp_does(client: OpenAI, generator: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": "word " * generator.known}]})
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.body["n_ctx"] == generator.known  # type: ignore[index]


@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_says_how_long_it_is_and_why_it_ended_whole_and_streamed(client: OpenAI, count: int) -> None:
    whole = ChatCompletion.model_validate_json(client.chat.completions.create(**ASKED, n=count).model_dump_json())
    stream = client.chat.completions.create(**ASKED, n=count, stream=True, stream_options={"include_usage": True})
    chunks = [ChatCompletionChunk.model_validate_json(chunk.model_dump_json()) for chunk in stream]
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens == len(tokens(client))
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens <= 5 * count
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason] == ["length"]
    assert len({choice.message.content for choice in whole.choices}) == count


def test_a_completion_continues_a_text_or_its_tokens(client: OpenAI, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"model": "base", "max_tokens": 3, "temperature": 0}
    ids = tokenizer("Hello there")["input_ids"]
    said = [client.completions.create(prompt=prompt, **asked) for prompt in ("Hello there", ids)]
    assert said[0].choices[0].text == said[1].choices[0].text
    assert Completion.model_validate_json(said[0].model_dump_json()).usage.completion_tokens == 3
    chunks = list(client.completions.create(prompt=ids, **asked, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == said[0].choices[0].text


def test_it_ends_before_a_stop(client: OpenAI) -> None:
    said = text(client, max_tokens=20, temperature=0)
    stop = said[len(said) // 2 :][:3]
    answer = client.chat.completions.create(**ASKED | {"max_tokens": 20, "temperature": 0, "stop": [stop, "never"]})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (said[: said.index(stop)], "stop")


def test_what_could_begin_a_stop_is_held_back() -> None:
    from serve.engines.weights import until_stop

    assert list(until_stop(iter(["a", "b<", "e", "nd>", "c"]), ["<end>"])) == [
        ("", False), ("", False), ("", False), ("ab", True),
    ]  # fmt: skip
    assert "".join(text for text, _ in until_stop(iter(["ab<", "e", "nd"]), ["<end>"])) == "ab<end"


def test_no_length_is_the_context(client: OpenAI, generator: Any) -> None:
    nearly = [{"role": "user", "content": "word " * (generator.known - 50)}]
    usage = client.chat.completions.create(**ASKED | {"messages": nearly, "max_tokens": -1, "temperature": 0}).usage
    assert usage.total_tokens <= generator.known


def test_the_same_seed_gives_the_same_answer_and_another_another(client: OpenAI) -> None:
    assert text(client) == text(client) != text(client, seed=4)


def test_temperature_zero_is_the_most_likely_whatever_the_seed(client: OpenAI) -> None:
    assert text(client, temperature=0) == text(client, temperature=0, seed=4)


def tokens(client: OpenAI) -> list[dict[str, Any]]:
    return list(post(client, "/tokenize", content=prompt(client))["tokens"])


def prompt(client: OpenAI) -> str:
    return str(post(client, "/apply-template", messages=QUESTION)["prompt"])


def post(client: OpenAI, path: str, **body: Any) -> Any:
    return ask(client.base_url.port, path, KEY, body)[1]  # type: ignore[arg-type]


def test_the_prompt_and_its_tokens_are_the_tokenizers(client: OpenAI, tokenizer: Any) -> None:
    assert prompt(client) == tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert [token["id"] for token in tokens(client)] == tokenizer(prompt(client), add_special_tokens=False)["input_ids"]
    assert "".join(token["piece"] for token in tokens(client)) == prompt(client)


def test_who_leaves_stops_the_answer(generator: Any) -> None:
    left = threading.Event()
    left.set()
    ids = [token["id"] for token in generator.tokens("Hello")]
    *_, last = generator.answer(ASKED | {"max_tokens": 400}, ids, left)
    assert last.tokens == 1
