"""The row that each format makes of a record: every function takes (record, changes) and returns a row's value.

They raise ValueError for what is wrong with the record, and Rejection for what nothing can be learned from. No vendor
publishes a schema of its exports; the shapes are those of exports of 2023 to 2026 (ChatGPT's `conversations.json`, Open
WebUI's, Claude's, OpenAssistant's trees) and, for Open WebUI, of its source. Of a tree it is the thread that its user
saw last, or people liked best.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from train.reading.row import (
    ANSWERS,
    CHOICES,
    CONTEXTS,
    PAIRS,
    QUESTIONS,
    SPEAKERS,
    SYSTEMS,
    TRUTHS,
    TURNS,
    Record,
    Rejection,
    columns_of_turns,
    first,
    is_exchange,
    is_written_list,
    label,
)
from train.reading.turns import (
    LEARNED,
    MASKED,
    Changes,
    Message,
    as_turns,
    conversation,
    parsed,
    text,
    thought_of,
    without_end,
)

Value = dict[str, Any]
MARKS_WITHIN = 2000  # characters
OTHER_OPENING = "worse answers to another opening left out"
WEIGHTED = "weights of rows not used, which data.weights gives to files"
OTHER_ANSWERS = "further answers to one question left out"
LOOKS_RENDERED = "texts that look like conversations in some template learned whole, questions too"
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


def talk(record: Record, changes: Changes) -> Value:
    """A column of turns, of OpenAI's or ShareGPT's spelling, of exchanges, or of texts that alternate."""
    name = next(iter(columns_of_turns(record)), None)
    given = as_turns(record[name] if name else first(record, TURNS))
    if all(isinstance(said, str) for said in given):
        given = _alternating(given, record.get("speakers"))
    elif is_exchange(given[0]):
        given = [one for turn in given for one in _exchanged(turn)]
    return _whole(record, given, changes)


def _alternating(said: list[str], speakers: Any) -> list[Any]:
    """Turns of plain texts: the user begins; SODA names who speaks."""
    if not isinstance(speakers, list) or len(speakers) != len(said):
        speakers = [at % 2 for at in range(len(said))]
    names = list(dict.fromkeys(speakers))
    if len(names) > 2:
        raise Rejection("more than two speak")
    roles = dict(zip(names, ("user", "assistant"), strict=False))
    return [{"role": roles[speaker], "content": words} for speaker, words in zip(speakers, said, strict=True)]


def _exchanged(turn: Any) -> list[Any]:
    if not is_exchange(turn):
        return [turn]
    system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
    return system + _exchange(first(turn, QUESTIONS), first(turn, ANSWERS))


def bare(record: Any, changes: Changes) -> Value:
    """A record that is itself the list of turns."""
    return conversation(record, changes)


def question(record: Record, changes: Changes) -> Value:
    """A question and its answer, each a text or a list of turns; an input, or context, follows after an empty line."""
    if chosen := [name for name in CHOICES if record.get(name)]:
        raise ValueError(f"has {chosen[0]!r}, which no format has a place for: write the choices into the question")
    name = next((name for name in ("instruction", *QUESTIONS) if record.get(name) is not None), "")
    asked = record.get(name)
    more = [text(record[part], f"'{part}'") for part in CONTEXTS if part != name and record.get(part)]
    if isinstance(asked, str) and not is_written_list(asked):
        asked = "\n\n".join(part for part in (text(asked, f"'{name}'"), *more) if part.strip())
    elif any(map(str.strip, more)):
        raise ValueError(f"has turns in {name!r} and a context beside them: write the context into a turn")
    answer = _turns(_answer(record, changes), "assistant")
    if thought := thought_of(record, "", changes):
        answer = [*answer[:-1], answer[-1] | {"reasoning_content": thought}]
    return _whole(record, _history(record) + _turns(asked, "user") + answer, changes)


def _history(record: Record) -> list[Any]:
    history = record.get("history") or []
    history = parsed(history, "'history'") if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    return [turn for pair in history for turn in _exchange(*pair)]


def _answer(record: Record, changes: Changes) -> Any:
    """The answer; of SQuAD's several the first."""
    if "answers" not in record:
        return first(record, ANSWERS)
    answers = record["answers"]
    said = answers["text"] if isinstance(answers, dict) else [answer.get("text") for answer in answers]
    if not said:
        raise Rejection("no answer: the context has none")
    if len(set(said)) > 1:
        changes[OTHER_ANSWERS] += 1
    return said[0]


def calls(record: Record, changes: Changes) -> Value:
    """xLAM: a question, the tools, and the calls that answer it."""
    called = {"role": "assistant", "content": "", "tool_calls": record["answers"]}
    return _whole(record, [*_turns(first(record, QUESTIONS), "user"), called], changes)


def judged(record: Record, changes: Changes) -> Value:
    """KTO: an answer, and whether it is a good one."""
    value = talk(record, changes) if columns_of_turns(record) else question(record, changes)
    return value | {"label": label(record)}


