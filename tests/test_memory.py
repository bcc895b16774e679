# SPDX-License-Identifier: MIT
"""Freed memory stays with the process: counted by the kernel, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ALLOCATES = """
import resource, sys
import torch
from ppo_mpi_base.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def use():
    for n in (2**22, 2**21):  # of different sizes, as what layers give
        torch.full([n], 1.0)
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ALLOCATES, *arguments]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_used_again() -> None:
    assert 3 * faults("keep") < faults()


def test_the_users_own_setting_wins() -> None:
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="65536") > 8 * (2**24 // os.sysconf("SC_PAGE_SIZE"))
