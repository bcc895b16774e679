# SPDX-License-Identifier: MIT
"""The collectives, with which ranks sum and agree, and a stand-in for one rank without MPI."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.failing import MPI, About, meet
from ppo_mpi_base.watch import NOTES, Watch

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Communicator:
    """The ranks of this run, or one rank alone, for which every method is free.

    Attributes:
        rank, size: this rank's number in [0, size), and how many ranks there are.
        is_root: whether this is rank 0, which writes files and prints.
        local_rank, local_size: the same among the ranks on this host.
        local_cores: how many cores the ranks on this host may use together.
    """

    def __init__(self, comm: Intracomm | None = None) -> None:
        """Wrap an mpi4py communicator; None is one rank. Collective: call on all ranks."""
        self._comm = comm
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        cores = own_cores()
        if comm is not None:
            host = comm.Split_type(MPI.COMM_TYPE_SHARED)
            self.rank, self.size, self.local_rank, self.local_size = comm.rank, comm.size, host.rank, host.size
            cores = cores.union(*host.allgather(cores))
            host.Free()
        self.is_root = self.rank == 0
        self.local_cores = len(cores)
        self._watch: Watch | None = None

    def sum_(self, array: np.ndarray) -> None:
        """Replace each element with its sum over ranks, in a contiguous float32, float64 or int64 array of any shape.

        The result is equal to the last bit on all ranks. Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("sum_", self._comm.Allreduce, MPI.IN_PLACE, array, MPI.SUM)

    def mean_(self, array: np.ndarray) -> None:
        """Replace each element with its mean over ranks; floats, else like `sum_`. Collective: call on all ranks.

        Raises:
            ConfigurationError: the array holds integers.
        """
        if array.dtype.kind != "f":  # on one rank too, where nothing else would fail
            raise ConfigurationError(f"mean_: the array must hold floats, not {array.dtype}")
        if self._comm is not None:
            self.sum_(array)
            array /= self.size

    def min_(self, array: np.ndarray) -> None:
        """Replace each element with its minimum over ranks; no NaN allowed, otherwise like `sum_`.

        Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("min_", self._comm.Allreduce, MPI.IN_PLACE, array, MPI.MIN)

    def max(self, value: float) -> float:
        """Return the largest value over ranks, NaN if any is NaN. Collective: call on all ranks."""
        return float(self._gather(value).max())

    def min(self, value: float) -> float:
        """Return the smallest value over ranks, NaN if any is NaN. Collective: call on all ranks."""
        return float(self._gather(value).min())

    def _gather(self, value: float) -> np.ndarray:
        # Gathered, not reduced: with a NaN, MPI's MAX and MIN depend on the order, so ranks could come to differ.
        values = np.full(self.size, value, dtype=np.float64)
        if self._comm is not None:
            self._call("max or min", self._comm.Allgather, MPI.IN_PLACE, values)
        return values

    def broadcast_(self, array: np.ndarray) -> None:
        """Overwrite a contiguous array with rank 0's; shape and dtype must be equal on all ranks.

        Collective: call on all ranks.
        """
        if self._comm is not None:
            self._call("broadcast_", self._comm.Bcast, array)  # from rank 0

    def gather_all(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order; for small Python objects. Collective: call on all ranks."""
        return [value] if self._comm is None else self._call("gather_all", self._comm.allgather, value)

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0; None on the others. Collective: call on all ranks."""
        return [value] if self._comm is None else self._call("gather", self._comm.gather, value)

    def gather_arrays(self, array: np.ndarray) -> np.ndarray:
        """Return every rank's array, (size, *shape), in rank order; shape and dtype must be equal on all ranks.

        Collective: call on all ranks.
        """
        gathered = np.empty((self.size, *array.shape), array.dtype)
        if self._comm is None:
            gathered[0] = array
        else:
            self._call("gather_arrays", self._comm.Allgather, np.ascontiguousarray(array), gathered)
        return gathered

    def split(self, color: int) -> Communicator:
        """Return a new communicator of the ranks that give the same number, in their order.

        A watch covers it too, provided that all ranks make the same calls. Collective: call on all ranks.
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
        """End all ranks, and name the culprit, if one stays away from a collective for `limit` seconds.

        None: wait forever. An exception in the block must end the process. Collective: call on all ranks.
        """
        if self._comm is None or limit is None:
            yield
            return
        host = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        with tempfile.NamedTemporaryFile() as file:  # no MPI window: it would use the communication it watches
            file.write(bytes(NOTES * host.size * np.dtype(np.float64).itemsize))  # now: a full disk is reported here
            file.flush()
            notes = np.memmap(host.bcast(file.name), np.float64, "r+", shape=(host.size, NOTES))
            ranks = host.allgather(self.rank)  # and wait until all have opened the file
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
        """Raise on all ranks the error of the lowest rank that has one; return if none has.

        A ConfigurationError or TrainingError keeps its type and text. Any other becomes a RuntimeError that holds the
        traceback of its rank. All are marked with `error.collective = True`: rank 0 prints them for all, see
        `failing.fail_together`. With one rank, the error itself is raised, unmarked. Collective: call on all ranks.
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


@cache
def world() -> Communicator:
    """Return the communicator of all ranks, always the same one. Collective the first time: call on all ranks."""
    meet(About.COUNTING)
    return Communicator(None if MPI is None else MPI.COMM_WORLD.Dup())


def own_cores() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
