"""What glibc does with memory that was freed: keep it for the next batch, or give it to others.

By itself it unmaps blocks of 128 KB to 32 MB, or trims the heap, after batch and batch, and the system
fills the same pages with zeros again: up to 45% of what predicting takes.
"""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h; blocks of up to 32 MiB (the most that glibc takes) come from the heap, of which 256 MiB stay.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
HEAP_KEPT, LARGEST_IN_HEAP = 256 << 20, 32 << 20
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed() -> None:
    """Let this process keep what it frees, for as long as it lives; nothing where there is no glibc.

    Whoever has set glibc's own variables in the environment is left alone.
    """
    libc = _glibc()
    if libc is not None and not any(name in os.environ for name in _SET_BY_USER):
        libc.mallopt(_TRIM_THRESHOLD, HEAP_KEPT)
        libc.mallopt(_MMAP_THRESHOLD, LARGEST_IN_HEAP)


def give_back_freed() -> None:
    """Give what this process has freed to others, before it waits (0.5 to 15 ms)."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
