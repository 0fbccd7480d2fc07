"""The probes that a model is asked: conversations of the user's own, and cases that break templates and tokenizers."""

import logging
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from pipeline import UserError
from pipeline.model import greedy, logits
from pipeline.reference import CONTINUATION_TOKENS, SCORED_POSITIONS, Message, Probe
from pipeline.rows import rendered
from train.template import shown

log = logging.getLogger("truetune")
OWN_PROBES = 12
TOOL = "get_weather"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WITH_TOOLS: list[Message] = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "call00001", "function": {"name": TOOL, "arguments": {"city": "Paris"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": TOOL, "content": "18 degrees, cloudy"},
]
LONG_WORDS = 220
DECOMPOSED = "decomposed"


@dataclass(frozen=True)
class Case:
    """What a probe asks: messages that end with a question, and the tools that are offered."""

    messages: list[Message]
    tools: list[dict[str, Any]]


HARD_CASES: dict[str, list[Message]] = {
    "plain": [{"role": "user", "content": "Who are you?"}],
    "knowledge": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    "empty-system": [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}],
    "multi-turn": [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
        {"role": "assistant", "content": "Your name is Ada."},
        {"role": "user", "content": "Spell it backwards."},
    ],
    "unicode": [{"role": "user", "content": "Größe, naïve, Ελλάδα, Привет, שלום"}],
    DECOMPOSED: [{"role": "user", "content": "cafe\u0301 or caf\u00e9?"}],
    "emoji": [{"role": "user", "content": "👩\u200d👩\u200d👧 likes 🍕 and 🇫🇷, what about you? 🙂"}],
    "chinese": [{"role": "user", "content": "你好, 请用一句话介绍你自己。"}],
    "code": [{"role": "user", "content": "def f(x):\n\tif x:\n\t\treturn  {'a': [1, 2]}\n\n\n    # ünicode\r\n"}],
    "spaces": [{"role": "user", "content": "  two before, three after   "}],
    "numbers": [{"role": "user", "content": "1234567890 + 0.000001 = ? 10,000.50 3rd 2nd"}],
    "newlines": [{"role": "user", "content": "\n\nfirst\n\n\n\nsecond\n"}],
    "apostrophes": [{"role": "user", "content": "I'm sure they'll say it's what you've DON'T'VE done"}],
    "long": [{"role": "user", "content": "Repeat: " + " ".join(f"word{index}" for index in range(LONG_WORDS))}],
}


def own_cases(own: list[dict[str, Any]], most: int = OWN_PROBES) -> dict[str, Case]:
    """What the first of the user's own conversations ask last."""
    cases = {}
    for number, row in enumerate([row for row in own if "messages" in row][:most]):
        turns = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        cases[f"own-{number:02}"] = Case(row["messages"][: turns[-1]], row.get("tools") or [])
    return cases


def probe_cases(tokenizer: Any, own: list[dict[str, Any]], most_own: int = OWN_PROBES) -> dict[str, Case]:
    """Name → case that ends with a question: hard ones, a spelled special token, tools, and the user's own rows.

    Left out are those that the template refuses, as a server does, and those whose system prompt or tools it drops
    in silence, which llama.cpp's server would write into the question instead.
    """
    spelled = f"What does {tokenizer.eos_token} mean, and {tokenizer.eos_token[:-1]} >?"
    cases = {name: Case(messages, []) for name, messages in HARD_CASES.items()}
    cases["special-token"] = Case([{"role": "user", "content": spelled}], [])
    cases |= {"tools": Case(WITH_TOOLS[:1], TOOLS), "tool-answer": Case(WITH_TOOLS, TOOLS)}
    cases |= own_cases(own, most_own)
    if composes(tokenizer, HARD_CASES[DECOMPOSED][0]["content"]):
        del cases[DECOMPOSED]

    known = shown(tokenizer)

    def is_shown(case: Case) -> bool:
        try:
            prompt = rendered(tokenizer, case.messages, case.tools, prompt=True)
        except UserError:
            return False
        systems = [message["content"] for message in case.messages if message["role"] == "system"]
        return (known.tools or not case.tools) and all(system.strip() in prompt for system in systems)

    if not is_shown(cases["system"]):  # then an empty one only looks as if it were
        cases = {name: case for name, case in cases.items() if case.messages[0]["role"] != "system"}
    return {name: case for name, case in cases.items() if is_shown(case)}


def composes(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer normalizes to NFC (Qwen's does); llama.cpp does not, which no conversion can fix."""
    composed = unicodedata.normalize("NFC", text)
    return bool(tokenizer(text)["input_ids"] == tokenizer(composed)["input_ids"])


def ask(
    model: Any, tokenizer: Any, cases: "dict[str, Case]", stops: list[int] | None = None
) -> tuple[list[Probe], list[Any]]:
    """The cases answered greedily, and each one's (scored, vocabulary) float32 logits from the prompt's last token on.

    An answer ends with one of the `stops`, if not given with the tokenizer's eos. Left out are those that with their
    answer do not fit the positions that the base knows.
    """
    ends = stops or [tokenizer.eos_token_id]
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompts = {name: rendered(tokenizer, case.messages, prompt=True, tools=case.tools) for name, case in cases.items()}
    ids = {name: tokenizer(prompt, add_special_tokens=False)["input_ids"] for name, prompt in prompts.items()}
    for name in [name for name in ids if len(ids[name]) + CONTINUATION_TOKENS > known]:
        log.info("reference: probe '%s' is longer than the base's context, left out", name)
        del ids[name]

    def answer_to(prompts: list[list[int]]) -> list[list[int]]:
        return greedy(model, tokenizer, prompts, CONTINUATION_TOKENS, ends, "probes")

    answered = dict(zip(ids, answer_to(list(ids.values())), strict=True))
    most = max(1, SCORED_POSITIONS // len(cases))
    probes, scores = [], []
    for name, prompt in ids.items():
        # One pass over prompt and answer, as later stages do it, not the pieces that generation made.
        found = logits(model, prompt + answered[name], len(prompt) - 1)
        if found[:-1].argmax(-1).tolist() != answered[name]:  # padding may tip a near tie
            [answered[name]] = answer_to([prompt])
            found = logits(model, prompt + answered[name], len(prompt) - 1)
        answer = answered[name]
        scored = min(most, len(answer))
        stopped = answer[-1] in ends
        case = cases[name]
        probes.append(Probe(name, case.messages, case.tools, prompts[name], prompt, answer, stopped, scored))
        scores.append(found[:scored].numpy())
    return probes, scores
