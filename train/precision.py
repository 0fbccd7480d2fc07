"""Which number type this machine computes fast: bfloat16 without hardware for it is 10 to 37 times slower."""


def fast_precision() -> str:
    """`bfloat16` where hardware multiplies it (CUDA since Ampere, AMX, AVX512-BF16), else `float32`."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
