"""Chats as the windows export them, message trees, and conversations written as one text.

Of a tree it is the thread that its user saw last, or people liked best.

ChatGPT's `conversations.json`, Open WebUI's and Claude's exports, OpenAssistant's trees. No vendor publishes a schema;
the shapes are those of exports of 2023 to 2026 and, for Open WebUI, of its source.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from train.reading.row import Rejection
from train.reading.turns import Changes, Message, conversation, text

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


Record = Mapping[str, Any]
# What Open WebUI folds away above an answer: thoughts, calls of tools, runs of code.
FOLDED = re.compile(r"<details\b[^>]*\btype=.*?</details>\s*", re.DOTALL)
HIDDEN = "turns that the chat window hid left out"


def chatgpt(record: Record, changes: Changes) -> dict[str, Any]:
    """The branch that ends at `current_node`, without the turns between ChatGPT and its tools."""
    mapping, turns = record["mapping"], []
    for node in _branch(mapping, record.get("current_node"), "parent"):
        message = node.get("message") or {}
        role = (message.get("author") or {}).get("role")
        said = _chatgpt_text(message.get("content") or {})
        hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
        if hidden or role not in ("user", "assistant") or message.get("recipient") not in (None, "all") or not said:
            changes[HIDDEN] += bool(said)
            continue
        turns.append({"role": role, "content": said})
    return conversation(turns, changes)


def _chatgpt_text(content: Record) -> str:
    """What a message says in words; thoughts, code and what a tool showed are not for the reader.

    Raises:
        Rejection: it shows a picture.
    """
    if content.get("content_type") not in ("text", "multimodal_text"):
        return ""
    said = []
    for part in content.get("parts") or []:
        if isinstance(part, dict) and part.get("content_type") == "image_asset_pointer":
            raise Rejection("shows an image: only text is learned")
        said.append(part if isinstance(part, str) else text(part.get("text"), "'parts'") if part else "")
    return "\n".join(part for part in said if part)


def open_webui(record: Record, changes: Changes) -> dict[str, Any]:
    """The branch that ends at `history.currentId`, or the plain list of older versions."""
    chat = record["chat"]
    history = chat.get("history") or {}
    nodes = _branch(history.get("messages") or {}, history.get("currentId"), "parentId") or chat.get("messages") or []
    turns = []
    for node in nodes:
        if node.get("files"):
            raise Rejection("has a file attached: only text is learned")
        said = text(node.get("content"), "'content'")
        turns.append({"role": node.get("role"), "content": FOLDED.sub("", said)})
        changes[HIDDEN] += turns[-1]["content"] != said
    return conversation(turns, changes, system=(chat.get("params") or {}).get("system"))


def claude(record: Record, changes: Changes) -> dict[str, Any]:
    """The messages with their text blocks; the text of an attachment follows the question that it came with."""
    turns = []
    for message in record["chat_messages"]:
        blocks = [block for block in message.get("content") or [] if isinstance(block, dict)]
        words = [block.get("text") for block in blocks if block.get("type") == "text"]
        changes[HIDDEN] += len(words) < len(blocks)
        words = words or [message.get("text")]
        words += [attached.get("extracted_content") for attached in message.get("attachments") or []]
        turns.append({"role": message.get("sender"), "content": "\n\n".join(filter(None, words))})
    return conversation(turns, changes)


def oasst(record: Record, changes: Changes) -> dict[str, Any]:
    """OpenAssistant: from the prompt down, each time the reply that people ranked first."""
    turns: list[Message] = []
    message = record["prompt"]
    if message.get("orphan"):
        raise Rejection("answers a message that does not stand before it")
    while message:
        turns.append({"role": message.get("role"), "content": message.get("text")})
        replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
        ranks = [reply["rank"] if reply.get("rank") is not None else len(replies) for reply in replies]
        message = replies[ranks.index(min(ranks))] if replies else None
    return conversation(turns, changes)


def trees(messages: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """OpenAssistant's rows of one message each as trees, with the row of the prompt; a tree's rows stand together."""
    nodes: dict[str, dict[str, Any]] = {}
    prompt: tuple[int, dict[str, Any]] | None = None
    for number, message in messages:
        if not _is_message(message):  # told as a problem where it is read
            yield number, message
            continue
        node = {**message, "replies": []}
        if message.get("parent_id") is None:
            if prompt:
                yield prompt[0], {"prompt": prompt[1]}
            prompt, nodes = (number, node), {}
        elif message["parent_id"] in nodes:
            nodes[message["parent_id"]]["replies"].append(node)
        else:
            yield number, {"prompt": node | {"orphan": True}}
            continue
        nodes[message["message_id"]] = node
    if prompt:
        yield prompt[0], {"prompt": prompt[1]}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("message_id"), str)
        and isinstance(message.get("parent_id"), str | None)
    )


def _branch(nodes: Mapping[str, Any], last: Any, parent: str) -> list[Any]:
    """The nodes from the first to the `last`, which is the newest one where none is named; a loop ends it."""
    name = last if last in nodes else next(reversed(nodes), None)
    branch: dict[str, Any] = {}
    while name in nodes and name not in branch:
        branch[name] = nodes[name]
        name = nodes[name].get(parent)
    return list(branch.values())[::-1]
