# SPDX-License-Identifier: MIT
"""Keep freed memory in the process, for the next array of that size."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's <malloc.h>
LARGEST_KEPT = 2**25
"""Largest array whose memory is kept, in bytes; the most that glibc allows."""
MOST_KEPT = 2**29
"""Largest amount of unused memory that is kept, in bytes."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory that image minibatches free, not return it and get it back page by page for the next.

    The kernel takes longer to provide empty pages than a processor to convolve what they will hold. Other C libraries
    stay as they are, and so does glibc if the user has set one of its `MALLOC_...` variables or `GLIBC_TUNABLES`.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
