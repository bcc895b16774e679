# SPDX-License-Identifier: MIT
"""How many threads a rank computes with: its share of the host's cores."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path

import threadpoolctl
import torch

from ppo_mpi_base.mpi import Communicator, own_cores

DECIDED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WORTHWHILE_PARAMETERS = 200_000
"""Below, an operation takes less time than starting and stopping threads, which spin in vain beside other jobs."""
_decided = torch.get_num_threads()  # any other number, later, is the user's choice


def default_threads(ranks: Communicator, parameters: int) -> int | None:
    """Return how many threads this rank should compute with: its share of the host's cores, or 1 for small networks.

    None if the user decided, with one of the variables `DECIDED_BY` or with `torch.set_num_threads`.
    """
    if any(name in os.environ for name in DECIDED_BY) or torch.get_num_threads() != _decided:
        return None
    if parameters < WORTHWHILE_PARAMETERS:
        return 1
    return core_share(ranks)


def core_share(ranks: Communicator) -> int:
    """Return this rank's share of the host's cores, at least 1."""
    share = ranks.local_cores // ranks.local_size
    return max(1, min(share, len(own_cores())))  # a rank bound to fewer cores cannot use its share


def blas_code() -> str:
    """Return what determines the last bits of NumPy's products: BLAS library, its code path, threads, processor."""
    found = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    code = sorted(f"{x['internal_api']} {x['version']} {x.get('architecture')} {x['num_threads']}" for x in found)
    return f"{code} {processor()}"


@functools.cache
def processor() -> str:
    """Return this host's kind of processor, which affects last bits; "" if unknown.

    With family and model numbers: on a virtual machine, the name may be no more than "AMD EPYC".
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in found:
            numbers = (f"{name} {found[name]}" for name in ("cpu family", "model") if name in found)
            return ", ".join([found["model name"], *numbers])
    return platform.processor()


def share_cores(ranks: Communicator, parameters: int) -> None:
    """Limit torch, OpenMP and BLAS to what `default_threads` returns; otherwise ranks would slow each other down."""
    global _decided
    if (threads := default_threads(ranks, parameters)) is not None:
        _decided = threads  # a second run in this process must not take it for the user's
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)
