"""Answers that people judged, as token columns: pairs of a better and a worse one, or each by itself, good or bad.

Of either the last answer of a conversation is what was judged.
"""

from dataclasses import dataclass
from typing import Any

from pipeline import UserError
from train.template import Example, batch_examples


@dataclass(frozen=True)
class Pair:
    """One training row: the chosen conversation's ids and labels (of `Example`), then the rejected one's."""

    input_ids: list[int]
    labels: list[int]
    rejected_input_ids: list[int]
    rejected_labels: list[int]

    @property
    def sides(self) -> tuple[tuple[str, list[int], list[int]], ...]:
        """(name, ids, labels) of each conversation."""
        return ("chosen", self.input_ids, self.labels), ("rejected", self.rejected_input_ids, self.rejected_labels)


def pairs(
    tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int, supervise: str = "last"
) -> list[list[Pair] | UserError]:
    """Of each row of `data/` its pair, or none if a cut to `max_tokens` leaves nothing that tells its answers apart.

    Whatever is to `supervise`, it is the last answers that differ. A UserError is what the template refuses.
    """
    worse = [{**row, "messages": row["rejected"]} for row in rows]
    both = batch_examples(tokenizer, rows + worse, max_tokens, "last")
    return [_pair(*sides) for sides in zip(both[: len(rows)], both[len(rows) :], strict=True)]


def _pair(chosen: list[Example] | UserError, rejected: list[Example] | UserError) -> list[Pair] | UserError:
    if isinstance(chosen, UserError):
        return chosen
    if isinstance(rejected, UserError):
        return rejected
    if not chosen or not rejected:
        return []
    [better], [worse] = chosen, rejected
    return [] if better == worse else [Pair(better.input_ids, better.labels, worse.input_ids, worse.labels)]


@dataclass(frozen=True)
class Judgement:
    """One training row: ids and labels of `Example`, and of its last answer `[1]` if it is good, else `[0]`."""

    input_ids: list[int]
    labels: list[int]
    good: list[int]

    @property
    def sides(self) -> tuple[tuple[str, list[int], list[int]], ...]:
        """(name, ids, labels) of the conversation."""
        return (("good" if self.good[0] else "bad", self.input_ids, self.labels),)


def judgements(
    tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int, supervise: str = "last"
) -> list[list[Judgement] | UserError]:
    """Of each row of `data/` its judged answer, or none if it is cut off. A UserError is what the template refuses.

    Whatever is to `supervise`, the label is of the last answer.
    """
    found = batch_examples(tokenizer, rows, max_tokens, "last")
    return [
        made
        if isinstance(made, UserError)
        else [Judgement(example.input_ids, example.labels, [int(row["label"])]) for example in made]
        for row, made in zip(rows, found, strict=True)
    ]
