"""Bounds of time and memory for code that comes from outside, as a chat template is."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Let this thread, if it is the main one, which signals reach, take so many seconds of the processor.

    Raises:
        TimeoutError: it took more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"it is not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)  # and again, should something swallow the exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def at_most_more(bytes: int) -> Iterator[None]:
    """Let this process take so many bytes more of memory than it has; a MemoryError says that it wanted more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        wanted = pages * resource.getpagesize() + bytes
        resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
