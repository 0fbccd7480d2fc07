"""What this machine gives to a command, and bounds of time and memory for code that comes from outside."""

import os
import platform
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> tuple[int, int]:
    """Memory that this process holds now, and the most that it held."""
    try:
        # Not getrusage: Linux counts there what the parent held when it started this process; psutil has no peak.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import psutil

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return psutil.Process().memory_info().rss, most
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return 1024 * int(kilobytes["VmRSS"]), 1024 * int(kilobytes["VmHWM"])


def free_bytes() -> int:
    """Memory that a new process can have without swapping."""
    import psutil

    return max(0, min(psutil.virtual_memory().available, _group_bytes(), _address_bytes()))


def _group_bytes(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process' control groups, as of a container, leave of their limits; unlimited where they set none.

    Pages of files that were read count as used, though the kernel gives them up before it ends a process.
    """
    found = [sys.maxsize]
    for line in _lines(own):
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":
            root, limit, used, reclaimed = mounted, "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):  # version 1
            root, limit, used = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimed = "total_inactive_file "
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):  # no such file, or the word max
                continue
            files = [row for row in _lines(folder / "memory.stat") if row.startswith(reclaimed)]
            found.append(left + sum(int(row.split()[1]) for row in files))
    return min(found)


def _address_bytes() -> int:
    """What `ulimit -v` leaves this process."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    import psutil

    return limit - psutil.Process().memory_info().vms


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def gpus() -> int:
    """NVIDIA GPUs that torch can use."""
    import torch

    return torch.cuda.device_count()


def fast_precision() -> str:
    """`bfloat16` where hardware multiplies it (CUDA since Ampere, AMX, AVX512-BF16), else `float32`.

    bfloat16 without hardware for it is 10 to 37 times slower.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def machine() -> dict[str, Any]:
    """What seconds and bytes were measured on, for a receipt; GPUs only if the command loaded torch anyway."""
    torch = sys.modules.get("torch")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads() if torch else None,  # float sums come out otherwise with another number
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else [],
    }


def _processor() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


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
