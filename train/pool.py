"""Work on all cores: results in the order of the items, few of them in memory, no process left behind.

Processes are started afresh (`spawn`), since a fork of a process with threads may hang.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain, islice
from typing import Any, TypeVar

import psutil

from pipeline import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")
AHEAD = 2  # items under way a worker, so that none waits while the parent writes
ALONE = 4  # so many items are done before the first worker has started

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a core each

_state: Any = None


def in_order(
    work: Callable[[State, Item], Result], items: Iterable[Item], state: State, workers: int
) -> Iterator[Result]:
    """`work(state, item)` of every item; the `state` is sent to each worker once.

    A few items are worked on in this process. `work` must be importable by name.

    Raises:
        UserError: a worker was killed, most likely for want of memory. What `work` raises comes through.
    """
    items = iter(items)
    first = list(islice(items, ALONE + 1))
    if workers == 1 or len(first) <= ALONE:
        for item in chain(first, items):
            yield work(state, item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(pickle.dumps(state),))
    others = set(psutil.Process().children())
    waiting: deque[Future[Result]] = deque()
    try:
        for item in chain(first, items):
            waiting.append(pool.submit(_call, work, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for want of memory: free some, or let fewer cores work "
            "(taskset -c 0 make ...)"
        ) from None
    finally:
        # Also one whose start was interrupted, which the pool does not know: it would hold the pool's pipe open.
        for process in set(psutil.Process().children()) - others:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin(pickled: bytes) -> None:
    """Let the parent alone answer Ctrl-C, and end with it, however it ends."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= ONE_THREAD
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = pickle.loads(pickled)  # only now: what it imports looks at the environment


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _call(work: Callable[[Any, Item], Result], item: Item) -> Result:
    return work(_state, item)
