"""What training read, for the report: sources, what became of their rows, their lengths, what of them is learned."""

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.run import Run
from pipeline.units import bars


@dataclass(frozen=True)
class Conversations:
    """From the receipt of `data` and from `tokens/preview.json`; what is not known is empty."""

    sources: list[dict[str, Any]] = field(default_factory=list)  # `source`, `format`, `rows`, `rejected` by reason
    steps: list[tuple[str, int, int]] = field(default_factory=list)  # (cleaning step, rows changed, rows left out)
    parts: list[dict[str, Any]] = field(default_factory=list)  # a row of counts for train and for validation
    lengths: list[tuple[str, int, float]] = field(default_factory=list)  # (tokens, rows, bar of 0 to 1)
    packing: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sources or self.parts)


def conversations(run: Run) -> Conversations:
    """What this run tells of its data."""
    receipt = run.find_receipt("data")
    told = receipt.metrics if receipt else {}
    changed, rejected = (told.get(key) for key in ("changed", "rejected"))
    changed, rejected = (steps if isinstance(steps, dict) else {} for steps in (changed, rejected))
    steps = [(name, changed.get(name, 0), rejected.get(name, 0)) for name in sorted({*changed, *rejected})]
    try:
        found = json.loads(run.path("tokens", "preview.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return Conversations(told.get("sources", []), steps)
    return Conversations(
        told.get("sources", []),
        steps,
        [{"part": part} | counts for part, counts in found["parts"].items() if counts.get("rows")],
        bars(found["lengths"]),
        found["packing"],
        found["example"],
    )
