"""What this machine gives to a command."""

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else [],
    }


def _processor() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()
