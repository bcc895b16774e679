# SPDX-License-Identifier: MIT
"""Memory that is freed stays with the process, for the next array of that size."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
LARGEST_KEPT = 2**25
"""Bytes of an array whose memory is kept; the most that glibc allows."""
MOST_KEPT = 2**29
"""Bytes that may lie unused."""


def keep_freed_memory() -> None:
    """Let glibc keep what minibatches of images free, rather than give it back and get it page by page for the next.

    The kernel takes longer to hand out empty pages than a processor to convolve what they will hold. Other C libraries
    stay as they are, and so does glibc where the user set one of its `MALLOC_...` variables or `GLIBC_TUNABLES`.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
