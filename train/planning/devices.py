"""The GPUs that one can rent or buy, with their makers' figures, and what this machine's processor reaches."""

from dataclasses import dataclass

GIB = 2**30
# Spot and on-demand prices of RunPod in USD an hour, as deploybase.ai/articles/runpod-gpu-pricing lists them. From
# elsewhere: mi300x (cliffcenter.com/research/amd-inference-economics, May 2026), rtx-6000-ada (benchmarks of
# AnswerDotAI/fsdp_qlora, 2024), and rtx-3060, t4, a10g, a100-40gb and a6000, which are guesses from lists of 2025.
# No price means that it is bought, not rented. They move: plan.price names your own.
PRICED = "March 2026"


@dataclass(frozen=True)
class Device:
    """Peak of dense matrix products in FLOP/s by precision, memory in bytes."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    watts: int
    price: tuple[float, float]


def _gpu(name: str, gib: float, bf16: float, fp32: float, watts: int, low: float = 0, high: float = 0) -> Device:
    return Device(name, int(gib * GIB), bf16 * 1e12, fp32 * 1e12, watts, (low, high))


# Data sheets of NVIDIA and AMD: dense, float32 accumulation. Memory is what the driver reports, a little below what is
# sold. T4 and V100 multiply float16 but no bfloat16 in hardware, so that they train in float32 here.
DEVICES = {
    device.name: device
    for device in (
        _gpu("rtx-4060", 7.6, 30, 15.1, 115),
        _gpu("rtx-3060", 11.7, 51, 12.7, 170, 0.10, 0.20),
        _gpu("rtx-4070", 11.6, 58, 29.1, 200),
        _gpu("rtx-5070", 11.6, 61, 30.9, 250),
        _gpu("t4", 14.6, 8.1, 8.1, 70, 0.35, 0.55),
        _gpu("rtx-4080", 15.6, 97, 48.7, 320),
        _gpu("rtx-5080", 15.6, 112, 56.3, 360),
        _gpu("rtx-3090", 23.6, 71, 35.6, 350, 0.22, 0.39),
        _gpu("rtx-4090", 23.6, 165, 82.6, 450, 0.34, 0.60),
        _gpu("l4", 22.0, 121, 30.3, 72, 0.44, 0.78),
        _gpu("a10g", 22.0, 70, 31.2, 300, 0.75, 1.21),
        _gpu("rtx-5090", 31.4, 209, 104.8, 575, 0.69, 1.22),
        _gpu("v100-32gb", 31.7, 15.7, 15.7, 300),
        _gpu("a100-40gb", 39.4, 312, 19.5, 400, 1.00, 1.80),
        _gpu("a6000", 47.4, 155, 38.7, 300, 0.33, 0.80),
        _gpu("rtx-6000-ada", 47.4, 364, 91.1, 300, 1.14, 1.60),
        _gpu("l40", 44.4, 181, 90.5, 300, 0.69, 1.22),
        _gpu("l40s", 44.4, 362, 91.6, 350, 0.79, 1.40),
        _gpu("a100-80gb", 79.2, 312, 19.5, 400, 1.39, 2.45),
        _gpu("rtx-pro-6000", 94.9, 503, 125, 600, 0.89, 1.57),
        _gpu("h100-pcie", 79.2, 756, 51, 350, 1.99, 3.51),
        _gpu("h100-80gb", 79.2, 989, 67, 700, 2.69, 4.76),
        _gpu("h200", 139.8, 989, 67, 700, 3.59, 6.35),
        _gpu("mi300x", 191.7, 1307, 163.4, 750, 1.50, 1.99),
        _gpu("b200", 178.0, 2250, 80, 1000, 5.98, 10.57),
    )
}


def like(name: str, memory: int) -> tuple[Device, bool]:
    """The device that a driver calls `name`, else one with as much memory; and whether it is known by its name."""
    words = name.lower().replace("-", " ").split()
    parts = {each: [part for part in each.split("-") if not part.endswith("gb")] for each in DEVICES}
    known = [each for each in DEVICES if all(part in words for part in parts[each])]
    found = max(
        known or DEVICES, key=lambda each: (len(parts[each]) * bool(known), -abs(DEVICES[each].memory - memory))
    )
    return DEVICES[found], bool(known)


def processor_peak(precision: str) -> float:
    """FLOP/s of this machine's free processor in a matrix product of a layer's size, from 0.3 s of its time."""
    import time

    import torch

    size = 1024
    left, right = (torch.ones(size, size, dtype=getattr(torch, precision)) for _ in range(2))
    fastest, left_seconds = float("inf"), 0.3
    while left_seconds > 0:
        start = time.process_time()  # not the clock's: other programs may run
        left @ right
        spent = time.process_time() - start
        fastest, left_seconds = min(fastest, spent), left_seconds - spent
    return 2.0 * size**3 / fastest * torch.get_num_threads()
