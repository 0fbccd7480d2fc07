"""What the processes of one training tell one another; of a single process, what it knows itself."""

import os
from typing import Any

SHARED = ("fsdp", "zero3")  # strategies by which no process has all weights


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """0 for the one that writes."""
    return int(os.environ["RANK"]) if is_launched() else 0


def everyones(*numbers: float) -> list[list[float]]:
    """Of each number, the list of what it is in every process."""
    if not is_launched():
        return [[number] for number in numbers]
    import torch
    from accelerate import PartialState
    from torch import distributed

    own = torch.tensor(numbers, dtype=torch.float64, device=PartialState().device)
    each = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(each, own)
    found: list[list[float]] = torch.stack(each, dim=1).tolist()
    return found


def gathered(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches of all processes; of several, on the processor."""
    if not is_launched():
        return batches
    from accelerate.utils import gather_object, send_to_device

    found: list[dict[str, Any]] = gather_object(send_to_device(batches, "cpu"))
    return found
