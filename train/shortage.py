"""Out of memory: how each library says it, and which key of the recipe to change to what."""

import errno

from recipe.schema import Train

WORDS = ("DefaultCPUAllocator", "out of memory", "not enough memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC")
LEAST_TOKENS = 256


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory was wanted and not there; torch and the system each have words of their own."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def advice(knobs: Train) -> str:
    """The change that costs least and frees most; the first two learn the same and go on from the last checkpoint."""
    if knobs.rows > 1:
        accumulate = -(-knobs.rows * knobs.accumulate // (knobs.rows // 2))
        return f"set train.rows={knobs.rows // 2} train.accumulate={accumulate}, which learns the same"
    if not knobs.checkpointing:
        return "set train.checkpointing=true, which learns the same, slower"
    if knobs.max_tokens > LEAST_TOKENS:
        return f"set train.max_tokens={max(LEAST_TOKENS, knobs.max_tokens // 2)}, which cuts longer conversations"
    return "set train.tuner=qlora, which holds the base in 4 bits, or choose a smaller base"
