"""The C library's allocator, told to keep the memory that tensors travel through."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_LARGEST_KEPT_BYTES = 32 << 20  # The most that glibc takes: half of the heap of a thread.
_KEPT_BYTES = 256 << 20  # Free at the end of the heap before any of it is given back.
_GROWTH_BYTES = 16 << 20  # A step's chunks on their way, so that the heap grows seldom.


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, rather than give every message's memory back to the kernel.

    A chunk of a tensor is a buffer of 1 MiB that lives for a millisecond. By default glibc takes
    such a buffer from the kernel, which fills it with zeros page by page, and gives it back: that
    costs more than to move the bytes. It concerns the whole process, which keeps up to 256 MiB
    that it does not use.

    Returns:
        Whether it had an effect: not with another C library.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, for one, has none.
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _GROWTH_BYTES),
    )
    return all(mallopt(setting, value) == 1 for setting, value in settings)
