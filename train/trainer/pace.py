"""The pace of a training: tokens, seconds and memory of each step, and their totals."""

import time
from typing import Any

from pipeline.machine import resident_bytes
from train.template import IGNORED


class Pace:
    """Counts from one log to the next; a training's totals are those of its history, which outlives the process."""

    def __init__(self) -> None:
        self.full_speed: float | None = None  # tokens a second at the device's peak, where that is known
        self._reset()

    def _reset(self) -> None:
        self.tokens = self.supervised = 0
        self.began: float | None = None

    def begin(self) -> None:
        """A micro-batch of a step begins."""
        self.began = self.began or time.monotonic()

    def count(self, inputs: dict[str, Any]) -> None:
        """Tokens of whole rows, prompts included, and those whose loss is learned; `inputs` are (batch, time).

        Padding, which TRL's collator gives position 0 each, is left out.
        """
        positions = inputs.get("position_ids")
        self.tokens += inputs["input_ids"].numel() if positions is None else int(positions[0].nonzero()[-1]) + 1
        self.supervised += int((inputs["labels"][:, 1:] != IGNORED).sum())

    def read(self) -> dict[str, float]:
        """The step's measures by their names in the logs."""
        seconds = time.monotonic() - (self.began or time.monotonic())
        measured = {
            "step_tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "memory_bytes": memory_bytes(),
        }
        if self.full_speed:
            measured["mfu"] = round(self.tokens / max(seconds, 1e-9) / self.full_speed, 4)
        self._reset()
        return measured


def memory_bytes() -> int:
    """What training holds now: of the GPU where there is one, else of this process."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()[0]


def totals(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and speed of a whole training, however many processes it took."""
    steps = [row for row in history if "step_tokens" in row]
    tokens, seconds = sum(row["step_tokens"] for row in steps), sum(row["step_seconds"] for row in steps)
    peaks = [(row["mfu"], row["step_seconds"]) for row in steps if "mfu" in row]
    used = sum(mfu * spent for mfu, spent in peaks) / max(sum(spent for _, spent in peaks), 1e-9)
    return ({"mfu": round(used, 4)} if peaks else {}) | {
        "tokens": tokens,
        "supervised_tokens": sum(row["supervised_tokens"] for row in steps),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
