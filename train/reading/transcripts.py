"""Conversations written as one text: Anthropic's `Human:` and `Assistant:`, Baize's, and Glaive's function calls."""

import json
import re
from collections.abc import Iterator
from typing import Any

from train.reading.calls import Message
from train.reading.row import Rejection

HUMAN_ASSISTANT = re.compile(r"\n\n(Human|Assistant): ?")
BAIZE = re.compile(r"\[\|(Human|AI)\|\] ?")
# Marks of a conversation that is rendered already, by whichever template.
RENDERED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|\[\|Human\|\]|^###? ?(Human|Instruction|User):",
    re.M,
)
GLAIVE = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
GLAIVE_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*", re.DOTALL)
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
WITH_FUNCTIONS = "with access to the following functions"


def is_human_assistant(talk: Any) -> bool:
    """Whether it is `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    return isinstance(talk, str) and HUMAN_ASSISTANT.match(talk) is not None


def human_assistant(talk: str) -> list[Message]:
    """The turns of that form."""
    pieces = HUMAN_ASSISTANT.split(talk)[1:]
    return [{"role": who, "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


def baize_turns(talk: str) -> list[Message]:
    """The turns of `... [|Human|] ... [|AI|] ...`; after the last answer it has an empty question."""
    pieces = BAIZE.split(talk)[1:]
    turns = [{"role": who, "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return turns[:-1] if turns and not turns[-1]["content"] else turns


def glaive_turns(chat: str) -> list[Message]:
    """The turns of Glaive's `chat`: `USER: ... ASSISTANT: <functioncall> {...} <|endoftext|> FUNCTION RESPONSE: ...`"""
    pieces = GLAIVE.split(chat.replace("<|endoftext|>", ""))[1:]
    turns: list[Message] = []
    for who, said in zip(pieces[::2], pieces[1::2], strict=True):
        turn: Message = {"role": GLAIVE_ROLES[who], "content": said.strip()}
        if who == "ASSISTANT" and (called := GLAIVE_CALL.search(said)):
            # The arguments are JSON in single quotes: {"name": "f", "arguments": '{"x": 1}'}
            written = re.sub(r"'(\{.*\})'", r"\1", called[1], flags=re.DOTALL)
            turn |= {"content": said[: called.start()].strip(), "tool_calls": [written]}
        turns.append(turn)
    return turns


def glaive_system(system: str) -> tuple[str, list[Any]]:
    """(system prompt, tools) of Glaive's `system`, which lists the functions as JSON objects after the prompt.

    Raises:
        Rejection: they are not JSON.
    """
    prompt = system.strip().removeprefix("SYSTEM:").strip()
    if WITH_FUNCTIONS not in prompt:
        return prompt, []
    said, _, listed = prompt.partition(WITH_FUNCTIONS)
    return f"{said.strip()}.", list(_objects(listed))


def _objects(written: str) -> Iterator[Any]:
    at = written.find("{")
    while at >= 0:
        try:
            value, at = json.JSONDecoder(strict=False).raw_decode(written, at)
        except ValueError:
            raise Rejection("the functions in 'system' are not JSON") from None
        yield value
        at = written.find("{", at)
