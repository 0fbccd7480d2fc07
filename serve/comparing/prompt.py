"""The rendered prompt of a conversation, cut into the tokens that the model reads, as a part of a page."""

import codecs
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.rows import rendered
from serve.asking.endpoint import ERRORS, HOST, ask
from serve.running.backend import Endpoint

Messages = list[dict[str, str]]


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
        wish = {"content": rendered["prompt"], "add_special": True, "parse_special": True, "with_pieces": True}
        status, cut = ask(url.port, "/tokenize", endpoint.key, wish)
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
