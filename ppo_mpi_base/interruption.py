# SPDX-License-Identifier: MIT
"""Signals and the time limit: a run asked to stop saves itself and exits with a code that asks for a requeue."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from ppo_mpi_base.errors import last_words

REQUEUE = 75
"""The exit status of an interrupted run that can be continued: EX_TEMPFAIL in sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 1.0
"""Seconds within which a signal counts once: schedulers signal both the ranks and the launcher, which passes it on."""


class Interruption:
    """Notes that a signal came or the time is up, until all ranks can stop together.

    A second signal of the same kind, a second or more later, ends the process at once. So does the deadline, at the
    last checkpoint: a scheduler's patience is short.

    Args:
        max_seconds: end the run after this time; None: never.
        deadline: seconds that the run has from the first signal to its end.
        status: the exit status after them.
    """

    def __init__(self, max_seconds: float | None, deadline: float, status: int = REQUEUE) -> None:
        self._ends_at = None if max_seconds is None else time.monotonic() + max_seconds
        self._deadline, self._status = deadline, status
        self._came: int | None = None
        self._came_at = 0.0
        self._timer: threading.Timer | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        """Listen for signals, which Python can do only in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]  # None: not set by Python
        if self._timer is not None:
            self._timer.cancel()

    @property
    def signalled(self) -> bool:
        """Whether a signal came to this rank."""
        return self._came is not None

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._came is not None or (self._ends_at is not None and time.monotonic() >= self._ends_at)

    @property
    def pressing(self) -> bool:
        """Whether half of the deadline has passed since this rank was asked to stop: skip what can be skipped."""
        asked_at = self._came_at if self._came is not None else self._ends_at
        return asked_at is not None and time.monotonic() - asked_at >= self._deadline / 2

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came == number and time.monotonic() - self._came_at >= SAME_REQUEST:
            last_words(f"second {signal.Signals(number).name}: ending now\n")
            os._exit(128 + number)
        if self._came is None:
            self._came, self._came_at = number, time.monotonic()
            self._timer = threading.Timer(self._deadline, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        last_words(
            f"not finished within {self._deadline:g} s of the signal: ending now, at the last checkpoint if any\n"
        )
        os._exit(self._status)
