"""Show what training will read, before it trains:  python -m train.preview RECIPE

Conversations as the chat template writes them, what is learned in colour (between brackets where there is none), rows
with the boundaries of their conversations where they are packed, and what became of all rows. `ROW=17`, or
`ROW=talks.jsonl:17`, shows that one whole. The numbers and an example stay in `tokens/preview.json` for the report.
"""

import os
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.command import boundary, recipe_of_arguments
from pipeline.rows import count, picked, rows
from pipeline.units import bars
from train.config import read_config
from train.packing import expected, told
from train.template import IGNORED
from train.tokens import (
    SHOWN_TOKENS,
    VISIBLE,
    Tokens,
    examples_of,
    longest_and_sum,
    pieces,
    row_tokens,
    tokenized,
    write_preview,
)

SHOWN, PACKED_SHOWN = 3, 2
PACKED = 10_000  # conversations of which the fill of packed rows is told
BAR_CHARACTERS, BAR_LEFT = 40, 35
LEARNED, SPECIAL = "bold green", "cyan"
OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


def packed_rows(recipe: Recipe, tokens: Tokens) -> tuple[Any, int]:
    """(rows as TRL packs them, tokens that one can hold) of the first conversations."""
    from trl import pack_dataset

    most = row_tokens(*longest_and_sum(tokens.datasets.values()), recipe.train.max_length)
    train = tokens.datasets["train"]
    return pack_dataset(train.select(range(min(PACKED, len(train)))), most), most


