# SPDX-License-Identifier: MIT
"""The threads that a rank computes with: its share of the host's cores."""

from __future__ import annotations

import os

import threadpoolctl
import torch

from ppo_mpi_base.mpi import Communicator, own_cores

DECIDED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_AT_IMPORT = torch.get_num_threads()


def default_threads(ranks: Communicator) -> int | None:
    """Return how many threads this rank should compute with: its share of the host's cores, at least 1.

    None where the user decided, by one of the variables `DECIDED_BY` or by `torch.set_num_threads`.
    """
    if any(name in os.environ for name in DECIDED_BY) or torch.get_num_threads() != _AT_IMPORT:
        return None
    share = ranks.local_cores // ranks.local_size
    return max(1, min(share, len(own_cores())))  # a rank that is bound to few cores cannot use its share


def share_cores(ranks: Communicator) -> None:
    """Let torch, OpenMP and BLAS use no more threads than `default_threads` says; else ranks slow each other down."""
    if (threads := default_threads(ranks)) is not None:
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)
