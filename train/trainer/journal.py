"""What happened to a training: from which step it started, whether it went astray, how it ended, and what to change."""

import errno
import json
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.error import Stopped
from pipeline.machine import free_bytes, resident_bytes
from pipeline.units import size
from train.planning.prediction import advice
from train.trainer.checkpoints import set_aside_from, step_of

SECONDS_BETWEEN_BEATS = 1.0
OUT_OF_MEMORY = "out of memory"
NEARLY_ALL = 0.9  # of the memory in use at the last sign of life: what then dies without a word was short of memory
SOURCES_SHOWN = 10
SMALLER = 3  # a learning rate that diverges is mostly some times too large
SHORTAGE_WORDS = (
    "DefaultCPUAllocator",
    "out of memory",
    "not enough memory",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC",
)
WINDOW_STEPS = 64
FEWEST_STEPS = 10  # fewer say nothing of how much the loss of a batch varies
STEPS_ABOVE = 8  # a hard batch is one step, a spike from which a training recovers some
DEVIATIONS = 8
LEAST_RISE = 1.0  # nats a token: what varies less than this is no divergence, however steady it was before
SECONDS_TO_SEARCH = 60.0  # for the conversations of a batch, among millions
OF_NORMAL = 1.4826  # the median absolute deviation of a normal distribution is its deviation divided by this

log = logging.getLogger("truetune")


class Journal:
    """A line in `journal.jsonl` for each start and each end; a start without an end was killed."""

    def __init__(self, folder: Path) -> None:
        self.path, self.beats = folder / "journal.jsonl", folder / "heartbeat.json"
        self.step, self.last_beat = 0, 0.0

    def start(self, step: int) -> str | None:
        """Note a start from this step; why the training before it ended without a word, if it did."""
        events = self.events()
        why = None
        if events and events[-1]["event"] == "start":
            why = self._silent_end(events[-1])
            self._note("killed", step=self._beat().get("step", events[-1]["step"]), why=why)
        self.beats.unlink(missing_ok=True)
        self.step = step
        self._note("start", step=step, boot=_boot(), out_of_memory_kills=_out_of_memory_kills())
        return why

    def end(self, event: str) -> None:
        """Note how it ended: `finished`, a signal's name, or the problem in a word."""
        with suppress(OSError):  # a full disk is told by what it stopped
            self._note(event, step=self.step)

    def events(self) -> list[dict[str, Any]]:
        """All lines that are whole: a loss of power may have cut the last."""
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def began(self) -> str:
        """When the training first started, as a name for its logs: 20260131-235959, in UTC."""
        return datetime.fromisoformat(self.events()[0]["at"]).strftime("%Y%m%d-%H%M%S")

    def interruptions(self) -> list[dict[str, Any]]:
        """`{"step", "why"}` of each end before the last start."""
        ends = [event for event in self.events() if event["event"] not in ("start", "finished")]
        return [{"step": event["step"], "why": event.get("why", event["event"])} for event in ends]

    def beat(self, step: int) -> None:
        """A sign of life, each second at most; not synced to the disk, since a kill leaves what was written."""
        self.step = step
        if time.monotonic() - self.last_beat < SECONDS_BETWEEN_BEATS:
            return
        self.last_beat = time.monotonic()
        memory = {"resident_bytes": resident_bytes()[0], "free_bytes": free_bytes()}
        with suppress(OSError):
            self.beats.write_text(json.dumps({"step": step} | memory), encoding="utf-8")

    def _beat(self) -> dict[str, Any]:
        try:
            loaded = json.loads(self.beats.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _silent_end(self, start: dict[str, Any]) -> str:
        beat = self._beat()
        resident, free = beat.get("resident_bytes", 0), beat.get("free_bytes", 1)
        if start.get("boot") != _boot():
            return "the machine was restarted"
        if _out_of_memory_kills() > start.get("out_of_memory_kills", 0) or resident > NEARLY_ALL * (resident + free):
            return OUT_OF_MEMORY
        return "it was killed"

    def _note(self, event: str, **more: Any) -> None:
        line = {"event": event, "at": datetime.now(UTC).isoformat(timespec="seconds")} | more
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def recorded(recipe: Recipe, run: Run, resume_from: Path | None) -> Iterator[Journal]:
    """Keep the journal of a training, and turn what ends it into a UserError that says what to do."""
    journal = Journal(run.path("checkpoints"))
    if died := journal.start(step_of(resume_from) if resume_from else 0):
        change = f": {advice(recipe, run)}, or it may happen again" if died == OUT_OF_MEMORY else ""
        log.warning("the last training ended without a word, %s%s", died, change)
    try:
        yield journal
    except Stopped as stopped:
        journal.end(signal.Signals(stopped.code - 128).name)
        raise
    except Diverged as diverged:
        journal.end("diverged")
        raise _astray(diverged, recipe, run) from None
    except BaseException as error:
        if not is_shortage(error):
            journal.end(type(error).__name__)
            raise
        journal.end(OUT_OF_MEMORY)
        raise shortage(recipe, run) from None
    journal.end("finished")


def shortage(recipe: Recipe, run: Run) -> UserError:
    """What to change when memory did not suffice."""
    held = f"{size(resident_bytes()[0])} held, {size(free_bytes())} free"
    return UserError(f"out of memory while training ({held}): {advice(recipe, run)}, and run again")


def _astray(diverged: "Diverged", recipe: Recipe, run: Run) -> UserError:
    """The step, its measures and its conversations; checkpoints that were written astray are set aside."""
    from transformers import AutoTokenizer

    from pipeline.rows import rows
    from train.tokens import examples_of

    good = set_aside_from(run.path("checkpoints"), diverged.first)
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))

    def ids_of(row: dict[str, object]) -> list[list[int]]:
        return [ids for example in examples_of(recipe, tokenizer, row) for _, ids, _ in example.sides]

    places = sources(diverged.batches, rows(run.path("data"), "train"), ids_of)
    more = f" and {len(places) - SOURCES_SHOWN} more" if len(places) > SOURCES_SHOWN else ""
    read = f"its conversations are {', '.join(places[:SOURCES_SHOWN])}{more}" if places else "its batch was not found"
    measures = f"loss {diverged.loss:.4g}, gradient norm {diverged.gradient:.4g}, learning rate {diverged.rate:.2g}"
    kept = f"{good} is the last good checkpoint" if good else "there is no checkpoint before it"
    lower = f"set train.learning_rate={recipe.train.learning_rate / SMALLER:.1g} or lower"
    return UserError(
        f"the training diverged at step {diverged.step}: {diverged.why} ({measures}; {kept}): {lower}, look at the "
        "conversations of that step, or continue regardless with train.stop_on_divergence=false",
        f"step {diverged.step}: {read}",
    )


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory was wanted and not there; torch and the system each have words of their own."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in SHORTAGE_WORDS)


def _boot() -> str:
    """Linux's name of this start of the machine; the same everywhere else."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _out_of_memory_kills() -> int:
    """Processes that the kernel ended for want of memory since the machine started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class Diverged(Exception):
    """`step` showed it, `first` was the first to be astray; `batches` are the rows of `step`."""

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
        """The losses of the steps before the checkpoint that training resumes from."""
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
    """Token ids of each conversation in a batch; each starts at position 0 of packed rows, and of others ends with its
    mask."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [tuple(ids[:length]) for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    ids, positions = batch["input_ids"].flatten().tolist(), batch["position_ids"].flatten().tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [tuple(ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
