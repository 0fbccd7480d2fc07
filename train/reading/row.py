"""One row of training data with its place, and the two ways in which a row does not become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PROBLEMS_SHOWN, ALIKE_SHOWN = 20, 3


@dataclass(frozen=True, slots=True)
class Row:
    """What the data stage writes, and `file:line` (of a table: `file:row`) where it comes from.

    `value` is one of
    - a conversation `{"messages": [...]}` with `tools` where given. It ends with an assistant's turn. A message has
      `role` (system, user, assistant, tool), `content` (text, possibly empty) and where given `reasoning_content`,
      `tool_calls` (OpenAI's form with `arguments` as an object), `tool_call_id`, `name`, and `weight` 0 for an answer
      that is not to be learned;
    - a preference pair, with `rejected` beside `messages`: the same opening with the worse answer;
    - a judged answer, with `label` beside `messages`: whether it is a good one;
    - plain text `{"text": ...}`, of a pair without a prompt with `rejected`, the worse text.
    """

    value: dict[str, Any]
    place: str


class Rejection(Exception):
    """Why a row is left out: it is not wrong, only of no use. It goes to `rejected.jsonl` and is counted."""

    def __init__(self, reason: str, step: str = "format") -> None:
        super().__init__(reason, step)
        self.reason = reason
        self.step = step

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is left out: `value` as it was read."""

    value: Any
    place: str
    rejection: Rejection


class Problem(NamedTuple):
    """What is wrong with a file or a line of it, and what mends it; the user has to."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def told(problems: Sequence[Problem | str]) -> list[str]:
    """The problems as lines; what is wrong with more than a few lines of a file in the same way is told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        file = problem.place.rpartition(":")[0] if isinstance(problem, Problem) else ""
        groups.setdefault((file, problem.text if isinstance(problem, Problem) else problem), []).append(str(problem))
    lines = []
    for same in groups.values():
        many = f"{same[0]} (and {len(same) - 1} more such lines, up to {same[-1].partition(': ')[0]})"
        lines += [many] if len(same) > ALIKE_SHOWN else same
    more = len(lines) - PROBLEMS_SHOWN
    return lines[:PROBLEMS_SHOWN] + ([f"and {more} more problems like these"] if more > 0 else [])
