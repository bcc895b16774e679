# SPDX-License-Identifier: MIT
"""What a launcher (mpiexec, srun) tells the processes that it starts; read without an MPI library."""

from __future__ import annotations

import os

# (number of processes, rank). Slurm's SLURM_NTASKS would be a false alarm, since it is also set in the shells of salloc
# and sbatch; only srun sets the variables of a step. Slurm comes last because mpiexec itself starts its helpers with
# srun, one per host.
_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
SIZELESS = ("PMIX_RANK", "PMI_ID")
"""Variables of launchers that tell a process only its rank."""
_RANK_PROCESS = "PPO_MPI_BASE_RANK_PROCESS"  # set by us to a rank's process id, so that its children know their parent


def launched() -> tuple[str, int, int]:
    """Return what a launcher says: the variable that says it, the number of processes, this process's rank.

    Without a launcher: "", 1 and 0. If the launcher does not give the number, one more than the rank is returned.
    """
    for size, rank in _VARIABLES:
        if os.environ.get(size, "").isdigit():
            return size, int(os.environ[size]), int(os.environ.get(rank, "0"))
    for variable in SIZELESS:
        if os.environ.get(variable, "").isdigit():
            return variable, int(os.environ[variable]) + 1, int(os.environ[variable])
    return "", 1, 0


def mark_as_rank() -> None:
    """Let `is_child` tell this process from its subprocesses."""
    os.environ[_RANK_PROCESS] = str(os.getpid())


def is_child() -> bool:
    """Return whether this is a subprocess of a rank, such as an environment's worker.

    It inherits the launcher's variables but is not a rank: MPI would hang there.
    """
    return os.environ.get(_RANK_PROCESS, str(os.getpid())) != str(os.getpid())
