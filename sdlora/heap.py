"""The process's own memory: what is free goes back to the system, in place of lying between what is used."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE_BYTES = 4 * 2**20


def give_large_blocks_back() -> None:
    """From here on, glibc gives blocks of 4 MiB and more back as soon as they are free; on other systems nothing.

    To be called before torch is imported: glibc by itself learns from the first large block to keep those that follow,
    and what it keeps, it goes on using. Smaller blocks would be too slow to ask for anew (`docs/log.md`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
