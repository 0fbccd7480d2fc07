"""One pane's conversation: its turns and how each answer was made, the thumbs it gets, the data file it becomes."""

import fcntl
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.error import UserError


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
