# SPDX-License-Identifier: MIT
"""Loads the MPI library: only this module imports mpi4py, which a process without a launcher does not need."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.launchers import SIZELESS, is_child, launched, mark_as_rank


def load_mpi() -> ModuleType | None:
    """Return mpi4py's MPI, initialized, or None for a process that runs alone.

    A process without a launcher never loads MPI: it does not need it, some clusters kill MPI processes on their login
    nodes, and forked environment workers conflict with MPI.

    Raises:
        ConfigurationError: a launcher started several processes, but they cannot be ranks of one run.
    """
    variable, size, _ = launched()
    if is_child() or (size == 1 and variable not in SIZELESS and "mpi4py.MPI" not in sys.modules):
        return None
    # After a few reductions on a host, MPICH would switch to another algorithm, which takes longer and sums three or
    # more ranks in another order: a run resumed from a checkpoint would differ in its last bits.
    os.environ.setdefault("MPIR_CVAR_ALLREDUCE_POSIX_INTRA_ALGORITHM", "mpir")
    several = f"{variable}={os.environ.get(variable)}: the launcher started several processes, but"
    try:
        import mpi4py

        # Initialized below: the library may have to be rejected first, and is faster with one thread at a time.
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigurationError(
            f"{several} mpi4py does not work ({reason}): pip install mpi4py mpich, or load the cluster's MPI module"
        ) from error
    library, version = MPI.get_vendor()
    # Under each other's launcher, one of these libraries ends the process in Init, the other complains at length.
    stranger = {"MPICH": "OMPI_COMM_WORLD_SIZE", "Open MPI": "HYDI_CONTROL_FD"}.get(library)
    foreign = size > 1 and stranger in os.environ
    if not foreign and not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    if foreign or (size > 1 and MPI.COMM_WORLD.size == 1):
        mpiexec = Path(sys.executable).with_name("mpiexec")
        starter = str(mpiexec) if mpiexec.exists() else "the mpiexec of that library"
        if variable.startswith("SLURM"):
            starter = f"srun --mpi=... (srun --mpi=list; MPICH knows pmi2), {starter}"
        raise ConfigurationError(
            f"{several} each finds itself alone in its MPI library, {library} {'.'.join(map(str, version))}: start "
            f"them with {starter}, or unset {variable} for separate runs"
        )
    if MPI.COMM_WORLD.size == 1:
        return None
    mark_as_rank()
    return MPI
