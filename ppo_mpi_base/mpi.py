# SPDX-License-Identifier: MIT
"""Ranks that sum, agree and fail together: the only importer of mpi4py, and the stand-in for one rank without it."""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ppo_mpi_base.errors import ConfigurationError, TrainingError, last_words
from ppo_mpi_base.launchers import SIZELESS, is_child, launched, mark_as_rank
from ppo_mpi_base.watch import NOTES, Watch

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_FAILED = 31999  # the tag of the message by which a failing rank tells the higher ones
_SAME_MOMENT = 0.25  # seconds in which ranks count as failing together: longer than an Abort takes to end a rank
_DRAIN = 0.25  # seconds for the launcher to read our last lines, which MPICH's mpiexec else drops at an Abort
_PATIENCE = 5.0  # seconds in which a silent rank expects the Abort of the rank that speaks


class Communicator:
    """The ranks of this run, or one rank alone, for which every method is free.

    Attributes:
        rank, size: this rank's number in [0, size), and how many ranks there are.
        is_root: whether this is rank 0, the one that writes files and speaks.
        local_rank, local_size: the same among the ranks on this host.
        local_cores: how many cores the ranks on this host may use, all of them together.
    """

    def __init__(self, comm: Intracomm | None = None) -> None:
        """Wrap an mpi4py communicator; None is one rank. Collective: call on all ranks."""
        self._comm = comm
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        cores = own_cores()
        if comm is not None:
            host = comm.Split_type(_mpi.COMM_TYPE_SHARED)
            self.rank, self.size, self.local_rank, self.local_size = comm.rank, comm.size, host.rank, host.size
            cores = cores.union(*host.allgather(cores))
            host.Free()
        self.is_root = self.rank == 0
        self.local_cores = len(cores)
        self._watch: Watch | None = None

    def sum_(self, array: np.ndarray) -> None:
        """Replace each element by its sum over ranks; a contiguous float32, float64 or int64 array of any shape.

        The result is the same to the last bit on all ranks. Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("sum_", self._comm.Allreduce, _mpi.IN_PLACE, array, _mpi.SUM)

    def mean_(self, array: np.ndarray) -> None:
        """Replace each element by its mean over ranks; floats, else like `sum_`. Collective: call on all ranks."""
        if self._comm is not None:
            self.sum_(array)
            array /= self.size

    def min_(self, array: np.ndarray) -> None:
        """Replace each element by its minimum over ranks; without NaN, else like `sum_`.

        Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("min_", self._comm.Allreduce, _mpi.IN_PLACE, array, _mpi.MIN)

    def max(self, value: float) -> float:
        """Return the largest value of all ranks, NaN where any is NaN. Collective: call on all ranks."""
        return float(self._gather(value).max())

    def min(self, value: float) -> float:
        """Return the smallest value of all ranks, NaN where any is NaN. Collective: call on all ranks."""
        return float(self._gather(value).min())

    def _gather(self, value: float) -> np.ndarray:
        # Gathered, not reduced: MPI's MAX and MIN of a NaN depend on the order, so ranks could come to differ.
        values = np.full(self.size, value, dtype=np.float64)
        if self._comm is not None:
            self._call("max or min", self._comm.Allgather, _mpi.IN_PLACE, values)
        return values

    def broadcast_(self, array: np.ndarray) -> None:
        """Overwrite a contiguous array, of equal shape and dtype everywhere, by rank 0's.

        Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("broadcast_", self._comm.Bcast, array)  # from rank 0

    def gather_all(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order; for small Python objects. Collective: call on all ranks."""
        return [value] if self._comm is None else self._call("gather_all", self._comm.allgather, value)

    def gather_arrays(self, array: np.ndarray) -> np.ndarray:
        """Return every rank's array, (size, *shape), in rank order; of equal shape and dtype everywhere.

        Collective: call on all ranks.
        """
        gathered = np.empty((self.size, *array.shape), array.dtype)
        if self._comm is None:
            gathered[0] = array
        else:
            self._call("gather_arrays", self._comm.Allgather, np.ascontiguousarray(array), gathered)
        return gathered

    def split(self, color: int) -> Communicator:
        """Return the ranks that give the same number, in their order, as a communicator of their own.

        A watch goes on over it, as far as all ranks make the same calls. Collective: call on all ranks.
        """
        if self._comm is None:
            return self
        part: Any = self._comm.Split(color, self.rank)
        communicator = Communicator(part if part.size > 1 else None)
        communicator._watch = self._watch
        return communicator

    def barrier(self) -> None:
        """Wait until every rank is here. Collective: call on all ranks."""
        if self._comm is not None:
            self._call("barrier", self._comm.Barrier)

    @contextmanager
    def watched(self, limit: float | None) -> Iterator[None]:
        """End all ranks, by name of the culprit, where one stays away from a collective for `limit` seconds.

        None waits for ever. An exception in the block must end the process. Collective: call on all ranks.
        """
        if self._comm is None or limit is None:
            yield
            return
        host = self._comm.Split_type(_mpi.COMM_TYPE_SHARED)
        with tempfile.NamedTemporaryFile() as file:  # no MPI window: that takes part in the communication it watches
            file.write(bytes(NOTES * host.size * np.dtype(np.float64).itemsize))  # now: a full disk is told here
            file.flush()
            notes = np.memmap(host.bcast(file.name), np.float64, "r+", shape=(host.size, NOTES))
            ranks = host.allgather(self.rank)  # and so all have opened the file of the first
        host.Free()
        self._watch = Watch(notes, ranks, ranks.index(self.rank), limit)
        yield
        self._watch.stop()
        self._watch = None

    def _call(self, name: str, collective: Callable[..., Any], *arguments: Any) -> Any:
        if self._watch is None:
            return collective(*arguments)
        self._watch.enter(name)
        result = collective(*arguments)
        self._watch.leave()
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all ranks the error of the lowest rank that has one; return where none has.

        A ConfigurationError or TrainingError keeps its type and text. Any other becomes a RuntimeError that holds the
        traceback of its rank. All are marked by `error.collective = True`: rank 0 prints them for all, see
        `fail_together`. At one rank the error itself is raised, unmarked. Collective: call on all ranks.
        """
        if self._comm is None:
            if error is not None:
                raise error
            return
        kind = next((k for k in (ConfigurationError, TrainingError) if isinstance(error, k)), RuntimeError)
        text = str(error) if kind is not RuntimeError else "".join(traceback.format_exception(error))
        reports = self._call("raise_together", self._comm.allgather, None if error is None else (kind, text))
        failed = next((rank for rank, report in enumerate(reports) if report is not None), None)
        if failed is None:
            return
        kind, text = reports[failed]
        shared: Any = kind(text) if kind is not RuntimeError else kind(f"rank {failed} failed:\n{text}")
        if failed == self.rank and kind is not RuntimeError:
            shared = error  # with its own traceback
        shared.collective = True
        raise shared


class fail_together:  # noqa: N801 (used like a function, as contextlib.suppress is)
    """End all ranks within seconds when one leaves the block by an exception: `with fail_together(communicator):`.

    The failing rank prints its traceback, a ConfigurationError only its one line, and aborts all ranks with a non-zero
    exit status; other threads and waiting ranks do not hold it back. Where ranks fail at the same moment the lowest
    speaks for all, and of a `collective` error (see `Communicator.raise_together`) rank 0. SystemExit and
    KeyboardInterrupt count as failures. At one rank the exception passes untouched.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._together = communicator.size > 1

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._together and error is not None and not is_child():
            _end_all_ranks(error)