def preference(record: Record, changes: Changes) -> Value:
    """A better and a worse answer to what stands in a column of its own or opens both.

    Where they do not answer the same, only the better one stays.
    """
    if isinstance(record.get("input"), dict) and "messages" in record["input"]:  # OpenAI's own, with the tools in it
        record = {**record, "input": None, **record["input"]}
    asked = first(record, (*columns_of_turns(record), *QUESTIONS, "instruction"))
    better_and_worse = next(names for names in PAIRS if set(names) <= record.keys())
    pair = dict(zip(("chosen", "rejected"), (_opened(record[name], asked) for name in better_and_worse), strict=True))
    if all(isinstance(said, str) for said in pair.values()):  # a continuation of nothing
        return plain({"text": pair["chosen"]}, changes) | {"rejected": text(pair["rejected"], "'rejected'")}
    better = _whole(record, pair["chosen"], changes)
    worse = _whole(record, pair["rejected"], Counter())["messages"]
    if better["messages"][:-1] != worse[:-1]:
        changes[OTHER_OPENING] += 1
        return better
    return better | {"rejected": worse}


def plain(record: Record, changes: Changes) -> Value:
    """Text that is learned as it stands."""
    name = "text" if "text" in record else "content"
    content = text(record[name], f"'{name}'")
    if RENDERED.search(content, 0, MARKS_WITHIN):
        changes[LOOKS_RENDERED] += 1
    else:
        content = without_end(content, changes)
    if not content.strip():
        raise Rejection("an empty text")
    return {"text": content}


def baize(record: Record, changes: Changes) -> Value:
    """Baize: the turns stand in one text."""
    return conversation(baize_turns(record["input"]), changes)


def glaive(record: Record, changes: Changes) -> Value:
    """Glaive's function calling: the tools stand in the system prompt, the turns in one text."""
    system, tools = glaive_system(text(record["system"], "'system'"))
    turns = glaive_turns(text(record["chat"], "'chat'"))
    return conversation(turns, changes, tools, system)


def _whole(record: Record, turns: Any, changes: Changes) -> Value:
    """The conversation with the record's system prompt and tools.

    Raises:
        ValueError: its marks contradict each other, or its weight is no number.
        Rejection: the whole record is marked as not to be learned.
    """
    said = {key: TRUTHS.get(str(record[key]).strip().lower()) for key in (*LEARNED, *MASKED) if key in record}
    learned = {key: truth != (key in MASKED) for key, truth in said.items() if truth is not None}
    if len(set(learned.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, learned))} contradict each other: keep one")
    if not all(learned.values()):
        raise Rejection(f"marked as not to be learned: {next(iter(learned))!r} is {record[next(iter(learned))]!r}")
    if record.get("weight") is not None and "weight" not in learned:
        if not _is_number(record["weight"]):
            raise ValueError(
                f"'weight' is {record['weight']!r}: give 1 or 0, and how much a file counts by data.weights"
            )
        changes[WEIGHTED] += 1
    tools, system = first(record, ("tools", "functions")), first(record, SYSTEMS)
    system = system.get("parts", system.get("content")) if isinstance(system, dict) else system
    return conversation(turns, changes, tools, system)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _exchange(asked: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _turns(given: Any, role: str) -> list[Any]:
    """Turns of a list of them, of a single one, or of a text, which is a turn of that role."""
    said = given
    if is_written_list(given):
        with suppress(ValueError):  # else a text that only looks like a list
            said = parsed(given, "")
    if isinstance(said, list) and said and isinstance(said[0], dict) and set(SPEAKERS) & said[0].keys():
        return said
    return [given if isinstance(given, dict) else {"role": role, "content": given}]


def _opened(said: Any, asked: Any) -> Any:
    """The turns of the question and this answer to it; the answer's text where there is no question at all."""
    if said is None or said in ("", []):
        raise Rejection("'chosen' or 'rejected' is empty")
    if asked is None and isinstance(said, str) and not is_written_list(said):
        return human_assistant(said) if is_human_assistant(said) else said
    if is_human_assistant(asked) and isinstance(said, str):
        return human_assistant(
            f"{asked.removesuffix(' ').removesuffix('Assistant:').rstrip()}\n\nAssistant: {said.strip()}"
        )
    turns = _turns(said, "assistant")
    speakers = {turn.get("role") or turn.get("from") for turn in turns if isinstance(turn, dict)}
    return turns if asked is None or speakers & {"user", "human"} else _turns(asked, "user") + turns


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


def _branch(nodes: dict[str, Any], last: Any, parent: str) -> list[Any]:
    """The nodes from the first to the `last`, which is the newest one where none is named; a loop ends it."""
    name: Any = last if last in nodes else next(reversed(nodes), None)
    branch: dict[str, Any] = {}
    while name in nodes and name not in branch:
        branch[name] = nodes[name]
        name = nodes[name].get(parent)
    return list(branch.values())[::-1]
