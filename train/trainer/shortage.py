"""Out of memory: how each library says it."""

import errno

WORDS = ("DefaultCPUAllocator", "out of memory", "not enough memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory was wanted and not there; torch and the system each have words of their own."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)