@cache
def world() -> Communicator:
    """Return the communicator of all ranks, always the same one. Collective: call on all ranks, the first time."""
    return Communicator(None if _mpi is None else _mpi.COMM_WORLD.Dup())


def own_cores() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _load_mpi() -> ModuleType | None:
    """Return mpi4py's MPI, initialized, or None for a process that runs alone.

    A process without a launcher never loads MPI: it needs none, some clusters kill it on their login nodes, and forked
    environment workers do not get on with it.
    """
    variable, size, _ = launched()
    if is_child() or (size == 1 and variable not in SIZELESS and "mpi4py.MPI" not in sys.modules):
        return None
    # MPICH would change to another algorithm after a few reductions on a host, which adds up three or more ranks
    # in another order, so that a run that goes on from a checkpoint would differ in its last bits; and takes longer.
    os.environ.setdefault("MPIR_CVAR_ALLREDUCE_POSIX_INTRA_ALGORITHM", "mpir")
    several = f"{variable}={os.environ.get(variable)}: the launcher started several processes, but"
    try:
        import mpi4py

        # Initialize below: the library may have to be refused first, and one thread at a time makes it faster.
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigurationError(
            f"{several} mpi4py does not work ({reason}): pip install mpi4py mpich, or load the cluster's MPI module"
        ) from error
    library, version = MPI.get_vendor()
    # Each library under the other one's launcher: the one ends the process in Init, the other complains at length.
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
            f"{several} each is alone in its own library, {library} {'.'.join(map(str, version))}: start them by "
            f"{starter}, or unset {variable} for separate runs"
        )
    if MPI.COMM_WORLD.size == 1:
        return None
    mark_as_rank()
    return MPI


