# SPDX-License-Identifier: MIT
"""Several ranks: what they sum and agree on, and that all of them end when one fails, whatever the others do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mpi.launch import launch

SOON = 30  # seconds: it takes one, but the machine may be busy

COLLECTIVES = """
import os
import sys
import time

import numpy as np

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.failing import fail_together
from ppo_mpi_base.mpi import world
from ppo_mpi_base.threads import default_threads

communicator = world()
rank, size = communicator.rank, communicator.size
ranks = range(size)
assert size == int(sys.argv[1]) and communicator.is_root == (rank == 0) and world() is communicator
assert (communicator.local_rank, communicator.local_size) == (rank, size)
cores = os.sched_getaffinity(0)
assert communicator.local_cores == len(cores)
assert default_threads(communicator, 10**6) == max(1, len(cores) // size)


def data(dtype, of):  # every rank can make every rank's array
    return (1e3 * np.random.default_rng(of).standard_normal((3, 5_001))).astype(dtype)


for dtype in (np.float32, np.float64, np.int64):
    everyone = np.stack([data(dtype, of) for of in ranks])
    array = data(dtype, rank)
    view = array[1:]
    communicator.sum_(view)
    np.testing.assert_allclose(view, everyone[:, 1:].sum(0), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(array[0], everyone[rank, 0])
    assert len(set(communicator.gather_all(array[1:].tobytes()))) == 1, "ranks differ in a bit"
    array = data(dtype, rank)
    communicator.min_(array)
    np.testing.assert_array_equal(array, everyone.min(0))
    array = data(dtype, rank)
    communicator.broadcast_(array)
    np.testing.assert_array_equal(array, everyone[0])
array = data(np.float32, rank)
communicator.mean_(array)
np.testing.assert_allclose(array, np.mean([data(np.float32, of) for of in ranks], axis=0), rtol=1e-5, atol=1e-3)

values = [(-1.0) ** of * of for of in ranks]
assert communicator.max(values[rank]) == max(values) and communicator.min(values[rank]) == min(values)
for culprit in ranks:
    value = np.nan if rank == culprit else values[rank]
    assert np.isnan(communicator.max(value)) and np.isnan(communicator.min(value))
assert communicator.gather_all({"rank": rank}) == [{"rank": of} for of in ranks]
assert communicator.gather({"rank": rank}) == (None if rank else [{"rank": of} for of in ranks])

start = time.monotonic()
if rank == size - 1:
    time.sleep(0.3)
communicator.barrier()
assert time.monotonic() - start > 0.25

communicator.raise_together(None)
if size > 1:
    for kind, shared_kind in ((ConfigurationError, ConfigurationError), (TrainingError, TrainingError),
                              (KeyError, RuntimeError)):
        error = kind(f"by {rank}") if rank > 0 else None
        try:
            communicator.raise_together(error)
        except Exception as shared:
            assert type(shared) is shared_kind and shared.collective
            assert "by 1" in str(shared) and "by 2" not in str(shared)
        else:
            raise AssertionError("nothing raised")
else:
    assert "mpi4py.MPI" not in sys.modules
print("good\\n", end="")
"""

START = """
import sys
import threading
import time

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.failing import fail_together
from ppo_mpi_base.mpi import world

communicator = world()
rank = communicator.rank


def wait():  # in a collective, which nothing but the end of the process ends
    communicator.barrier()
    time.sleep(100)


def fail(text="boom"):
    raise ValueError(text)


"""


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_collectives(ranks: int) -> None:
    done = launch(COLLECTIVES, ranks, str(ranks))
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["good"] * ranks
    assert done.stderr == ""


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("if rank == 2: fail()\nwait()", id="the others in a collective"),
        pytest.param("if rank == 2: fail()\ntime.sleep(100)", id="the others asleep"),
        # Rank 3 leaves after rank 2's message to it has come in, which MPI_Finalize does not forgive.
        pytest.param(
            "from mpi4py import MPI\nif rank == 2: fail()\ntime.sleep(0.2)\nMPI.COMM_WORLD.Iprobe(tag=1)",
            id="the others done meanwhile",
        ),
        pytest.param(
            "threading.Thread(target=time.sleep, args=(100,)).start()\nif rank == 2: fail()\nwait()", id="a live thread"
        ),
        pytest.param(
            "def train():\n"
            "    with fail_together(communicator):\n"
            "        threading.Thread(target=time.sleep, args=(100,)).start()\n"
            "        if rank == 2: fail()\n"
            "        wait()\n"
            "try:\n    train()\nfinally:\n    wait()",
            id="in a block, under a finally",
        ),
        pytest.param("sys.excepthook = sys.__excepthook__\nif rank == 2: fail()\nwait()", id="under another hook"),
    ],
)
def test_a_failing_rank_ends_all(body: str) -> None:
    done = launch(START + body, 4)
    assert done.code != 0
    assert done.seconds < SOON
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count("raise ValueError(text)\n") == 1
    assert done.stderr.count("ValueError: boom\n") == 1
    assert "in <module>" in done.stderr, "the traceback does not start in the script"
    if "__excepthook__" not in body:
        assert "[rank 2] ValueError: boom\n" in done.stderr


def test_a_failure_before_the_first_use_ends_all() -> None:
    script = (
        "import time, ppo_mpi_base.mpi\nfrom mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank == 1: raise OSError('no file')\ntime.sleep(100)"
    )
    done = launch(script, 2)
    assert done.code != 0
    assert done.seconds < SOON
    assert done.stderr.count("[rank 1] OSError: no file\n") == done.stderr.count("Traceback") == 1


def test_ranks_that_fail_at_the_same_moment_speak_once() -> None:
    done = launch(START + "with fail_together(communicator):\n    if rank > 0: fail(f'from {rank}')\n    wait()", 4)
    assert done.code != 0
    assert done.seconds < SOON
    assert done.stderr.count("Traceback") == done.stderr.count("ValueError: from") == 1
    assert "[rank 1] ValueError: from 1\n" in done.stderr
    done = launch(START + "with fail_together(communicator):\n    raise ConfigurationError('lam=2: too large')", 4)
    assert done.code != 0
    assert done.stderr.splitlines()[0] == "ConfigurationError: lam=2: too large"
    assert done.stderr.count("lam=2") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("guarded", [True, False])
def test_an_error_raised_together_is_told_by_rank_0(guarded: bool) -> None:
    begin = START + ("with fail_together(communicator):\n" if guarded else "if True:\n")
    body = (
        "    try:\n"
        "        communicator.raise_together(ConfigurationError(f'on {rank}') if rank > 1 else None)\n"
        "    except ConfigurationError:\n"
        "        time.sleep(1.0 if rank == 0 else 0.0)  # the others wait for it\n"
        "        raise"
    )
    done = launch(begin + body, 4)
    assert done.code != 0
    assert done.seconds < SOON
    assert done.stderr.splitlines()[0] == "ConfigurationError: on 2"
    assert done.stderr.count("ConfigurationError") == 1
    assert "Traceback" not in done.stderr


def test_an_unexpected_error_raised_together_shows_its_ranks_traceback() -> None:
    body = (
        "error = None\ntry:\n    if rank == 3: fail()\nexcept ValueError as caught:\n    error = caught\n"
        "with fail_together(communicator):\n    communicator.raise_together(error)"
    )
    done = launch(START + body, 4)
    assert done.code != 0
    assert done.seconds < SOON
    assert done.stderr.count("RuntimeError: rank 3 failed:\n") == 1
    assert done.stderr.count("in fail\n") == done.stderr.count("ValueError: boom\n") == 1


def test_sys_exit_on_one_rank_ends_all() -> None:
    for leave in ("sys.exit", "exit"):
        outside = launch(START + f"if rank == 1: {leave}(7)\nwait()", 4)
        assert outside.code == 7
        assert outside.seconds < SOON
    inside = launch(START + "with fail_together(communicator):\n    if rank == 1: sys.exit(0)\n    wait()", 4)
    assert inside.code != 0
    assert inside.seconds < SOON
    assert inside.stderr.count("[rank 1] SystemExit: 0\n") == 1
    together = launch(START + "sys.exit(0)", 4)
    assert (together.code, together.stderr) == (0, "")


CAUGHT = """
import sys

import gymnasium

from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO

try:
    sys.exit(3)
except SystemExit:
    PPO(total_steps=128, env_fn=lambda: gymnasium.make("CartPole-v1"), network_fn=mlp, value_network_fn=mlp,
        rollout_length_per_worker=32, quiet=True, log_directory=sys.argv[1], save_location=None)
    print("ended well")
"""


def test_an_exit_that_was_caught_does_not_count_once_training_has_begun(tmp_path: Path) -> None:
    done = launch(CAUGHT, 2, str(tmp_path))
    assert (done.code, done.stdout.count("ended well")) == (0, 2), done.stderr


ALONE = """
import sys

import gymnasium

from ppo_mpi_base.evaluate import evaluate
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO


def env_fn():
    return gymnasium.make("CartPole-v1")


def train():
    PPO(total_steps=128, env_fn=env_fn, network_fn=mlp, value_network_fn=mlp, rollout_length_per_worker=32, quiet=True,
        log_directory=sys.argv[1], save_location=sys.argv[1])


"""


@pytest.mark.parametrize(
    ("body", "call", "rank"),
    [
        ("if world().is_root: train()", "PPO()", 0),
        ("if not world().is_root: train()", "PPO()", 1),
        ("train()\nif world().is_root: evaluate(sys.argv[1], env_fn, episodes=1)", "evaluate()", 0),
        ("from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 0: world()", "world()", 0),
    ],
)
def test_a_call_without_all_ranks_is_told_and_does_not_wait(tmp_path: Path, body: str, call: str, rank: int) -> None:
    done = launch(ALONE + body, 3, str(tmp_path))
    assert done.code != 0
    assert done.stderr.count(f"ConfigurationError: {call} is called on rank {rank}, but another rank ends") == 1


def test_ranks_that_call_different_things_are_told(tmp_path: Path) -> None:
    body = "train()\nif world().rank == 1: train()\nelse: evaluate(sys.argv[1], env_fn, episodes=1)"
    done = launch(ALONE + body, 2, str(tmp_path))
    assert done.code != 0
    assert done.stderr.count("ConfigurationError: evaluate() is called on rank 0, but another rank ends") == 1
    assert "on rank 1" not in done.stderr


def test_one_that_has_caught_it_leaves_with_the_others(tmp_path: Path) -> None:
    body = "try:\n    if world().is_root: evaluate(sys.argv[1], env_fn)\nexcept ValueError:\n    pass"
    done = launch(ALONE + body, 2, str(tmp_path))
    assert (done.code, done.stderr) == (0, "")


def test_the_last_lines_are_not_lost() -> None:
    body = "    print(f'printed on {rank};', end='')\n    if rank == 2: fail('x' * 5000)\n    wait()"
    done = launch(START + "with fail_together(communicator):\n" + body, 4)
    assert "printed on 2;" in done.stdout
    assert "x" * 5000 in done.stderr


def test_children_of_a_rank_are_no_ranks() -> None:
    script = """
import multiprocessing, os, subprocess, sys
from ppo_mpi_base.failing import fail_together
from ppo_mpi_base.mpi import world

def work(queue):
    with fail_together(world()):
        queue.put(True)
        raise OSError("in a child")

if __name__ == "__main__":
    communicator = world()
    for method in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        assert queue.get(timeout=20)
        child.join()
        assert child.exitcode == 1
    show = "from ppo_mpi_base.mpi import world; print(world().size)"
    assert subprocess.run([sys.executable, "-c", show], capture_output=True, timeout=20).stdout.split() == [b"1"]
    if os.fork() == 0:
        raise OSError("in a forked child")
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    communicator.barrier()
    print(f"good\\n", end="")
"""
    done = launch(script, 2, timeout=30)
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["good", "good"]


def test_a_launcher_without_an_mpi_library_is_told_once() -> None:
    done = launch(START, 2, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.code != 0
    assert done.seconds < SOON
    [line] = [line for line in done.stderr.splitlines() if "Error: " in line]  # other lines are the launcher's
    assert re.match(r"ConfigurationError: (PMI|OMPI_COMM_WORLD)_SIZE=2: ", line)
    assert "pip install mpi4py mpich" in line


WATCHED = "with fail_together(communicator), communicator.watched(2.0):\n    communicator.barrier()\n"


def test_a_rank_that_stalls_is_named_with_its_collective_and_shows_where_it_is() -> None:
    done = launch(START + WATCHED + "    if rank == 2: time.sleep(100)\n    communicator.gather_all(rank)\n", 4)
    assert done.code != 0
    assert done.seconds < SOON
    assert "rank 2 stalls here, while others wait for it in gather_all:\n" in done.stderr
    assert "if rank == 2: time.sleep(100)" in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("TrainingError")]
    assert len(told) == 1
    assert "rank 2 did not reach the collective gather_all, in which rank 0 has waited for " in told[0]
    assert "stall_seconds=2" in told[0]


def test_ranks_that_wait_in_different_collectives_are_named_with_them() -> None:
    body = "    if rank == 0: communicator.barrier()\n    communicator.gather_all(rank)\n    communicator.barrier()\n"
    done = launch(START + WATCHED + body, 3)
    assert done.code != 0
    assert done.seconds < SOON
    assert "rank 0 stalls here, while others wait for it in gather_all:\n" in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("TrainingError")]
    assert len(told) == 1
    assert "rank 1 and rank 2 (in gather_all, as when a hook calls a collective on some ranks only) did not" in told[0]


def test_a_rank_that_is_stopped_is_named_though_it_cannot_speak() -> None:
    body = "    if rank == 0: os.kill(os.getpid(), signal.SIGSTOP)\n    communicator.max(1.0)\n"
    done = launch("import os, signal\n" + START + WATCHED + body, 3)
    assert done.code != 0
    assert done.seconds < SOON
    assert "rank 0 did not reach the collective max or min, in which rank 1 has waited" in done.stderr


def test_a_rank_that_is_late_ends_nothing() -> None:
    body = "    if rank == 1: time.sleep(2.5)\n    communicator.barrier()\nprint('good\\n', end='')"
    done = launch(START + WATCHED.replace("2.0", "3.0") + body, 2)
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["good", "good"]
    assert done.stderr == ""


def test_a_watch_that_is_over_notices_nothing() -> None:
    body = "if rank == 1: time.sleep(3)\ncommunicator.barrier()\nprint('good\\n', end='')"
    done = launch(START + WATCHED.replace("2.0", "1.0") + body, 2)
    assert (done.code, done.stderr, done.stdout.split()) == (0, "", ["good", "good"])
