"""Pairs of a better and a worse answer as token columns: both follow one prompt, and the last answer is compared."""

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
