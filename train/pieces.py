"""Tokens as text in pieces: what is learned, what is special, and nothing that would steer a terminal."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from train.template import IGNORED

# What would steer the terminal, or turn the writing's direction beyond itself, is shown by its picture or its number.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\N{SYMBOL FOR DELETE}"}
NUMBERED = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE = PICTURES | {code: f"\\u{code:04x}" for code in NUMBERED}


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text: `learned` are those in the loss."""

    text: str
    learned: bool
    special: bool


def pieces(tokenizer: Any, ids: list[int], labels: list[int]) -> list[Piece]:
    """The tokens as text, controls made visible; a character that a boundary cuts lies in the later piece."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    kinds = [(label != IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
    found, written, index = [], "", 0
    for (learned, is_special), run in groupby(kinds):
        index += len(list(run))
        text = tokenizer.decode(ids[:index], clean_up_tokenization_spaces=False)
        if index < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(Piece(text[len(written) :].translate(VISIBLE), learned, is_special))
        written = text
    return found
