"""The C library's allocator, told to keep the memory that tensors travel through."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_LARGEST_KEPT_BYTES = 32 << 20  # The most that glibc takes: half of the heap of a thread.
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0

KEPT_BYTES = 256 << 20
"""What the allocator keeps of what was freed: some steps of a large model, on their way."""
_GROWTH_BYTES = 16 << 20  # A step's chunks on their way, so that the heap grows seldom.


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, rather than give every message's memory back to the kernel.

    A chunk of a tensor is a buffer of 1 MiB that lives for a millisecond. By default glibc takes
    such a buffer from the kernel, which fills it with zeros page by page, and gives it back: that
    costs more than to move the bytes. It concerns the whole process, which keeps up to
    ``KEPT_BYTES`` that it does not use at the end of each of its heaps; see Kept for the rest.

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
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, _GROWTH_BYTES),
    )
    return all(mallopt(setting, value) == 1 for setting, value in settings)


def bytes_in_use() -> int:
    """Return how much the process has of the allocator; 0 if it does not say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2  # Since glibc 2.33.
    except (AttributeError, OSError):
        return 0
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


class Kept:
    """What the process keeps of the memory that was freed, between what is in use.

    glibc gives back by itself only what lies at the end of a heap: one tensor that lives on holds
    everything below it.
    """

    def __init__(self) -> None:
        """Take what is resident and not in use now for what is not the allocator's."""
        self._apart_bytes = 0
        self._apart_bytes = self.count_bytes()

    def count_bytes(self) -> int:
        """Return how much it is; 0 with another C library."""
        used = bytes_in_use()
        return _anonymous_bytes() - used - self._apart_bytes if used else 0

    def give_back(self) -> None:
        """Give it back to the kernel. What it cannot give back is not the allocator's."""
        ctypes.CDLL(None).malloc_trim(0)
        self._apart_bytes += self.count_bytes()


def _anonymous_bytes() -> int:
    """Return how much memory is resident that is of no file, and shared with nobody."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text("ascii").split())
    return (resident - shared) * _PAGE_BYTES
