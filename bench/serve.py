"""Minutes of many chats at once with what `make serve` serves:  python -m bench.serve [RECIPE] [MINUTES] [CHATS]

Needs `make serve` in another terminal. Most chats are streamed or whole; some leave in the middle, some send broken
JSON, 10 MB or a negative length. Told for every minute: how the chats ended, seconds to the first token and to the end,
and each service's memory. The last line is one JSON document; ends with 1 if a chat hung or was answered wrongly.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import httpx

from pipeline import Run, UserError, load
from pipeline.command import boundary
from serve.asking.endpoint import read_key
from serve.running.session import Session, find, memory_bytes

HUNG_SECONDS = 600
# How many of a hundred chats are of this kind.
KINDS = {"streamed": 60, "whole": 15, "leaving": 15, "broken": 4, "huge": 3, "negative": 3}
QUESTIONS = ("Who are you?", "What is a receipt?", "Hello", "Write a poem about the sea.", "Which port do you take?")
HUGE = "apple " * 1_700_000


@dataclass
class Minute:
    """How the chats ended that ended in this minute, and the memory at its end."""

    ended: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


class Load:
    """So many people who ask one question after another, for so many seconds."""

    def __init__(self, run: Run, session: Session, seconds: float, people: int) -> None:
        self.served, self.session, self.seconds, self.people = run, session, seconds, people
        self.minutes = [Minute()]
        self.until = 0.0

    async def run(self) -> list[Minute]:
        self.until = time.monotonic() + self.seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {read_key()}"}
        async with httpx.AsyncClient(
            base_url=self.session.url, headers=headers, timeout=None, limits=limits, trust_env=False
        ) as client:
            await asyncio.gather(self.watch(), *(self.person(client, number) for number in range(self.people)))
        return self.minutes

    async def watch(self) -> None:
        """Close a minute and begin another; tests last less than one, and have five short ones."""
        length = min(60.0, self.seconds / 5)
        while time.monotonic() < self.until - length / 2:
            await asyncio.sleep(length)
            minute = self.minutes[-1]
            services = (find(self.served) or self.session).services  # one that was started again has another process
            minute.memory = {service["name"]: memory_bytes(service["pid"]) for service in services if service["pid"]}
            print(line(len(self.minutes), minute), flush=True)
            if time.monotonic() < self.until - length / 2:
                self.minutes.append(Minute())

    async def person(self, client: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            (kind,) = chance.choices([*KINDS], [*KINDS.values()])
            try:
                async with asyncio.timeout(HUNG_SECONDS):
                    ending = await self.chat(client, kind, chance)
            except TimeoutError:
                ending = "hung"
            except httpx.HTTPError as error:
                ending = f"wrong: {kind} ended with {error!r}"
            self.minutes[-1].ended[ending] += 1
            if ending == "refused":
                await asyncio.sleep(chance.uniform(1, 3))

    async def chat(self, client: httpx.AsyncClient, kind: str, chance: random.Random) -> str:
        """One question; how it ended."""
        question: dict[str, Any] = {
            "model": self.session.model,
            "messages": [{"role": "user", "content": HUGE if kind == "huge" else chance.choice(QUESTIONS)}],
            "max_tokens": -2 if kind == "negative" else chance.randint(8, 48),
            "stream": kind in ("streamed", "leaving"),
        }
        content = "{" if kind == "broken" else json.dumps(question)
        began, seen = time.monotonic(), b""
        async with client.stream("POST", "/chat/completions", content=content) as response:
            if response.status_code == 503 and response.headers.get("Retry-After", "").isdigit():
                return "refused"
            if kind in ("broken", "huge", "negative"):
                return "rejected" if response.status_code in (400, 413) else f"wrong: {kind} got {response.status_code}"
            if response.status_code != 200:
                return f"wrong: {kind} got {response.status_code}"
            async for piece in response.aiter_raw():
                if not seen and kind == "streamed":
                    self.minutes[-1].first.append(time.monotonic() - began)
                seen = (seen + piece)[-50_000:]
                if kind == "leaving":
                    return "left"
        self.minutes[-1].whole.append(time.monotonic() - began)
        finished = seen.rstrip().endswith(b"data: [DONE]") if kind == "streamed" else b'"finish_reason"' in seen
        return "answered" if finished else f"wrong: {kind} was cut off"


def line(number: int, minute: Minute) -> str:
    """One minute for people."""
    ends = ", ".join(f"{count} {end}" for end, count in sorted(minute.ended.items()))
    memory = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in minute.memory.items())
    return f"{number:>3}  {ends}; first token {spread(minute.first)}, whole {spread(minute.whole)}; {memory}"


def spread(seconds: list[float]) -> str:
    """Median and 95th percentile."""
    if len(seconds) < 2:
        return "-"
    cuts = quantiles(seconds, n=20, method="inclusive")
    return f"{cuts[9]:.2f} s (95 %: {cuts[18]:.2f} s)"


def main() -> int:
    name, minutes, people = [*sys.argv[1:], *("assistant", "10", "100")[len(sys.argv) - 1 :]]
    run = Run.of(load(name))
    session = find(run)
    if session is None:
        raise UserError(f"{run.folder} is not being served: run 'make serve RECIPE={name}' in another terminal first")
    told = asyncio.run(Load(run, session, float(minutes) * 60, int(people)).run())
    ended = sum((minute.ended for minute in told), Counter())
    first, whole = ([s for minute in told for s in getattr(minute, of)] for of in ("first", "whole"))
    print(f"all  {line(0, Minute(ended, first, whole, told[-1].memory))[5:]}")
    print(json.dumps({"ended": ended, "memory": [minute.memory for minute in told]}))
    return 1 if any(end == "hung" or end.startswith("wrong") for end in ended) else 0


if __name__ == "__main__":
    with boundary():
        sys.exit(main())
