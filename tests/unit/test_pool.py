"""All cores work: in order, with few items in memory, and nothing left behind when the parent ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import UserError
from train.pool import AHEAD, ALONE, in_order

REPOSITORY = Path(__file__).parents[2]


def _slow_when_even(offset: int, item: int) -> tuple[int, int]:
    time.sleep(0.02 if item % 2 == 0 else 0)
    return item + offset, os.getpid()


def _fail(offset: int, item: int) -> int:
    if item == 3:
        raise ValueError("three")
    return item


def _die(offset: int, item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    results = list(in_order(_slow_when_even, range(20), 100, workers))
    assert [value for value, _ in results] == list(range(100, 120))
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) if workers == 1 else os.getpid() not in processes
    assert multiprocessing.active_children() == []


def test_a_few_items_start_no_process() -> None:
    assert list(in_order(_slow_when_even, [1], 0, 2)) == [(1, os.getpid())]


def test_items_are_taken_as_results_are_wanted() -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = in_order(_slow_when_even, counted(), 0, 2)
    for _ in range(3):
        next(results)
    results.close()
    assert taken <= 3 + 2 * AHEAD + ALONE
    assert multiprocessing.active_children() == []


def test_what_the_work_raises_comes_through_and_ends_the_workers() -> None:
    with pytest.raises(ValueError, match="three"):
        list(in_order(_fail, range(9), 0, 2))
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed, most likely for want of memory: "):
        list(in_order(_die, range(9), 0, 2))


PARENT = """
import sys, time
from pipeline.command import boundary
from train.pool import in_order

def work(state, item):
    print("ready", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    with boundary():
        list(in_order(work, range(9), None, 2))
"""


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 130), ("SIGKILL", -signal.SIGKILL)])
def test_workers_end_with_their_parent(tmp_path: Path, sent: str, code: int) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    with subprocess.Popen(
        [sys.executable, "parent.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        assert [parent.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.send_signal(getattr(signal, sent))
        assert parent.wait(20) == code
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_worker_whose_start_is_interrupted_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not among the pool's own yet, and would hold its pipe open, for which the end of the pool would wait."""
    began = []

    def interrupted(path: bytes, arguments: list[bytes], descriptors: list[int]) -> int:
        pid = start(path, arguments, descriptors)
        if any(b"spawn_main" in os.fsencode(argument) for argument in arguments):
            began.append(psutil.Process(pid))
            raise KeyboardInterrupt
        return pid

    start = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]
    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:  # its traceback holds what was being started
        list(in_order(_slow_when_even, range(20), 0, 2))
    assert raised.tb and len(began) == 1 and psutil.wait_procs(began, timeout=10)[1] == []
