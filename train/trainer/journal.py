"""What happened to a training: when it started, from which step, and how it ended, even if it could not say so."""

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.machine import free_bytes, resident_bytes

SECONDS_BETWEEN_BEATS = 1.0
OUT_OF_MEMORY = "out of memory"
NEARLY_ALL = 0.9  # of the memory in use at the last sign of life: what then dies without a word was short of memory


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
