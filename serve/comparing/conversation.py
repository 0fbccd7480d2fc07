"""One pane's conversation: its turns and how each answer was made, the tokens that were read, the data it becomes."""

import codecs
import fcntl
import html
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.error import UserError
from pipeline.rows import rendered
from serve.asking.endpoint import ERRORS, HOST, ask
from serve.running.backend import Endpoint

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Made:
    """What an answer was made from, and the answer as the model gave it."""

    artefact: str
    prompt: list[dict[str, str]]
    answer: str
    settings: dict[str, Any]
    speed: str


@dataclass
class Conversation:
    """`turns` are the user's and the assistant's; the system prompt is each answer's own, as `made` has it."""

    turns: list[dict[str, str]] = field(default_factory=list)
    made: dict[int, Made] = field(default_factory=dict)

    def messages(self, system: str) -> list[dict[str, str]]:
        """What is sent: the turns after the system prompt, if there is one."""
        return [*([{"role": "system", "content": system}] if system.strip() else []), *self.turns]

    def add(self, role: str, content: str, made: Made | None = None) -> None:
        if made:
            self.made[len(self.turns)] = made
        self.turns.append({"role": role, "content": content})

    def correct(self, index: int, content: str) -> None:
        """Another text for a turn; what the model really answered stays in `made`."""
        self.turns[index] = {**self.turns[index], "content": content}

    def rated(self, index: int, rating: str) -> dict[str, Any]:
        """A line of the feedback file.

        Raises:
            UserError: the turn is no answer.
        """
        if index not in self.made:
            raise UserError(f"turn {index} is no answer of a model: rate one that is")
        made, now = self.made[index], self.turns[index]["content"]
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rating": rating,
            "artefact": made.artefact,
            "messages": made.prompt,
            "answer": made.answer,
            **({"correction": now} if now != made.answer else {}),
            "settings": made.settings,
            "speed": made.speed,
        }

    def as_data(self) -> str:
        """The conversation as one line of a data file of `make train`; empty while nobody has answered.

        Its system prompt is that of the last answer, and what follows that answer is left out.
        """
        if not self.made:
            return ""
        last = max(self.made)
        system = [message for message in self.made[last].prompt if message["role"] == "system"]
        row = {"messages": [*system, *self.turns[: last + 1]]}
        return json.dumps(row, ensure_ascii=False) + "\n"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a JSONL file, whole or not at all, whoever else writes; a line that a kill cut stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        joint = b"\n" if end and file.read(1) != b"\n" else b""
        file.write(joint + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Token:
    """A token's id, and its text: empty where it ends within a character."""

    id: int
    text: str
    is_special: bool


def tokens(endpoint: Endpoint, messages: Messages, base: Path) -> list[Token]:
    """What the engine itself makes of the messages; where it does not tell, what the tokenizer of `base` makes."""
    found = _of_engine(endpoint, messages) or _of_folder(base, messages)
    special = _special_ids(base)
    return [Token(id, text, id in special) for id, text in found]


def _of_engine(endpoint: Endpoint, messages: Messages) -> list[tuple[int, str]]:
    """By the two routes of llama.cpp's server, which only this machine is asked for."""
    url = urlsplit(endpoint.url)
    if url.hostname != HOST or not url.port:
        return []
    try:
        status, rendered = ask(url.port, "/apply-template", endpoint.key, {"messages": messages})
        if status != 200:
            return []
        asked = {"content": rendered["prompt"], "add_special": True, "parse_special": True, "with_pieces": True}
        status, cut = ask(url.port, "/tokenize", endpoint.key, asked)
        return _texts(cut["tokens"]) if status == 200 else []
    except (*ERRORS, LookupError, TypeError):
        return []


def _texts(pieces: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """llama.cpp gives the bytes of a token that ends within a character: the one that ends it shows it."""
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for piece in pieces:
        text = piece["piece"]
        found.append((piece["id"], decoder.decode(text.encode() if isinstance(text, str) else bytes(text))))
    return found


def _of_folder(base: Path, messages: Messages) -> list[tuple[int, str]]:
    if not (base / "tokenizer.json").is_file():
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = rendered(tokenizer, messages, prompt=True)
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    return [
        (id, prompt[start:end])
        for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _special_ids(base: Path) -> set[int]:
    try:
        added = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, ValueError, LookupError):
        return set()
    return {token["id"] for token in added if token["special"]}


def as_html(found: list[Token]) -> str:
    """The tokens in a row, each with its bounds and its id under the pointer, and the ids as a list."""
    if not found:
        return '<p class="quiet">This endpoint does not show its prompt.</p>'
    spans = "".join(_span(number, token) for number, token in enumerate(found))
    ids = ", ".join(str(token.id) for token in found)
    special = sum(token.is_special for token in found)
    head = f'<p class="quiet">{len(found)} tokens, {special} of them special; point at one to see its id</p>'
    return f'{head}<div class="tokens">{spans}</div><details><summary>ids</summary><code>[{ids}]</code></details>'


def _span(number: int, token: Token) -> str:
    kind = "special" if token.is_special else f"shade{number % 2}"
    text = html.escape(token.text).replace("\n", '<i class="mark">↵</i>\n').replace("\t", '<i class="mark">⇥</i>\t')
    shown = text or '<i class="mark">…</i>'
    return f'<span class="token {kind}" title="{token.id}">{shown}</span>'
