"""What this machine gives to a command."""

import os


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
