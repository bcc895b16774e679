# SPDX-License-Identifier: MIT
"""Several ranks: killed or asked to stop, resumed exactly or by other numbers of ranks, and kept in step."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ppo_mpi_base import run_state
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.interruption import REQUEUE
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.rollout import Rollout
from ppo_mpi_base.worker import Worker
from tests.mpi.launch import ROOT, environment, launch
from tests.resuming import HALF, TASKS, WHOLE, N, T, checkpoint, differences, keywords

SLOW = 100  # seconds: it takes ten, but the machine may be busy

# HalfCheetah's policy and value network are trained by half of the ranks each.
DIVIDED = """
def divided(task):
    return {"train_v_epochs": 2, "divide_networks": True} if task == "HalfCheetah" else {}

"""

FIRST = """
import signal
import sys
from pathlib import Path

from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import PPO
from tests.resuming import Signal, keywords

directory, *tasks = sys.argv[1:]
size = world().size
for task in tasks:
    # All but the last are asked to stop, by a signal to one rank; in the last one that rank is killed.
    stop = Signal(signal.SIGKILL if task == tasks[-1] else signal.SIGUSR1, rank=size - 1)
    try:
        PPO(**keywords(task, Path(directory) / task, size, hooks=[stop], **divided(task)))
    except SystemExit as ended:
        assert ended.code == 75
"""

SECOND = """
import sys
from pathlib import Path

from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import PPO
from tests.resuming import keywords

directory, *tasks = sys.argv[1:]
for task in tasks:
    for run in (Path(directory) / task, Path(directory) / f"{task} undisturbed"):
        PPO(**keywords(task, run, world().size, **divided(task)))
"""


def test_a_run_that_a_signal_or_a_kill_ended_continues_exactly(tmp_path):
    killed = launch(DIVIDED + FIRST, 2, str(tmp_path), *TASKS, timeout=SLOW)
    assert killed.code not in (0, REQUEUE)
    for task in TASKS:
        facts, _ = checkpoint(tmp_path / task)
        assert facts["iteration"] == (HALF if task == TASKS[-1] else HALF + 1)
    finished = launch(DIVIDED + SECOND, 2, str(tmp_path), *TASKS, timeout=SLOW)
    assert finished.code == 0, finished.stderr
    for task in TASKS:
        assert differences(tmp_path / task, tmp_path / f"{task} undisturbed") == [], task
        assert checkpoint(tmp_path / task)[0]["iteration"] == WHOLE


ELASTIC = """
import sys
from pathlib import Path

import numpy as np
import torch

from ppo_mpi_base import run_state
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import PPO
from tests.resuming import checkpoint as read, keywords

ranks = world()
directory = Path(sys.argv[1])
facts, arrays = read(directory)
ranks.barrier()
used = max(int(x.max()) for name, x in arrays.items() if name.endswith("environments/episodes"))


class Compare(Hooks):
    first = True

    def on_rollout(self, worker, rollout):
        if self.first:
            state = run_state.state(worker)
            for name in ("parameters", "adam/first_moment", "adam/second_moment", "adam/steps", "observations/mean"):
                np.testing.assert_array_equal(state[name].numpy(), arrays[name])
            starts = worker.ranks.gather_all(rollout.observations[0].numpy())
            assert len(np.unique(np.concatenate(starts), axis=0)) == 2 * worker.ranks.size, "all begin apart"
            assert min(worker.environments.progress()["episodes"]) > used
            states = worker.ranks.gather_all(torch.get_rng_state().numpy().tobytes())
            assert len(set(states)) == worker.ranks.size, "ranks would draw the same"
        self.first = False


PPO(**keywords("CartPole", directory, 8, hooks=[Compare()], quiet=False))
"""


class Stop(Hooks):
    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        if worker.iteration == HALF:
            signal.raise_signal(signal.SIGTERM)


class Keep(Hooks):
    """Keeps the state that the first rollout was collected in."""

    def __init__(self) -> None:
        self.state_: dict[str, np.ndarray] = {}

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        if not self.state_:
            self.state_ = {name: x.numpy().copy() for name, x in run_state.state(worker).items() if name[0] in "apo"}


def test_a_run_continues_on_more_and_on_fewer_ranks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        PPO(**keywords("CartPole", tmp_path, 8, hooks=[Stop()]))
    more = launch(ELASTIC, 2, str(tmp_path), timeout=SLOW)
    assert more.code == 0, more.stderr
    samples = 12 * 2
    assert (
        f"resumed from 1 ranks x {N} environments: episodes begin anew, updates average over {samples}" in more.stdout
    )
    facts, arrays = checkpoint(tmp_path)
    assert facts["ranks"] == 2 and facts["total_steps"] == 8 * WHOLE * T * N
    keep = Keep()
    capsys.readouterr()
    PPO(**keywords("CartPole", tmp_path, 9, hooks=[keep], quiet=False))
    assert f"resumed from 2 ranks x {N} environments" in capsys.readouterr().out
    for name, array in keep.state_.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert checkpoint(tmp_path)[0]["total_steps"] == 9 * WHOLE * T * N


OWN = """
import sys
from pathlib import Path

