# SPDX-License-Identifier: MIT
"""Ranks fail together: whatever ends one of them ends all within seconds, and is reported once."""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import time
import traceback
from contextlib import suppress
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ppo_mpi_base.errors import ConfigurationError, last_words
from ppo_mpi_base.launchers import is_child, launched
from ppo_mpi_base.mpi_library import load_mpi

if TYPE_CHECKING:
    from ppo_mpi_base.mpi import Communicator

_FAILED = 31999  # tag of the message with which a failing rank tells the higher ones
_SAME_MOMENT = 0.25  # seconds within which ranks count as failing together: longer than an Abort takes to end a rank
_DRAIN = 0.25  # seconds for the launcher to read our last lines, which MPICH's mpiexec would drop at an Abort
_PATIENCE = 5.0  # seconds that a silent rank waits for the Abort by the rank that prints


class fail_together:  # noqa: N801 (used like a function, as contextlib.suppress is)
    """End all ranks within seconds if one leaves the block with an exception: `with fail_together(communicator):`.

    The failing rank prints its traceback (for a ConfigurationError, only its one line) and aborts all ranks with a
    non-zero exit status; other threads and waiting ranks do not hold it back. If ranks fail at the same moment, the
    lowest prints for all; for a `collective` error (see `Communicator.raise_together`), rank 0 does. SystemExit and
    KeyboardInterrupt count as failures. With one rank, the exception passes unchanged.
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


def _end_all_ranks(error: BaseException) -> NoReturn:
    """Print the error, on only one rank if several fail at this moment, and abort all ranks."""
    try:
        _flush_stdout()
        if _speaks(error):
            last_words(_report(error))
            time.sleep(_DRAIN)
        else:
            time.sleep(_PATIENCE)
    finally:
        if MPI is not None:
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # without MPI, each ends itself; silent ones later, or a launcher might end the printing one


def _flush_stdout() -> None:
    with suppress(OSError, ValueError):  # perhaps its disk is full
        sys.stdout.flush()


def _speaks(error: BaseException) -> bool:
    """Return whether this rank prints the error, after waiting a moment for a lower rank that also fails."""
    if MPI is None:
        return launched()[2] == 0
    comm = MPI.COMM_WORLD
    if getattr(error, "collective", False):
        return bool(comm.rank == 0)
    for higher in range(comm.rank + 1, comm.size):
        comm.Isend(b"!", higher, _FAILED)  # small enough to be sent even if that rank never receives it
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
    if caller is not None:  # caught below the user's script: show the calls from there too
        told.stack[:0] = traceback.extract_stack(caller)
    *lines, last = told.format()
    speaker = "" if MPI is None or hasattr(error, "collective") else f"[rank {MPI.COMM_WORLD.rank}] "
    return "".join(lines) + speaker + last


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_child():
        sys.__excepthook__(kind, error, trace)
    else:
        _end_all_ranks(error)


class About(IntEnum):
    """What a rank is about to do, and cannot do without the others."""

    LEAVING = 0
    COUNTING = 1
    TRAINING = 2
    EVALUATING = 3


_CALLS = {About.COUNTING: "world()", About.TRAINING: "PPO()", About.EVALUATING: "evaluate()"}


def meet(about: About) -> None:
    """Wait until every rank is about to do something, and return if all do the same. Collective: call on all ranks.

    Raises:
        ConfigurationError: another rank is about to do something else, or to leave: this one would wait forever.
    """
    if MPI is not None and not _all_are(about):
        raise ConfigurationError(
            f"{_CALLS[about]} is called on rank {MPI.COMM_WORLD.rank}, but another rank ends, or calls something else: "
            "call it on all ranks, not under `if rank == 0`"
        )


def _all_are(about: About) -> bool:
    extremes = np.array([about, -about])
    everyone = MPI.COMM_WORLD.Iallreduce(MPI.IN_PLACE, extremes, MPI.MIN)
    while not everyone.Test():  # not Wait, which spins on a core that another rank may still need
        time.sleep(0.01)
    return bool(extremes[0] == -extremes[1])


_exit_status: object = None


def _exit(status: object = None, /) -> NoReturn:
    """Exit like `sys.exit`, but remember the status, which Python passes to no hook."""
    global _exit_status
    _exit_status = status
    raise SystemExit(status)


def forget_exit() -> None:
    """Forget a `sys.exit` that the script has caught: the script goes on."""
    global _exit_status
    _exit_status = None


def _at_exit() -> None:
    """Leave MPI with all ranks, or abort if this one failed past `_excepthook`: by `sys.exit`, or with a user's hook.

    Leaving alone would hang, because the others may wait for this rank. A forked child must not even try.
    """
    if is_child() or MPI.Is_finalized():
        return
    if _exit_status not in (None, 0) or hasattr(sys, "last_value"):
        _flush_stdout()
        time.sleep(_DRAIN)
        MPI.COMM_WORLD.Abort(_exit_status if isinstance(_exit_status, int) else 1)
    # Wait here, not in Finalize, which chokes on a failing rank's message.
    while not _all_are(About.LEAVING):
        pass  # another rank was told that this one leaves, and may go on without it
    MPI.Finalize()


# At import, not at first use, so that a script that fails before it trains also ends all its ranks.
MPI: Any = None
try:
    MPI = load_mpi()
except ConfigurationError:
    sys.excepthook = _excepthook  # one line, once, instead of every process's traceback
    raise
if MPI is not None:
    sys.excepthook = _excepthook
    sys.exit = _exit
    vars(builtins).update(exit=_exit, quit=_exit)
    atexit.register(_at_exit)
