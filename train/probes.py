"""The probe conversations: some of the user's own, and cases that break templates and tokenizers."""

import unicodedata
from typing import Any

OWN_PROBES = 12
LONG_WORDS = 220
DECOMPOSED = "decomposed"

HARD_CASES: dict[str, list[dict[str, str]]] = {
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


def probe_messages(tokenizer: Any, own: list[list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Name → messages that end with a question: hard cases, a spelled special token, and the user's own.

    Cases that the template refuses (a system prompt, say) are left out: a server refuses them as well.
    """
    from recipe import UserError
    from train.template import render

    spelled = f"What does {tokenizer.eos_token} mean, and {tokenizer.eos_token[:-1]} >?"
    cases = HARD_CASES | {"special-token": [{"role": "user", "content": spelled}]}
    for number, messages in enumerate(own[:OWN_PROBES]):
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        cases[f"own-{number:02}"] = messages[: turns[-1]]
    accepted = {}
    if composes(tokenizer, cases[DECOMPOSED][0]["content"]):
        del cases[DECOMPOSED]
    for name, messages in cases.items():
        try:
            render(tokenizer, messages, prompt=True)
        except UserError:
            continue
        accepted[name] = messages
    return accepted


def composes(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer normalizes to NFC (Qwen's does); llama.cpp does not, which no conversion can mend."""
    composed = unicodedata.normalize("NFC", text)
    return bool(tokenizer(text)["input_ids"] == tokenizer(composed)["input_ids"])