def preview(recipe: Recipe, run: Run, wish: str | None = None) -> None:
    """Print it; `wish` names one conversation by its number or its place.

    Raises:
        UserError: no such conversation; what the template refuses; nothing is left to learn.
    """
    from rich.console import Console
    from transformers import AutoTokenizer

    console = Console(highlight=False, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    if wish:
        show_row(console, tokenizer, recipe, _wished(run, wish), SHOWN_TOKENS * recipe.train.max_length)
        return
    tokens = tokenized(recipe, run)
    layout, train = expected(recipe, run, read_config(recipe, run)), tokens.datasets["train"]
    laid, most = packed_rows(recipe, tokens) if layout.packed else (train, longest_and_sum(tokens.datasets.values())[0])
    found = write_preview(recipe, run, tokens, tokenizer, told(layout, laid, most, recipe.train.batch_size))
    number = count(run.path("data"), "train")
    for row in picked(run.path("data"), "train", sorted({0, number // 2, number - 1})[:SHOWN]):
        show_row(console, tokenizer, recipe, row, SHOWN_TOKENS)
    for index in range(min(PACKED_SHOWN, len(laid)) if layout.packed else 0):
        show_packed(console, tokenizer, laid[index], index, most)
    show_numbers(console, recipe, found)


def show_row(console: Any, tokenizer: Any, recipe: Recipe, row: dict[str, Any], most: int) -> None:
    """A conversation as each of its training rows."""
    found = examples_of(recipe, tokenizer, row)
    if not found:
        heading(console, f"{row['source']}: left out, no answer is within train.max_length={recipe.train.max_length}")
    for index, example in enumerate(found):
        part = f", row {index + 1} of {len(found)}" if len(found) > 1 else ""
        for name, ids, labels in example.sides:
            learned = sum(label != IGNORED for label in labels)
            size = f"{len(ids):,} tokens, {learned:,} learned ({mark(console)})"
            cut = ", cut" if len(ids) == recipe.train.max_length else ""
            heading(console, f"{row['source']}{part}{name and f', {name}'}: {size}{cut}")
            show_tokens(console, tokenizer, ids[:most], labels[:most])
            if len(ids) > most:
                more = f"... and {len(ids) - most:,} tokens more: ROW={row['source']} shows all"
                console.print(more.translate(VISIBLE), markup=False)


def show_packed(console: Any, tokenizer: Any, row: dict[str, Any], index: int, most: int) -> None:
    """A packed row: its conversations end to end, none of which sees another."""
    heading(console, f"packed row {index + 1}: {len(row['input_ids']):,} of {most:,} tokens", "=")
    first, sizes = 0, row["seq_lengths"]
    for number, length in enumerate(sizes, 1):
        if first >= SHOWN_TOKENS:
            console.print(f"... and {len(sizes) - number + 1:,} conversations more")
            break
        heading(console, f"conversation {number} of {len(sizes)}: positions 0 to {length - 1:,}")
        span = slice(first, first + min(length, SHOWN_TOKENS))
        show_tokens(console, tokenizer, row["input_ids"][span], row["labels"][span])
        if length > SHOWN_TOKENS:
            console.print(f"... and {length - SHOWN_TOKENS:,} tokens more")
        first += length


def heading(console: Any, title: str, line: str = "\N{BOX DRAWINGS LIGHT HORIZONTAL}") -> None:
    """The whole title, which names a place to ask for, and a line to the edge."""
    from rich.cells import cell_len
    from rich.text import Text

    title = title.translate(VISIBLE)
    console.print(Text.assemble((title, "bold"), " ", (line * (console.width - cell_len(title) - 1), "dim")))


def mark(console: Any) -> str:
    """How what is learned is marked there: by colour, or by brackets where there is none."""
    return "green" if console.color_system is not None and not console.no_color else f"in {OPEN}{CLOSE}"


def show_tokens(console: Any, tokenizer: Any, ids: list[int], labels: list[int]) -> None:
    """The text of the tokens, with what is learned marked."""
    from rich.text import Text

    colour, text, inside = mark(console) == "green", Text(), False
    for piece in pieces(tokenizer, ids, labels):
        if not colour and piece.learned != inside:
            text.append(OPEN if piece.learned else CLOSE)
            inside = piece.learned
        style = " ".join(word for word, on in ((LEARNED, piece.learned), ("underline", piece.special)) if on)
        text.append(piece.text, style or (SPECIAL if piece.special else ""))
    text.append(CLOSE if inside else "")
    console.print(text)


def show_numbers(console: Any, recipe: Recipe, told: dict[str, Any]) -> None:
    """What became of all rows: counts, histogram, share learned, fill."""
    heading(console, "all rows", "=")
    for source in told["sources"]:
        for what, number in (
            source["changes"] | {f"left out: {why}": n for why, n in source["rejected"].items()}
        ).items():
            console.print(f"{source['source']}: {number:,} x {what}", markup=False)
    if told["system"]:
        console.print(f"system prompt of a conversation that brings none: {told['system']}", markup=False)
    for name, value in (recipe.chat_template_arguments or {}).items():
        console.print(f"chat template: {name} is {value!r}", markup=False)
    if recipe.train.supervise == "last":
        console.print("learned is the last answer of each conversation alone")
    for part, numbers in told["parts"].items():
        if not numbers.get("rows"):
            continue
        share = numbers["supervised_tokens"] / max(1, numbers["tokens"])
        console.print(
            f"{part}: {numbers['rows']:,} conversations, {numbers['tokens']:,} tokens, "
            f"{numbers['supervised_tokens']:,} of them learned ({share:.0%})"
        )
        lost = {
            f"cut to train.max_length={recipe.train.max_length}": numbers["cut"],
            "left out, no answer within train.max_length": numbers["dropped"],
            "left out, the template does not show it": numbers["unshown"],
            "without their reasoning_content, which the template does not show": numbers.get("reasoning_lost", 0),
            "spell control tokens, which are learned as text": numbers.get("control_tokens", 0),
        }
        for what, number in lost.items():
            if number:
                console.print(f"  {number:,} {what}")
    console.print("train, conversations by their tokens:")
    for label, number, part in bars(told["lengths"]):
        bar = "\N{FULL BLOCK}" * round(min(BAR_CHARACTERS, console.width - BAR_LEFT) * part)
        console.print(f"  {label:>20} {number:>11,} {bar}")
    packing = told["packing"]
    first = f" (the first {PACKED:,} conversations)" if told["parts"]["train"]["examples"] > PACKED else ""
    rows = f"{packing['rows']:,} rows of {packing['row_tokens']:,} tokens, {packing['fill']:.0%} full"
    if not packing["packed"]:
        first, rows = "", rows.replace("of", "of one conversation, at most", 1)
    console.print(f"{'packed' if packing['packed'] else 'padded'}{first}: {rows}: {packing['why']}", markup=False)


def _wished(run: Run, wish: str) -> dict[str, Any]:
    data = run.path("data")
    if wish.isdecimal():
        number = count(data, "train")
        if not 1 <= int(wish) <= number:
            raise UserError(f"ROW={wish}: there is no such conversation: give a number from 1 to {number}")
        return next(picked(data, "train", [int(wish) - 1]))
    for part in ("train", "validation"):
        found = next((row for row in rows(data, part) if f"/{row['source']}".endswith(f"/{wish}")), None)
        if found:
            return found
    raise UserError(f"ROW={wish}: no conversation is from there: name file and line, as rejected.jsonl and errors do")


if __name__ == "__main__":
    with boundary():
        recipe = recipe_of_arguments("train.preview", "Show what training will read, before it trains")
        run = Run.of(recipe)
        with run.lock():
            preview(recipe, run, os.environ.get("ROW"))
