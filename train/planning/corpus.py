"""How many tokens the data has, how long its rows are and how much of them is learned, from a sample of it."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.methods import METHODS
from pipeline.rows import count, row_text, rows
from train.tokens import row_tokens

SAMPLE = 300
CHARACTERS_A_TOKEN = 4  # of English; a chat template adds some tokens to each message
TOKENS_A_MESSAGE = 6


@dataclass(frozen=True)
class Corpus:
    """Of one epoch. `row` is the length of the longest row, `supervised` the share of tokens that get logits."""

    tokens: int
    row: int
    supervised: float
    told: str


def corpus(recipe: Recipe, run: Run, packed: bool) -> Corpus:
    """What the `data` stage wrote if that is there, else the recipe's files; a sample of it, spread to its whole size.

    Args:
        packed: whether conversations share rows.

    Raises:
        UserError: the data is only on the Hub, or cannot be read.
    """
    if recipe.plan.tokens:
        return Corpus(recipe.plan.tokens, recipe.train.max_length, 0.5, "plan.tokens")
    made = run.find_receipt("data")
    if made and made.recipe.get("data", {}).get("train") == list(recipe.data.train) and run.path("data").is_dir():
        total = count(run.path("data"), "train")
        sample: list[dict[str, Any]] = list(rows(run.path("data"), "train", SAMPLE))
    else:
        sample, total = _of_files(recipe)
    tokenizer = _tokenizer(recipe, run)
    sides = METHODS[recipe.train.method].sequences
    sizes = [_tokens(row, tokenizer, sides == 2) for row in sample]
    lengths = [min(tokens, sides * recipe.train.max_length) for tokens, _ in sizes]
    tokens = round(sum(lengths) * total / len(lengths))
    row = row_tokens(max(lengths), round(tokens / (1 - recipe.data.validation)), recipe.train.max_length)
    return Corpus(
        tokens=tokens,
        row=row if packed else max(lengths) // sides,
        supervised=sum(learned for _, learned in sizes) / sum(tokens for tokens, _ in sizes),
        told="the base's tokenizer" if tokenizer else f"{CHARACTERS_A_TOKEN} characters a token",
    )


def counted(counts: dict[str, dict[str, int]], recipe: Recipe, packed: bool) -> Corpus:
    """The same of data whose tokens are made (train.tokens), exactly."""
    train = counts["train"]
    longest, total = (reduce(part.get(key, 0) for part in counts.values())
                      for key, reduce in (("longest", max), ("tokens", sum)))  # fmt: skip
    row = row_tokens(longest, total, recipe.train.max_length) if packed else longest
    return Corpus(train["tokens"], row, train["supervised_tokens"] / train["tokens"], "the base's tokenizer")


def supervised_positions(tokens: int, share: float) -> int:
    """Positions of a row that get logits at most: a row may have more than its share, and an eighth is filled up."""
    eighth = max(1, tokens // 8)
    return min(tokens, -(-round(tokens * (share + 1 / 8)) // eighth) * eighth)


def _of_files(recipe: Recipe) -> tuple[list[dict[str, Any]], int]:
    """(some rows, about how many there are to train on) of the recipe's local files."""
    from train.reading.formats import detect, rows, whole_chunks
    from train.reading.row import Problem
    from train.reading.sources import sources

    sample, total = [], 0.0
    for source in sources(recipe.data):
        if source.hub:
            raise UserError(f"{source.name} is on the Hub, and a plan fetches no data: set plan.tokens to its tokens")
        detected = detect(source)
        read: list[dict[str, Any]] = []
        problems: list[Problem] = []
        whole = True
        for chunk in whole_chunks(source, detected.format):
            found = rows(detected, chunk, METHODS[recipe.train.method].rows)
            read += [row.value for row in found.rows]
            problems += found.problems
            if len(read) >= 100 * SAMPLE:
                whole = False
                break
        if not read:
            raise UserError(f"{source.name}: nothing in it can be learned: 'make data RECIPE={recipe.given}' tells why")
        size = len(read) if whole else len(read) * Path(source.name).stat().st_size / _characters(read)
        sample += list(islice(read, 0, None, max(1, len(read) // SAMPLE)))
        total += size * source.weight * (1 - recipe.data.validation)
    return sample, max(1, round(total))


def _characters(values: list[dict[str, Any]]) -> int:
    import json

    return sum(len(json.dumps(value, ensure_ascii=False).encode()) for value in values)


def _tokenizer(recipe: Recipe, run: Run) -> Any:
    """The base's, if the `base` stage has brought it."""
    made = run.find_receipt("base")
    if (
        not made
        or made.recipe.get("base_model") != recipe.base_model
        or not run.path("base", "tokenizer.json").is_file()
    ):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run.path("base"))


def _tokens(row: dict[str, Any], tokenizer: Any, pairs: bool) -> tuple[int, int]:
    """(tokens of a row, how many of them are learned: the assistant's and the end of each turn of it); of a pair those
    of both sides."""
    if isinstance(row.get("rejected"), list) and pairs:
        sides = [_tokens(side, tokenizer, False) for side in (row, {"messages": row["rejected"]})]
        return sum(tokens for tokens, _ in sides), sum(learned for _, learned in sides)
    texts = [row["text"]] if "text" in row else [str(turn.get("content") or "") for turn in row["messages"]]
    said = texts if "text" in row else [text for text, turn in zip(texts, row["messages"], strict=True)
                                        if turn["role"] == "assistant"]  # fmt: skip
    if tokenizer is None:
        tokens = sum(map(len, texts)) // CHARACTERS_A_TOKEN + TOKENS_A_MESSAGE * len(texts)
        learned = sum(map(len, said)) // CHARACTERS_A_TOKEN + len(said)
    else:
        tokens = len(tokenizer(row_text(tokenizer, row), add_special_tokens=False)["input_ids"])
        learned = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in said)
    return max(1, tokens), max(1, min(tokens, learned))