import torch

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import PPO
from tests.resuming import HALF, T, N, WHOLE, keywords


class Own(Hooks):
    # Has a tensor that differs between ranks, even in its size, and one that does not.
    def on_start(self, worker):
        self.own, self.common = torch.full((2 + worker.ranks.rank,), -1.0), torch.zeros(1)

    def on_rollout(self, worker, rollout):
        expected = -1.0 if worker.iteration == 0 else 10.0 * worker.iteration + (worker.ranks.rank if exact else 0)
        assert self.own.unique().tolist() == [expected], (worker.ranks.rank, worker.iteration, self.own)
        assert self.common.item() == worker.iteration
        self.own.fill_(10.0 * (worker.iteration + 1) + (worker.ranks.rank if exact else 0))
        self.common += 1

    def state(self):
        return {"own": self.own, "common": self.common}


steps, exact = int(sys.argv[2]), sys.argv[3] == "exact"
n = int(sys.argv[4])
given = keywords("CartPole", Path(sys.argv[1]), hooks=[Own()], quiet=False, num_environments=n)
PPO(**{**given, "total_steps": steps * T * N})
"""


def test_each_rank_gets_back_its_own_hook_states(tmp_path):
    for iterations in (2 * HALF, 2 * WHOLE):
        done = launch(OWN, 2, str(tmp_path), str(iterations), "exact", str(N), timeout=SLOW)
        assert done.code == 0, done.stderr
    _, arrays = checkpoint(tmp_path)
    found = {name: array.tolist() for name, array in arrays.items() if "Own" in name}
    last = 10.0 * WHOLE
    assert found == {
        "hooks/Own/own": [last] * 2,
        "hooks/Own/common": [WHOLE],
        "rank0/hooks/Own/own": [last] * 2,
        "rank1/hooks/Own/own": [last + 1] * 3,
    }
    more_environments = launch(OWN, 2, str(tmp_path), str(2 * WHOLE + 1), "exact", str(2 * N), timeout=SLOW)
    assert more_environments.code == 0, more_environments.stderr
    fewer = launch(OWN, 1, str(tmp_path), str(2 * WHOLE + 8), "of rank 0", str(N), timeout=SLOW)
    assert fewer.code == 0, fewer.stderr
    assert "hooks/Own/own differed between ranks: all continue with rank 0's" in fewer.stdout


ENDLESS = """
import os
import sys
from pathlib import Path

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.ppo import PPO
from tests.resuming import keywords

directory = Path(sys.argv[1])


class Tell(Hooks):
    def on_iteration(self, worker, statistics):
        if worker.iteration == 2:
            (directory / f"rank{worker.ranks.rank}").write_text(str(os.getpid()))


PPO(**keywords("CartPole", directory, 10**9, hooks=[Tell()], checkpoint_seconds=3600, quiet=False))
"""


def is_open_mpi(mpiexec: Path) -> bool:
    return "Open MPI" in subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout


def test_a_signal_to_the_launcher_ends_all_ranks_with_status_75(tmp_path):
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: pip install mpich mpi4py")
    script = tmp_path / "script.py"
    script.write_text(ENDLESS)
    command = [str(mpiexec), "-n", "2", sys.executable, str(script), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, text=True, env=environment()) as process:
        try:
            end = time.monotonic() + SLOW
            while not all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)) and time.monotonic() < end:
                time.sleep(0.05)
            # Open MPI's launcher gives its ranks no time after a SIGTERM, but passes SIGUSR1 on.
            process.send_signal(signal.SIGUSR1 if is_open_mpi(mpiexec) else signal.SIGTERM)
            output, _ = process.communicate(timeout=SLOW)
        finally:
            process.terminate()
    assert process.returncode == REQUEUE, output
    facts, _ = checkpoint(tmp_path)
    assert facts["ranks"] == 2 and facts["iteration"] >= 2
    assert f'stopped at {facts["total_steps"]:,} steps; resume="auto" continues the run' in output


APART = """
import sys
from pathlib import Path

import torch

from ppo_mpi_base import worker
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.ppo import PPO
from tests.resuming import keywords

worker.COMPARE_EVERY = 2


class Drift(Hooks):
    def on_iteration(self, worker, statistics):
        if worker.iteration == 4 and worker.ranks.rank == 1:
            with torch.no_grad():
                list(worker.actor_critic.value_network.parameters())[-1].add_(1e-6)


PPO(**keywords("CartPole", Path(sys.argv[1]), 2, hooks=[Drift()]))
"""


def test_ranks_that_drift_apart_stop_the_run(tmp_path):
    finished = launch(APART, 2, str(tmp_path), timeout=SLOW)
    assert finished.code not in (0, REQUEUE)
    assert re.search(
        r"out of step: value_network\S*bias on rank 1 differs from rank 0's in iteration 4", finished.stderr
    )
    assert checkpoint(tmp_path)[0]["iteration"] == 3, "the checkpoint before stays the newest"


def test_a_run_survives_kills_at_random_moments(tmp_path):
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "2", "--iterations", "40", "--pause", "0.1"]
    command += ["--directory", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SLOW)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("kill ") == 2 and "equal to the last bit" in finished.stdout
