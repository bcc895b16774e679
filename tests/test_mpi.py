# SPDX-License-Identifier: MIT
"""One rank: the stand-in needs no MPI, and a launcher that cannot work is told from none at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.failing import fail_together
from ppo_mpi_base.mpi import Communicator, world
from tests.mpi.launch import Finished, run

SHOW = (
    "import sys; from ppo_mpi_base.mpi import world; c = world(); print(c.rank, c.size, 'mpi4py.MPI' in sys.modules)\n"
)


def python(text: str, **variables: str) -> Finished:
    """Run a program in a fresh interpreter, with these of a launcher's variables and no others."""
    return run([], text, env=variables)


def test_one_rank_changes_nothing() -> None:
    communicator = Communicator()
    assert (communicator.rank, communicator.size, communicator.is_root) == (0, 1, True)
    assert (communicator.local_rank, communicator.local_size) == (0, 1)
    array = np.array([1.5, np.nan, -2.0])
    for method in (communicator.sum_, communicator.mean_, communicator.min_, communicator.broadcast_):
        method(array)
        np.testing.assert_array_equal(array, [1.5, np.nan, -2.0])
    with pytest.raises(ConfigurationError, match="mean_: the array must hold floats, not int64"):
        communicator.mean_(np.array([1, 2]))
    assert communicator.max(-3.0) == communicator.min(-3.0) == -3.0
    value = object()
    assert communicator.gather_all(value) == communicator.gather(value) == [value]
    communicator.barrier()
    assert world() is world()


def test_one_rank_lets_exceptions_pass_untouched() -> None:
    communicator, error = Communicator(), ConfigurationError("gamma=2: must be in [0, 1]")
    communicator.raise_together(None)
    with pytest.raises(ConfigurationError) as raised, fail_together(communicator):
        communicator.raise_together(error)
    assert raised.value is error
    assert not hasattr(error, "collective")
    for leave in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(leave)) as left, fail_together(communicator):
            raise leave
        assert left.value is leave
    assert sys.excepthook is sys.__excepthook__ or "ppo_mpi_base" not in sys.excepthook.__module__


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        # The shells of `salloc` and `sbatch` for 4 tasks, in which a plain `python` is one rank.
        {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # mpiexec for one process, that Slurm's srun started with one helper on each of two hosts.
        {"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    ],
)
def test_one_process_is_one_rank_and_never_loads_mpi(variables: dict[str, str]) -> None:
    done = python(SHOW, **variables)
    assert (done.code, done.stdout.split(), done.stderr) == (0, ["0", "1", "False"], "")


def test_one_rank_needs_neither_mpi4py_nor_a_library() -> None:
    assert python("import sys; sys.modules['mpi4py'] = None\n" + SHOW).stdout.split() == ["0", "1", "False"]
    assert python(SHOW, MPI4PY_LIBMPI="/nowhere/libmpi.so").stdout.split() == ["0", "1", "False"]


@pytest.mark.parametrize(
    ("lacking", "variables"),
    [
        ("mpi4py", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}),
        ("mpi4py", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}),
        ("mpi4py", {"PMIX_RANK": "0"}),
        ("library", {"PMI_SIZE": "4", "PMI_RANK": "0"}),
        ("library", {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0"}),
    ],
)
def test_several_processes_without_mpi_stop_with_one_line(lacking: str, variables: dict[str, str]) -> None:
    if lacking == "mpi4py":
        done = python("import sys; sys.modules['mpi4py'] = None\n" + SHOW, **variables)
    else:
        pytest.importorskip("mpi4py")
        done = python(SHOW, MPI4PY_LIBMPI="/nowhere/libmpi.so", **variables)
    assert done.code == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    name, value = next(iter(variables.items()))
    assert line.startswith(f"ConfigurationError: {name}={value}: ")
    assert "pip install mpi4py mpich" in line


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},  # srun without MPI support
        {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},  # Open MPI's mpiexec
    ],
)
def test_the_launcher_of_another_mpi_stops_with_one_line(variables: dict[str, str]) -> None:
    if not Path(sys.executable).with_name("mpichversion").exists():
        pytest.skip("for MPICH's library: pip install mpich mpi4py")
    done = python(SHOW, **variables)
    assert done.code == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    name = next(iter(variables))
    assert line.startswith(f"ConfigurationError: {name}=4: ")
    of_slurm = "srun --mpi=... (srun --mpi=list; MPICH knows pmi2), " if name.startswith("SLURM") else ""
    assert f"start them with {of_slurm}{Path(sys.executable).with_name('mpiexec')}, or unset {name}" in line
