"""The engine under load and under abuse: everyone is answered, nobody is forgotten."""

import asyncio
import contextlib
import http.client
import json
import subprocess
import sys
import time

import openai
import psutil
import pytest
from gguf_fixture import NAME, SLOTS, Server, environment
from openai import AsyncOpenAI

from pipeline.recipe import Serve
from serve.asking.endpoint import ask

pytest_plugins = ["serve_fixtures"]
pytestmark = pytest.mark.slow

CHATS, ANSWER_TOKENS = 100, 40
QUEUE = Serve().queue
ENOUGH_SECONDS = 240  # a queue that hangs never ends; cores that are shared with other tests are slow


async def chats(server: Server, count: int) -> list[str]:
    """So many conversations at once, streamed; how each ended."""

    async def chat(client: AsyncOpenAI, number: int) -> str:
        try:
            stream = await client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": f"apple {number}"}], max_tokens=ANSWER_TOKENS,
                stream=True,
            )  # fmt: skip
            return [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices][-1] or "cut off"
        except openai.APIStatusError as error:
            assert error.status_code != 503 or int(error.response.headers["Retry-After"]) > 0
            return f"{error.status_code}"

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        return await asyncio.gather(*(chat(client, number) for number in range(count)))


def rss_bytes(server: Server) -> int:
    engine = server.engine()
    assert engine
    return int(psutil.Process(engine).memory_info().rss)


def is_answered(server: Server) -> bool:
    question = {"messages": [{"role": "user", "content": "apple"}], "max_tokens": 1}
    return ask(server.port, "/v1/chat/completions", server.key, question, timeout=60)[0] == 200


def test_a_hundred_chats_at_once_are_all_answered_or_told_to_come_back(server: Server) -> None:
    ended = asyncio.run(asyncio.wait_for(chats(server, CHATS), ENOUGH_SECONDS))
    assert set(ended) == {"length", "503"}, ended
    assert ended.count("length") >= SLOTS + QUEUE
    assert "starting it again" not in server.err.read_text(), "a busy engine is not a dead one"


def test_memory_stays_flat(server: Server) -> None:
    asyncio.run(chats(server, CHATS))
    before = rss_bytes(server)
    for _ in range(3):
        asyncio.run(chats(server, CHATS))
    assert rss_bytes(server) < before + 30e6  # the prompt cache goes on filling, by 20 kB a conversation


@pytest.mark.parametrize("tokens", ["many", [1]])
def test_an_impossible_length_is_refused(server: Server, tokens: object) -> None:
    question = {"messages": [{"role": "user", "content": "apple"}], "max_tokens": tokens}
    assert ask(server.port, "/v1/chat/completions", server.key, question)[0] == 400
    assert is_answered(server)


def test_who_leaves_in_the_middle_frees_the_slot(server: Server) -> None:
    endless = json.dumps({"messages": [{"role": "user", "content": "apple"}], "stream": True}).encode()
    for _ in range(20):  # many more than there are slots
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/chat/completions", endless, {"Authorization": f"Bearer {server.key}"})
        with contextlib.closing(connection), connection.getresponse() as response:
            response.read(100)
    began = time.monotonic()
    assert is_answered(server)
    assert time.monotonic() - began < 10


def test_half_a_minute_of_mixed_load(server: Server) -> None:
    """`python -m bench.serve`, which ends with 1 if anyone hung or was answered wrongly."""
    command = [sys.executable, "-m", "bench.serve", f"{NAME}.yaml", "0.5", str(CHATS)]
    done = subprocess.run(
        command, cwd=server.folder, env=environment(), capture_output=True, text=True, timeout=ENOUGH_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["ended"]) == {"answered", "left", "refused", "rejected"}
    assert told["memory"][-1]["engine"] < told["memory"][0]["engine"] + 30e6
