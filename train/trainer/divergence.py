"""When a training has gone astray: a loss or gradient that is no number, or a loss that stays far above what it was."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

WINDOW_STEPS = 64
FEWEST_STEPS = 10  # fewer say nothing of how much the loss of a batch varies
STEPS_ABOVE = 8  # a hard batch is one step, a spike from which a training recovers some
DEVIATIONS = 8
LEAST_RISE = 1.0  # nats a token: what varies less than this is no divergence, however steady it was before
SECONDS_TO_SEARCH = 60.0  # for the conversations of a batch, among millions
OF_NORMAL = 1.4826  # the median absolute deviation of a normal distribution is its deviation divided by this


class Diverged(Exception):
    """`step` showed it, `first` was the first to be astray; `batches` are the packed rows of `step`."""

    def __init__(
        self, step: int, first: int, why: str, loss: float, gradient: float, rate: float, batches: list[Any]
    ) -> None:
        super().__init__(why)
        self.step, self.first, self.why = step, first, why
        self.loss, self.gradient, self.rate, self.batches = loss, gradient, rate, batches


class Watch:
    """Told each step's loss and gradient norm; `base_loss` is the model's before training, in nats a token.

    A loss is far off when it is DEVIATIONS above the median of the last WINDOW_STEPS, in units of their median absolute
    deviation, or as far above what the base itself had: STEPS_ABOVE such losses in a row are a divergence. Losses that
    are far off do not enter the window, so that it cannot get used to them.
    """

    def __init__(self, base_loss: float | None = None) -> None:
        self.base_loss = base_loss
        self.usual: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.above = 0

    def learn(self, losses: Iterable[float]) -> None:
        """The losses of the steps before the checkpoint that training goes on from."""
        for loss in losses:
            self.see(loss, 0.0)

    def see(self, loss: float, gradient: float) -> str | None:
        """What is wrong after this step, None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient):
            return f"the gradient's norm is {gradient}"
        limit = self.limit()
        if loss <= limit:
            self.usual.append(loss)
            self.above = 0
            return None
        self.above += 1
        if self.above < STEPS_ABOVE:
            return None
        return f"the loss was above {limit:.2f} in each of the last {self.above} steps, {self._before()}"

    def limit(self) -> float:
        """The highest loss that is not far off."""
        limits = [math.inf]
        if self.base_loss is not None:
            limits.append(self.base_loss + max(LEAST_RISE, self.base_loss / 2))
        if len(self.usual) >= FEWEST_STEPS:
            middle = median(self.usual)
            spread = OF_NORMAL * median(abs(loss - middle) for loss in self.usual)
            limits.append(middle + max(LEAST_RISE, DEVIATIONS * spread))
        return min(limits)

    def _before(self) -> str:
        if len(self.usual) >= FEWEST_STEPS:
            return f"its median was {median(self.usual):.2f} before"
        return f"the base's was {self.base_loss:.2f}"


def sources(
    batches: list[dict[str, Any]], rows: Iterable[dict[str, Any]], ids_of: Callable[[dict[str, Any]], list[list[int]]]
) -> list[str]:
    """File and line of each conversation in these batches, found by its token ids: packing keeps no other trace."""
    wanted = {ids for batch in batches for ids in conversations(batch)}
    found, until = [], time.monotonic() + SECONDS_TO_SEARCH
    for row in rows:
        if wanted.intersection(tuple(ids) for ids in ids_of(row)):
            found.append(str(row["source"]))
        if time.monotonic() > until:
            break
    return found


def conversations(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """Token ids of each conversation in a batch of packed rows; each starts at position 0."""
    ids, positions = batch["input_ids"].flatten().tolist(), batch["position_ids"].flatten().tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [tuple(ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
