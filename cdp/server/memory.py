"""Memory that is given back: what the allocator keeps for later is bounded.

Reading an image makes arrays of some megabytes in many threads. By default glibc gives each thread an arena of its own
and learns to keep blocks of up to 32 MiB in them for ever.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
ARENAS_MAX: Final = 2
MMAP_BYTES: Final = 1 << 20
"""Larger blocks are returned to the kernel when they are freed."""
KEPT_BYTES: Final = 8 << 20


def give_memory_back() -> None:
    """Before threads are started. Does nothing where the C library is another one."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
