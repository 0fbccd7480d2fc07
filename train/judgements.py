"""Answers that someone judged, as token columns: the last answer of a conversation, and whether it is a good one."""

from dataclasses import dataclass
from typing import Any

from pipeline import UserError
from train.template import batch_examples


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
