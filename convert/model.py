"""A model folder in transformers, on the GPU where there is one that holds it."""

from pathlib import Path
from typing import Any

# GPU memory by the weights' bytes on disk: 16-bit files double in float32, a short sequence needs a little more.
ROOM = {"float32": 2.2, "bfloat16": 1.2}


def load(folder: Path, precision: str) -> Any:
    """The causal language model of a Hugging Face folder, in `float32` or `bfloat16`, ready to be asked."""
    import torch
    from transformers import AutoModelForCausalLM

    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM[precision] * weights_bytes
    place = {"device_map": {"": torch.cuda.current_device()}} if fits else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision), **place).eval()
