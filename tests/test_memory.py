# SPDX-License-Identifier: MIT
"""Freed memory stays with the process: what glibc says, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")

ALLOCATES = """
import ctypes, sys
import torch
from ppo_mpi_base.memory import keep_freed_memory

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
if "keep" in sys.argv:
    keep_freed_memory()
layers = [torch.full([7 * 2**20], 1.0) for _ in range(4)]  # 28 MiB each
from_kernel = mallinfo2().hblkhd  # what goes back to the kernel when it is freed
del layers
print(from_kernel // 2**20, mallinfo2().fordblks // 2**20)
"""


def asked_for_and_kept(*arguments: str, **variables: str) -> list[int]:
    """Return the MiB that glibc asked of the kernel for single arrays, and those that it kept of freed ones."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ALLOCATES, *arguments]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_freed_memory_is_kept() -> None:
    asked, kept = asked_for_and_kept("keep")
    assert asked < 28 and kept >= 4 * 28
    asked, kept = asked_for_and_kept()
    assert asked >= 4 * 28 and kept < 28


@pytest.mark.parametrize("setting", [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_the_users_own_setting_wins(setting: dict[str, str]) -> None:
    asked, kept = asked_for_and_kept("keep", **setting)
    assert asked >= 4 * 28 and kept < 28