def _end_all_ranks(error: BaseException) -> NoReturn:
    """Print the error, on one rank only if several fail at this moment, and abort all ranks."""
    try:
        _flush_stdout()
        if _speaks(error):
            last_words(_report(error))
            time.sleep(_DRAIN)
        else:
            time.sleep(_PATIENCE)
    finally:
        if _mpi is not None:
            _mpi.COMM_WORLD.Abort(1)
        os._exit(1)  # without MPI: each by itself, the silent ones later lest a launcher ends the one that speaks


def _flush_stdout() -> None:
    with suppress(OSError, ValueError):  # its disk is full, perhaps
        sys.stdout.flush()


def _speaks(error: BaseException) -> bool:
    """Return whether this rank prints the error, waiting a moment for a lower rank that also fails."""
    if _mpi is None:
        return launched()[2] == 0
    comm = _mpi.COMM_WORLD
    if getattr(error, "collective", False):
        return bool(comm.rank == 0)
    for higher in range(comm.rank + 1, comm.size):
        comm.Isend(b"!", higher, _FAILED)  # small enough to leave even if that rank never looks
    end = time.monotonic() + _SAME_MOMENT
    while time.monotonic() < end:
        if comm.Iprobe(tag=_FAILED):
            return False
        time.sleep(0.01)
    return True


def _report(error: BaseException) -> str:
    if isinstance(error, ConfigurationError):
        return f"{type(error).__name__}: {error}\n"
    told = traceback.TracebackException.from_exception(error)
    caller = error.__traceback__.tb_frame.f_back if error.__traceback__ else None
    if caller is not None:  # caught below the user's script: show the way from there too
        told.stack[:0] = traceback.extract_stack(caller)
    *lines, last = told.format()
    speaker = "" if _mpi is None or hasattr(error, "collective") else f"[rank {_mpi.COMM_WORLD.rank}] "
    return "".join(lines) + speaker + last


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_child():
        sys.__excepthook__(kind, error, trace)
    else:
        _end_all_ranks(error)


_exit_status: object = None


def _exit(status: object = None, /) -> NoReturn:
    """Exit like `sys.exit`, but remember the status, which Python shows to no hook."""
    global _exit_status
    _exit_status = status
    raise SystemExit(status)


def forget_exit() -> None:
    """Let a `sys.exit` that the script has caught not count: it goes on."""
    global _exit_status
    _exit_status = None


def _at_exit() -> None:
    """Leave MPI with all ranks, or abort where this one failed past `_excepthook`: by `sys.exit`, or a user's hook.

    Leaving alone would hang, for the others may wait for this rank. A forked child must not even try.
    """
    if is_child() or _mpi.Is_finalized():
        return
    if _exit_status not in (None, 0) or hasattr(sys, "last_value"):
        _flush_stdout()
        time.sleep(_DRAIN)
        _mpi.COMM_WORLD.Abort(_exit_status if isinstance(_exit_status, int) else 1)
    # Wait here, not in Finalize: it spins on a core that rank 0 may still use, and chokes on a failing rank's message.
    everyone = _mpi.COMM_WORLD.Ibarrier()
    while not everyone.Test():
        time.sleep(0.01)
    _mpi.Finalize()


# At import, not at the first use, so that a script that fails before it trains ends all its ranks too.
_mpi: Any = None
try:
    _mpi = _load_mpi()
except ConfigurationError:
    sys.excepthook = _excepthook  # one line, once, instead of every process's traceback
    raise
if _mpi is not None:
    sys.excepthook = _excepthook
    sys.exit = _exit
    vars(builtins).update(exit=_exit, quit=_exit)
    atexit.register(_at_exit)
