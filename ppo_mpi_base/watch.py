# SPDX-License-Identifier: MIT
"""A watch over the ranks of a host: if one does not come to a collective, it is named and the run ends."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import numpy as np

from ppo_mpi_base.errors import last_words

COLLECTIVES = (
    "sum_",
    "min_",
    "max or min",
    "broadcast_",
    "gather",
    "gather_all",
    "gather_arrays",
    "barrier",
    "raise_together",
)
NUMBERS = {name: float(k) for k, name in enumerate(COLLECTIVES)}
COUNT, NAME, SINCE = range(3)
NOTES = 3
MESSAGE_TIME = 1.0
"""Seconds for the stalled rank to say where it is, before the others end the run."""
SLEPT = 5.0
"""If a look is late by more seconds than this, this process was not running."""
OTHER_HOSTS_TIME = 15.0
"""Seconds that a host with no missing rank gives other hosts to name theirs."""


class Watch:
    """Each rank notes when it enters and leaves a collective, in memory shared by the ranks of its host.

    A thread looks at the notes. It takes no part in the communication, so it sees a stall whatever MPI and the main
    threads do. A rank that waits longer than `limit` names those that have not come, and ends; the launcher ends the
    rest.

    Args:
        notes: (ranks of this host, 3), shared float64: how often each rank entered or left a collective, the index in
            `COLLECTIVES` of the last one entered, and when that was, on the host's clock.
        ranks: the number of each of these ranks in the run.
        own: the index of this rank among them.
        limit: seconds.
    """

    def __init__(self, notes: np.ndarray, ranks: Sequence[int], own: int, limit: float) -> None:
        self._notes, self._ranks, self._own, self._limit = notes, ranks, own, limit
        # `enter` and `leave` write here: they are called for each message, and NumPy takes several times as long.
        self._own_notes, self._count = memoryview(notes[own]).cast("B").cast("d"), 0.0
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the notes' memory may then be freed."""
        self._over.set()
        self._thread.join()

    def enter(self, name: str) -> None:
        """Note that this rank is waiting from now on in a collective, one of `COLLECTIVES`."""
        self._own_notes[NAME], self._own_notes[SINCE] = NUMBERS[name], time.monotonic()
        self._count += 1.0
        self._own_notes[COUNT] = self._count

    def leave(self) -> None:
        """Note that this rank is no longer waiting."""
        self._count += 1.0
        self._own_notes[COUNT] = self._count

    def _look(self) -> None:
        period, told = min(1.0, self._limit / 4), False
        looked = awake_since = time.monotonic()
        while not self._over.wait(period):
            notes, now = self._notes.copy(), time.monotonic()
            if now - looked > period + SLEPT:  # perhaps the whole job was suspended, which is no rank's fault
                awake_since = now
            looked = now
            waited = np.where(notes[:, COUNT] % 2 == 1, now - np.maximum(notes[:, SINCE], awake_since), 0.0)
            elsewhere = (notes[:, COUNT] > notes[self._own, COUNT]) | self._astray(notes)
            missed = np.flatnonzero((waited > self._limit) & elsewhere)
            if len(missed) > 0 and not told:
                told = True
                self._tell_where(notes[missed[0]])
            if waited[self._own] > self._limit:
                self._end(notes, waited[self._own])

    def _astray(self, notes: np.ndarray) -> np.ndarray:
        """Return whether each rank is as far as this one, but in another collective, (ranks,) bool."""
        count, name, _ = notes[self._own]
        return (notes[:, COUNT] == count) & (notes[:, NAME] != name)

    def _tell_where(self, waiting: np.ndarray) -> None:
        """Print, on a rank that others wait for, what it is doing."""
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        name = COLLECTIVES[int(waiting[NAME])]
        last_words(f"rank {self._ranks[self._own]} stalls here, while others wait for it in {name}:\n{stack}")

    def _end(self, notes: np.ndarray, seconds: float) -> None:
        """End this rank, which has waited too long, unless the missing one comes at the last moment."""
        count, name = notes[self._own, COUNT], COLLECTIVES[int(notes[self._own, NAME])]
        astray = self._astray(notes)
        missing = [self._ranks[k] for k in np.flatnonzero((notes[:, COUNT] < count) | astray).tolist()]
        time.sleep(MESSAGE_TIME if missing else OTHER_HOSTS_TIME)
        if self._own_notes[COUNT] != count:
            return
        first = np.flatnonzero(self._notes[:, COUNT] == count)[0]
        if self._own == first:
            who = " and ".join(f"rank {rank}" for rank in missing) or "a rank on another host"
            if astray.any():
                others = ", ".join(sorted({COLLECTIVES[int(k)] for k in notes[astray, NAME]}))
                who += f" (in {others}, as when a hook calls a collective on some ranks only)"
            last_words(
                f"TrainingError: {who} did not reach the collective {name}, in which rank {self._ranks[self._own]} "
                f"has waited for {seconds:.0f} s, more than stall_seconds={self._limit:g}: ending all ranks\n"
            )
            time.sleep(MESSAGE_TIME / 4)  # for the launcher to read it
        else:
            time.sleep(2 * MESSAGE_TIME)
        os._exit(1)
