# SPDX-License-Identifier: MIT
"""Signals and time limits on one rank: an orderly end, and the ways to end at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.interruption import REQUEUE, SIGNALS, Interruption
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.rollout import Rollout
from ppo_mpi_base.worker import Worker
from tests.mpi.launch import run
from tests.resuming import HALF, WHOLE, N, Signal, T, checkpoint, differences, keywords

ITERATION = T * N


def stopped(directory: Path, **changed: object) -> str | int | None:
    """Train until something ends it; return the exit status that it asks for."""
    with pytest.raises(SystemExit) as ended:
        PPO(**keywords("CartPole", directory, **changed))
    return ended.value.code


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_iteration_with_a_checkpoint(tmp_path, capsys, number):
    former = [signal.getsignal(each) for each in SIGNALS]
    assert stopped(tmp_path, hooks=[Signal(number)], checkpoint_seconds=3600, quiet=False) == REQUEUE == 75
    facts, _ = checkpoint(tmp_path)
    assert facts["total_steps"] == (HALF + 1) * ITERATION
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f'stopped at {(HALF + 1) * ITERATION} steps; resume="auto" continues the run'
    assert [signal.getsignal(each) for each in SIGNALS] == former

    if number != signal.SIGTERM:
        return
    PPO(**keywords("CartPole", tmp_path))
    PPO(**keywords("CartPole", tmp_path / "undisturbed"))
    assert differences(tmp_path, tmp_path / "undisturbed") == []


class Twice(Hooks):
    """Sends two signals of a kind at once, as a scheduler and a launcher together do."""

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        if worker.iteration == HALF:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)


def test_a_signal_that_is_delivered_twice_is_one(tmp_path):
    assert stopped(tmp_path, hooks=[Twice()]) == REQUEUE
    assert checkpoint(tmp_path)[0]["iteration"] == HALF + 1


def test_a_signal_in_the_last_iteration_is_no_interruption(tmp_path):
    assert PPO(**keywords("CartPole", tmp_path, total_steps=(HALF + 1) * ITERATION, hooks=[Signal(signal.SIGTERM)]))


def test_max_seconds_ends_the_run_likewise(tmp_path):
    assert stopped(tmp_path, max_seconds=1e-3, checkpoint_seconds=3600) == REQUEUE
    assert checkpoint(tmp_path)[0]["iteration"] == 1
    assert stopped(tmp_path, max_seconds=1e-3, checkpoint_seconds=3600) == REQUEUE
    assert checkpoint(tmp_path)[0]["iteration"] == 2
    result = PPO(**keywords("CartPole", tmp_path, max_seconds=3600))
    assert result.total_steps == WHOLE * ITERATION


def test_without_a_request_there_is_none():
    with Interruption(None, 30.0) as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.requested


def test_a_request_is_pressing_when_half_of_the_deadline_is_over():
    with Interruption(0.2, 0.8) as limited, Interruption(None, 0.6) as signalled:
        time.sleep(0.3)
        assert limited.requested and not limited.pressing and not signalled.pressing
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signalled.requested and not signalled.pressing
        time.sleep(0.4)
        assert limited.pressing and signalled.pressing


IMPATIENT = """
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.ppo import PPO
from tests.resuming import HALF, checkpoint, keywords

directory = Path(sys.argv[1])
torch.set_num_threads(1)


class Hang(Hooks):
    # An iteration that does not end within any patience.

    def __init__(self, signals):
        self.signals = signals

    def on_rollout(self, worker, rollout):
        if worker.iteration == HALF:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(1.1)
            time.sleep(60)


def ended(run, signals, deadline, **changed):
    process = os.fork()
    if process == 0:
        PPO(**keywords("CartPole", directory / run, hooks=[Hang(signals)], stop_deadline=deadline, **changed))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, bool(changed) or checkpoint(directory / run)[0]["iteration"] == HALF


print(ended("second", [signal.SIGTERM, signal.SIGTERM], 30.0))
print(ended("other kind", [signal.SIGUSR1, signal.SIGTERM], 2.0))
print(ended("deadline", [signal.SIGINT], 0.5))
print(ended("nothing kept", [signal.SIGINT], 0.5, save_location=None, resume=False))
"""


def test_a_second_signal_and_the_deadline_end_it_now_at_the_last_checkpoint(tmp_path):
    finished = run([], IMPATIENT, str(tmp_path))
    assert finished.stdout.splitlines() == [
        f"({128 + signal.SIGTERM}, True)",
        f"({REQUEUE}, True)",
        f"({REQUEUE}, True)",
        "(1, True)",
    ], finished
    assert "second SIGTERM: ending now" in finished.stderr
    assert finished.stderr.count("ending now, at the last checkpoint if any") == 3


LATE = """
import os
import signal
import sys
import threading
from pathlib import Path

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.ppo import PPO
from tests.resuming import HALF, keywords


class Both(Hooks):
    # A signal to this rank, and a while later that of the launcher.

    def on_rollout(self, worker, rollout):
        if worker.iteration == HALF:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            os.kill(os.getpid(), signal.SIGUSR1)


PPO(**keywords("CartPole", Path(sys.argv[1]), hooks=[Both()]))
"""


def test_a_signal_that_comes_again_when_the_run_has_ended_is_the_same_request(tmp_path):
    assert run([], LATE, str(tmp_path)).code == REQUEUE


FULL = """
import sys
import time
from ppo_mpi_base.errors import last_words
from ppo_mpi_base.interruption import Interruption

sys.stderr = open("/dev/full", "w")
sys.stdout = open("/dev/full", "w")
print("what does not fit")
last_words("this neither")
import os, signal
with Interruption(None, 0.2):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""


def test_the_deadline_ends_a_run_that_cannot_say_so():
    assert run([], FULL, timeout=15).code == REQUEUE
