# SPDX-License-Identifier: MIT
"""Threads are this rank's share of the cores, for torch, OpenMP and BLAS, and the user's own number wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ppo_mpi_base.threads import DECIDED_BY
from tests.mpi.launch import ROOT, environment, launch

SHOW = """
import numpy, threadpoolctl, torch
from ppo_mpi_base.mpi import world
from ppo_mpi_base.threads import default_threads, share_cores

CHANGE
ranks = world()
parameters = PARAMETERS
share = default_threads(ranks, parameters)
share_cores(ranks, parameters)
pools = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
print(f"{share} {torch.get_num_threads()} {max(pools)}\\n", end="")
"""
LARGE = 1_000_000
CORES = len(os.sched_getaffinity(0))


def shown(change: str = "", parameters: int = LARGE, **variables: str) -> str:
    kept = {name: value for name, value in environment().items() if name not in DECIDED_BY}
    command = [sys.executable, "-c", SHOW.replace("CHANGE", change).replace("PARAMETERS", str(parameters))]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_one_rank_takes_the_cores_that_it_may_use() -> None:
    assert shown() == f"{CORES} {CORES} {CORES}"
    assert shown("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})") == "1 1 1"
    assert shown("import ppo_mpi_base.mpi as m; m.world().local_size = 1000") == "1 1 1"


def test_small_networks_take_one_thread() -> None:
    assert shown(parameters=10_000) == "1 1 1"


@pytest.mark.parametrize("name", DECIDED_BY)
def test_a_variable_of_the_users_wins(name: str) -> None:
    assert shown(**{name: "3"}).startswith("None ")


def test_a_call_of_the_users_wins() -> None:
    assert shown("torch.set_num_threads(3)").startswith("None 3 ")


def test_what_a_former_run_has_set_is_no_call_of_the_users() -> None:
    assert shown("share_cores(world(), 1)") == f"{CORES} {CORES} {CORES}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_cores(ranks: int) -> None:
    done = launch(SHOW.replace("CHANGE", "").replace("PARAMETERS", str(LARGE)), ranks)
    assert done.code == 0, done.stderr
    share = max(1, CORES // ranks)
    assert done.stdout.splitlines() == [f"{share} {share} {share}"] * ranks
