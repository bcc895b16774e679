# SPDX-License-Identifier: MIT
"""Checkpoints on one rank: exact resume, writing whole or not at all, and files that must not be believed."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
import torch
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import NormalizeReward
from torch import Tensor, nn

from ppo_mpi_base import checkpoint as package
from ppo_mpi_base import run_state
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.files import write_whole
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.interruption import REQUEUE
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.rollout import Rollout, gae
from ppo_mpi_base.saved_policy import load_actor_critic
from ppo_mpi_base.worker import Result, Worker
from tests.mpi.launch import run
from tests.resuming import HALF, TASKS, WHOLE, N, T, checkpoint, differences, keywords, newest
from tests.scripted import FaultyEnv, ScriptedEnv

STEPS = T * N  # of an iteration at one rank

EXACT = """
import os
import sys
from pathlib import Path

import matplotlib.pyplot
import torch
import torch.utils.tensorboard

from ppo_mpi_base.ppo import PPO
from tests.resuming import Signal, keywords, newest

torch.set_num_threads(1)


def in_process(task, directory, hooks=()):
    process = os.fork()
    if process == 0:
        PPO(**keywords(task, directory, hooks=hooks))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


for task in sys.argv[2:]:
    whole, killed = (Path(sys.argv[1]) / task / run for run in ("whole", "killed"))
    print(in_process(task, whole), in_process(task, killed, [Signal()]))
    newest(killed).unlink()  # so that the logs are ahead of the checkpoint
    print(in_process(task, killed))
"""


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    finished = run([], EXACT, str(tmp_path), *TASKS, timeout=110)
    assert finished.stdout.split() == ["0", "-9", "0"] * len(TASKS), finished
    for task in TASKS:
        whole, killed = tmp_path / task / "whole", tmp_path / task / "killed"
        assert differences(whole, killed) == [], task
        facts, arrays = checkpoint(whole)
        assert facts["total_steps"] == WHOLE * STEPS and facts["reports"]["episodes"] >= 2 * N
        assert any(array.size for name, array in arrays.items() if "environments/actions" in name), "none in progress"


class Watch(Hooks):
    """Keeps the state in which each rollout was collected, and the worker."""

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.states: list[dict[str, np.ndarray]] = []
        self.learned = torch.zeros(3, requires_grad=True)

    def on_start(self, worker: Worker) -> None:
        self.worker = worker

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        if worker.iteration == self.last:
            raise TrainingError("enough")
        names = ("parameters", "adam/first_moment", "adam/second_moment", "adam/steps", "hooks/Watch/learned")
        state = run_state.state(worker)
        self.states.append({name: state[name].detach().numpy().copy() for name in names})
        with torch.no_grad():
            self.learned += 1
        rate: Any = np.float32(1e-3)  # a hook's number need not be Python's
        worker.learning_rates["policy"] = rate

    def state(self) -> dict[str, Tensor]:
        return {"learned": self.learned}


def train(directory: Path, task: str = "CartPole", **changed: Any) -> Result:
    return PPO(**keywords(task, directory, **changed))


def half(directory: Path, task: str = "CartPole", **changed: Any) -> None:
    """Train for `HALF` iterations and leave their checkpoints."""
    with pytest.raises(TrainingError, match="enough"):
        train(directory, task, hooks=[Watch(HALF)], **changed)


def test_a_finished_run_is_over_and_without_resume_another_begins(tmp_path):
    train(tmp_path)
    before, networks = newest(tmp_path).read_bytes(), (tmp_path / "saved" / "best.safetensors").read_bytes()
    assert train(tmp_path).total_steps == WHOLE * STEPS
    assert newest(tmp_path).read_bytes() == before
    watch = Watch()
    train(tmp_path, resume=False, hooks=[watch], seed=1)
    assert len(watch.states) == WHOLE
    assert (tmp_path / "saved" / "best.1.safetensors").read_bytes() == networks
    assert (tmp_path / "saved" / "best.safetensors").read_bytes() != networks
    assert len(list((tmp_path / "saved" / "checkpoints").glob("*.json"))) == package.KEPT
    assert max((tmp_path / "saved" / "checkpoints.1").glob("*.json")).read_bytes() == before


def test_a_rollout_says_how_far_the_run_is(tmp_path):
    seen = []

    def estimate(rollout: Rollout, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        seen.append((rollout.iteration, rollout.total_steps))
        return gae(rollout, gamma, lam)

    half(tmp_path, advantage_fn=estimate)
    train(tmp_path, advantage_fn=estimate)
    assert seen == [(iteration, (iteration + 1) * STEPS) for iteration in range(WHOLE)]


def test_hooks_and_optimizer_continue(tmp_path):
    half(tmp_path)
    _, arrays = checkpoint(tmp_path)
    watch = Watch()
    train(tmp_path, hooks=[watch])
    assert len(watch.states) == WHOLE - HALF
    for name, array in watch.states[0].items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    np.testing.assert_array_equal(watch.states[0]["hooks/Watch/learned"], [HALF] * 3)
    assert watch.states[0]["adam/steps"].min() > 0


class CountsOnes(Hooks):
    """Counts iterations."""

    step = 1

    def on_start(self, worker: Worker) -> None:
        self.count = torch.zeros(1)

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        self.count += self.step

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}


class CountsHundreds(CountsOnes):
    step = 100


def test_hooks_in_another_order_get_back_their_own_states(tmp_path):
    with pytest.raises(TrainingError, match="enough"):
        train(tmp_path, hooks=[CountsOnes(), CountsHundreds(), CountsOnes(), Watch(HALF)])
    again: list[CountsOnes] = [CountsHundreds(), CountsOnes(), CountsOnes()]
    train(tmp_path, hooks=again)
    assert [hook.count.item() for hook in again] == [100 * WHOLE, WHOLE, WHOLE]


def sync(env_fn: Callable[..., gymnasium.Env], n: int, **env_kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([partial(env_fn, **env_kwargs)] * n)


class Refuses(gymnasium.Wrapper):
    """Refuses some actions, like a game in which they are illegal moves."""

    refusals = 0

    def step(self, action: Any) -> Any:
        if Refuses.refusals > 0:
            Refuses.refusals -= 1
            raise ValueError("illegal move")
        return self.env.step(action)


class Draws(gymnasium.Wrapper):
    """Draws from torch's global generator in each step."""

    def step(self, action: Any) -> Any:
        torch.rand(())
        return self.env.step(action)


# The scripted environment tells the number of its episode, which the same one of a new process does not know.
UNREPEATABLE: dict[str, dict[str, Any]] = {
    "vector": {"make_vec_env_fn": sync},
    "observations": {"env_fn": ScriptedEnv, "env_kwargs": {}},
    "rewards": {"env_fn": lambda task: NormalizeReward(gymnasium.make("CartPole-v1"))},
    "actions": {"env_fn": lambda task: Refuses(gymnasium.make("CartPole-v1"))},
}


@pytest.mark.parametrize("case", UNREPEATABLE)
def test_environments_that_cannot_be_restored_begin_new_episodes_and_one_line_says_so(tmp_path, capsys, case):
    changed = UNREPEATABLE[case]
    half(tmp_path, **changed)
    Refuses.refusals = N if case == "actions" else 0
    _, arrays = checkpoint(tmp_path)
    capsys.readouterr()
    watch, firsts = Watch(), []

    class First(Hooks):
        def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
            firsts.append(rollout.observations[0].numpy().copy())

    train(tmp_path, hooks=[watch, First()], quiet=False, **changed)
    told = [line for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert told == [f"resumed at {HALF * STEPS} steps: {N} environments cannot be restored and begin new episodes"]
    np.testing.assert_array_equal(watch.states[0]["parameters"], arrays["parameters"])
    if case == "vector":
        first = gymnasium.make("CartPole-v1").reset(seed=package_seed(0))[0]
        assert not np.array_equal(firsts[0][0], first), "the run's first episode was used up"


def package_seed(g: int) -> int:
    from ppo_mpi_base.steppers import first_seed

    return first_seed(0, g)


@pytest.mark.parametrize("environments", [1, 3])
def test_another_number_of_environments_continues_what_was_learned_with_seeds_of_its_own(
    tmp_path, capsys, environments
):
    half(tmp_path)
    facts, arrays = checkpoint(tmp_path)
    used = int(arrays["rank0/environments/episodes"].max())
    watch = Watch()
    given: dict[str, Any] = {"num_environments": environments, "hooks": [watch], "quiet": False}
    train(tmp_path, **given)
    assert f"resumed from 1 ranks x {N} environments" in capsys.readouterr().out
    for name, array in watch.states[0].items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    episodes = watch.worker.environments.progress()["episodes"]
    assert episodes.shape == (environments,) and episodes.min() > used
    assert watch.worker.total_steps >= facts["total_steps"] + T * environments


def damage(kind: str, path: Path) -> None:
    """Spoil a checkpoint's description or tensors, whichever the path names."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(bytes(flipped))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malice(path.parent / "executed")))
    elif kind == "deep":
        path.write_bytes(b"[" * 100_000)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def run_of_half(tmp_path_factory):
    directory = tmp_path_factory.mktemp("half")
    half(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *((kind, ".json") for kind in ("missing", "half", "pickle", "deep")),
        *((kind, ".safetensors") for kind in ("missing", "empty", "flipped", "pickle")),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_continued(tmp_path, capsys, run_of_half, kind, suffix):
    shutil.copytree(run_of_half, tmp_path, dirs_exist_ok=True)
    damage(kind, newest(tmp_path).with_suffix(suffix))
    watch = Watch()
    train(tmp_path, hooks=[watch], quiet=False)
    lines = capsys.readouterr().out.splitlines()
    assert f"resumed at {(HALF - 1) * STEPS} steps" in lines
    told = [line for line in lines if "is damaged" in line and f"{HALF * STEPS}.json" in line]
    assert len(told) == (0 if (kind, suffix) == ("missing", ".json") else 1), lines
    assert len(watch.states) == WHOLE - HALF + 1
    assert not list(tmp_path.rglob("executed"))
    assert len(list((tmp_path / "saved" / "checkpoints").iterdir())) == 2 * package.KEPT, "nothing is left behind"


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_left_behind(tmp_path, run_of_half, suffix):
    shutil.copytree(run_of_half, tmp_path, dirs_exist_ok=True)
    unreadable = newest(tmp_path).with_suffix(suffix)
    unreadable.unlink()
    unreadable.mkdir()  # what root, too, cannot read
    left = sorted(path.name for path in unreadable.parent.iterdir())
    with pytest.raises(ConfigurationError, match=r"resume: checkpoint .* cannot be read \(Is a directory\)"):
        train(tmp_path)
    assert sorted(path.name for path in unreadable.parent.iterdir()) == left


def test_every_flipped_bit_of_a_description_is_noticed_or_harmless(run_of_half):
    path = newest(run_of_half)
    content = path.read_bytes()
    whole, _ = package._read(path)
    try:
        for place in range(0, len(content), 3):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(bytes(flipped))
            try:
                assert package._read(path)[0] == whole, "a flip in white space"
            except (ValueError, KeyError) as error:
                assert not isinstance(error, ConfigurationError)
    finally:
        path.write_bytes(content)


def test_if_all_are_damaged_the_run_begins_anew_and_keeps_them(tmp_path, capsys, run_of_half):
    shutil.copytree(run_of_half, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "saved" / "checkpoints").glob("*.json"):
        damage("half", path)
    watch = Watch()
    train(tmp_path, hooks=[watch], quiet=False)
    assert len(watch.states) == WHOLE
    assert capsys.readouterr().out.count("is damaged") == HALF
    assert len(list((tmp_path / "saved" / "checkpoints.1").glob("*.json"))) == HALF


class Turned(gymnasium.ActionWrapper):
    """CartPole with as many actions, counted from 1."""

    def __init__(self, task: str) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.action_space = gymnasium.spaces.Discrete(2, start=1)

    def action(self, action: Any) -> Any:
        return action - 1


class Bounded(gymnasium.ObservationWrapper):
    """CartPole with another observation space of the same shape."""

    def __init__(self, task: str) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.observation_space = Box(-9.0, 9.0, (4,), np.float32)

    def observation(self, observation: Any) -> Any:
        return observation


def as_many(obs_dim: int, act_dim: int = 1) -> nn.Module:
    """Return another network with as many parameters as `small` for CartPole: 58 and 49."""
    return nn.Sequential(Scales(58 if act_dim == 2 else 49, act_dim))


class Scales(nn.Module):
    def __init__(self, parameters: int, act_dim: int) -> None:
        super().__init__()
        self.scales, self.act_dim = nn.Parameter(torch.zeros(parameters)), act_dim

    def forward(self, observations: Tensor) -> Tensor:
        return observations[:, : self.act_dim] * self.scales.mean()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"network_fn": partial(mlp, hidden=(9,))}, r"parameters are not this run's \(\['network.*4.*instead of"),
        ({"network_fn": as_many, "value_network_fn": as_many}, r"parameters are not this run's .*scales"),
        ({"env_fn": Turned}, "action spaces are not this run's .*'start': 0.*'start': 1"),
        ({"env_fn": Bounded}, "observation spaces are not this run's"),
        ({"normalize_observations": False}, r"normalized observations are not this run's \(True instead of False\)"),
        ({"hooks": ()}, None),  # a hook's state that nobody wants is no reason to stop
        ({"hooks": [Watch(), Watch()]}, "this run's hooks/Watch 2/learned has shape .3,., but the checkpoint has none"),
    ],
    ids=["wider", "as many", "action space", "observation space", "normalization", "fewer hooks", "more hooks"],
)
def test_a_checkpoint_of_something_else_is_refused_before_anything_changes(tmp_path, run_of_half, changed, message):
    shutil.copytree(run_of_half, tmp_path, dirs_exist_ok=True)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if message is None:
        train(tmp_path, **changed)
        return
    with pytest.raises(ConfigurationError, match=f"^resume: .*{message}") as error:
        train(tmp_path, **changed)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_newer_format_is_refused(tmp_path, run_of_half):
    shutil.copytree(run_of_half, tmp_path, dirs_exist_ok=True)
    path = newest(tmp_path)
    facts = {**json.loads(path.read_text()), "format": package.FORMAT + 1}
    facts.pop("self")
    path.write_text(json.dumps({**facts, "self": package._digest(facts)}))
    with pytest.raises(ConfigurationError, match=rf"^resume: .* has format {package.FORMAT + 1}, .*save_location"):
        train(tmp_path)
    assert path.exists()


def test_nan_leaves_the_last_good_checkpoint(tmp_path):
    faulty = partial(FaultyEnv, "nan", at=HALF * T + 5, horizon=1000)
    given: dict[str, Any] = {"env_fn": faulty, "env_kwargs": {}, "max_ep_len": None, "stagger_episodes": None}
    with pytest.raises(TrainingError, match=rf"observation is not finite: rank 0, .* step 5 of iteration {HALF}"):
        train(tmp_path, **given)
    facts, arrays = checkpoint(tmp_path)
    assert facts["iteration"] == HALF and np.isfinite(arrays["parameters"]).all()
    watch = Watch()
    train(tmp_path, **{**given, "env_fn": ScriptedEnv})
    assert checkpoint(tmp_path)[0]["iteration"] == WHOLE
    assert not watch.states


class FullDisk(Hooks):
    """Fills the disk when the checkpoint of an iteration asks for this hook's state, before the writing.

    The process may then write files up to `limit` bytes: a write fails half done, as on a full disk. There is room
    again after the next rollout, or at the end.
    """

    def __init__(self, at: int, limit: int = 4000) -> None:
        self.at, self.limit = at, limit
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_start(self, worker: Worker) -> None:
        self.worker = worker

    def state(self) -> dict[str, Tensor]:
        if self.worker.iteration == self.at:
            if (logger := self.worker.reports.logger) is not None and logger._tensorboard is not None:
                logger._tensorboard.flush()  # lest its thread writes in this moment
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.hard))
        return {}

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))

    def on_end(self, worker: Worker) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))


@pytest.mark.parametrize("limit", [0, 4000])
def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tmp_path, capsys, limit):
    class Full(FullDisk):
        left: list[str]

        def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
            super().on_rollout(worker, rollout)
            if worker.iteration == HALF:
                self.left = sorted(path.name for path in (tmp_path / "saved" / "checkpoints").iterdir())
                self.found = worker.checkpoints.newest()

    full = Full(HALF, limit)
    train(tmp_path, hooks=[full], quiet=False)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "checkpoint" in line]
    assert told == [f"checkpoint at {HALF * STEPS} steps failed (File too large): training goes on"]
    assert full.found is not None and full.found[0]["total_steps"] == (HALF - 1) * STEPS
    assert not [name for name in full.left if name.endswith(".part")], "half a file would keep the disk full"
    assert checkpoint(tmp_path)[0]["total_steps"] == WHOLE * STEPS


@pytest.mark.parametrize(
    "at, outlook",
    [
        (1, "no checkpoint was written, so there is nothing to continue from"),
        (HALF, f'resume="auto" continues from {(HALF - 1) * STEPS}'),
    ],
)
def test_a_stopped_run_whose_last_checkpoint_failed_says_what_is_left(tmp_path, capsys, at, outlook):
    class FullAndStopped(FullDisk):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == at:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train(tmp_path, hooks=[FullAndStopped(at)], quiet=False)
    assert left.value.code == REQUEUE
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint at {at * STEPS} steps failed (File too large)" in lines
    assert lines[-1] == f"stopped at {at * STEPS} steps; {outlook}"


def test_a_stopped_run_whose_checkpoints_cannot_be_read_still_asks_to_be_continued(tmp_path, capsys):
    class FullAndStopped(FullDisk):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == HALF:
                before = newest(tmp_path)
                before.unlink()
                before.mkdir()  # what root, too, cannot read
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train(tmp_path, hooks=[FullAndStopped(HALF)], quiet=False)
    assert left.value.code == REQUEUE
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"stopped at {HALF * STEPS} steps; resume: checkpoint ")
    assert "cannot be read (Is a directory)" in last


def test_a_run_whose_end_could_not_be_written_does_not_end_well(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train(tmp_path, hooks=[FullDisk(WHOLE)], quiet=False)
    assert left.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f'the end of the run was not saved; resume="auto" continues from {(WHOLE - 1) * STEPS}'
    assert train(tmp_path).total_steps == WHOLE * STEPS


def test_writing_over_a_file_fails_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError):
            write_whole(path, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


KILLS = """
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ppo_mpi_base import checkpoint, files
from ppo_mpi_base.config import Config
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.ppo import ppo_losses
from ppo_mpi_base.training import training
from tests.resuming import keywords

directory = Path(sys.argv[1])
torch.set_num_threads(1)
watched = {checkpoint.__file__, files.__file__}
told = []


class Ballast(Hooks):
    learned = torch.zeros(2_000_000)  # so that a file's writing takes long enough to be killed in its midst

    def state(self):
        return {"learned": self.learned}


def save(worker, steps):
    worker.total_steps = steps
    worker.flat.data.fill_(steps)
    worker.checkpoints.save(worker)


def kill_at(moment):
    # Before and after each call that the writing of a checkpoint makes.
    passed = 0

    def count(frame, event, argument):
        nonlocal passed
        names = ("_write", "write_whole", "write_together", "<genexpr>")
        if frame.f_code.co_filename in watched and frame.f_code.co_name in names:
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def child(worker, steps, moment=None):
    process = os.fork()
    if process == 0:
        if moment is not None:
            kill_at(moment)
        save(worker, steps)
        os._exit(0)
    return process


def check(worker, least):
    facts, arrays = worker.checkpoints.newest()
    assert facts["total_steps"] >= least and (arrays["parameters"] == facts["total_steps"]).all(), facts
    return facts["total_steps"]


def start(worker):
    worker.checkpoints.directory = directory / "checkpoints"
    shutil.rmtree(worker.checkpoints.directory, ignore_errors=True)
    for steps in (100, 200, 300):
        save(worker, steps)


def each_call(worker, steps):
    # Writing the checkpoint of `steps`, killed at every call in turn; return what was found after each.
    found = []
    while True:
        shutil.rmtree(directory / "now", ignore_errors=True)
        shutil.copytree(directory / "checkpoints", directory / "now")
        worker.checkpoints.directory = directory / "now"
        ended = os.waitstatus_to_exitcode(os.waitpid(child(worker, steps, len(found) + 1), 0)[1])
        if ended == 0:
            return found
        assert ended == -signal.SIGKILL, ended
        found.append(check(worker, 200 if steps == 300 else 300))
        save(worker, 500)  # cleans up
        assert len(list(worker.checkpoints.directory.iterdir())) == 2 * checkpoint.KEPT


with training(Config(**keywords("CartPole", directory / "run")), ppo_losses) as worker:
    worker.checkpoints.tell = told.append
    start(worker)
    new = each_call(worker, 400)
    assert not told, told
    assert new == sorted(new) and set(new) == {300, 400}
    again = each_call(worker, 300)  # over one that is there
    print(len(new) + len(again))
with training(Config(**keywords("CartPole", directory / "large", hooks=[Ballast()])), ppo_losses) as worker:
    start(worker)
    began = time.monotonic()
    save(worker, 300)
    seconds = time.monotonic() - began
    killed = 0
    for k in range(10):
        process = child(worker, 400 + k)
        time.sleep(seconds * (k + 0.5) / 10)
        os.kill(process, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        check(worker, 300)
    print(killed)
"""


def test_a_kill_at_any_moment_of_the_writing_leaves_a_whole_checkpoint(tmp_path):
    finished = run([], KILLS, str(tmp_path), timeout=110)
    assert finished.code == 0, finished.stderr
    calls, timed = map(int, finished.stdout.split())
    assert calls >= 50 and timed >= 5


def test_no_module_unpickles():
    for path in Path(package.__file__).parent.glob("*.py"):
        found = re.search(
            r"import (dill|joblib|pickle|shelve)|allow_pickle|(?<!safetensors\.)torch\.load\(", path.read_text()
        )
        assert found is None, (path, found)


def rates(directory: Path, network: str = "policy") -> list[float]:
    _, rows = read_progress(directory / "logs" / "progress.csv")
    return [float(row[f"learning_rate_{network}"]) for row in rows]


def coefficients(directory: Path) -> dict[str, float]:
    _, arrays = checkpoint(directory)
    return {name.split("/")[1]: float(x) for name, x in arrays.items() if name.startswith("coefficients/")}


def test_rates_and_coefficients_that_are_asked_for_anew_count(tmp_path, capsys):
    train(tmp_path, pi_lr=1e-3, anneal_lr=False, anneal_clip_ratio=False, target_kl=0.0)
    changed = {"pi_lr": 5e-5, "anneal_lr": False, "anneal_clip_ratio": False, "entropy_coef": 0.125, "target_kl": 0.0}
    train(tmp_path, total_steps=2 * WHOLE * STEPS, value_clip_ratio=0.5, quiet=False, **changed)
    assert "pi_lr, entropy_coef, value_clip_ratio changed: the new values apply" in capsys.readouterr().out
    assert rates(tmp_path) == [1e-3] * WHOLE + [5e-5] * WHOLE
    now = coefficients(tmp_path)
    assert (now["entropy_coef"], now["value_clip_ratio"], now["clip_ratio"]) == (0.125, 0.5, pytest.approx(0.2))


def test_a_run_that_is_made_longer_anneals_from_where_it_is(tmp_path):
    switches = ("anneal_lr", "anneal_clip_ratio", "anneal_entropy_coef")
    annealed = {"pi_lr": 1e-3, "clip_ratio": 0.2, "entropy_coef": 0.05, **dict.fromkeys(switches, True)}
    train(tmp_path, **annealed)
    train(tmp_path, total_steps=2 * WHOLE * STEPS, **annealed)
    expected = [1 - k / WHOLE for k in range(WHOLE)] + [1 - k / (2 * WHOLE) for k in range(WHOLE, 2 * WHOLE)]
    assert rates(tmp_path) == pytest.approx([1e-3 * x for x in expected])
    train(tmp_path, total_steps=3 * WHOLE * STEPS, **{**annealed, **dict.fromkeys(switches, False)})
    assert rates(tmp_path)[2 * WHOLE :] == [1e-3] * WHOLE
    now = coefficients(tmp_path)
    assert (now["clip_ratio"], now["entropy_coef"]) == (pytest.approx(0.2), pytest.approx(0.05))


def test_a_rate_that_a_hook_has_set_outlives_a_longer_total_steps(tmp_path):
    class Drop(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == 1:
                worker.learning_rates["policy"] = 1e-4

    given: dict[str, Any] = {"pi_lr": 1e-3, "anneal_lr": False, "anneal_clip_ratio": True, "hooks": [Drop()]}
    train(tmp_path, **given)
    train(tmp_path, total_steps=2 * WHOLE * STEPS, **given)
    assert rates(tmp_path) == [1e-3] + [1e-4] * (2 * WHOLE - 1)


def test_a_rate_that_a_hook_has_set_outlives_another_one_asked_for_anew(tmp_path):
    class Drop(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == 1:
                worker.learning_rates = {"policy": 1e-4, "value": 2e-4}

    given: dict[str, Any] = {"pi_lr": 1e-3, "anneal_lr": False, "anneal_clip_ratio": False}
    train(tmp_path, vf_lr=1e-3, hooks=[Drop()], **given)
    train(tmp_path, vf_lr=5e-4, total_steps=2 * WHOLE * STEPS, **given)
    assert rates(tmp_path) == [1e-3] + [1e-4] * (2 * WHOLE - 1)
    assert rates(tmp_path, "value") == [1e-3] + [2e-4] * (WHOLE - 1) + [5e-4] * WHOLE


def dropping(obs_dim: int, out_dim: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(obs_dim, 8), nn.Dropout(0.5), nn.Linear(8, out_dim))


def test_a_resumed_run_draws_the_random_numbers_that_its_networks_would_have_drawn(tmp_path):
    networks = {"network_fn": dropping, "value_network_fn": dropping}
    train(tmp_path / "whole", hooks=[Watch()], **networks)
    half(tmp_path / "halves", **networks)
    train(tmp_path / "halves", hooks=[Watch()], **networks)
    assert differences(tmp_path / "whole", tmp_path / "halves") == []


def test_environments_that_draw_from_torch_do_not_change_what_it_draws_after_a_resume(tmp_path):
    drawing: dict[str, Any] = {"env_fn": lambda task: Draws(gymnasium.make("CartPole-v1"))}
    train(tmp_path / "whole", hooks=[Watch()], **drawing)
    half(tmp_path / "halves", **drawing)
    train(tmp_path / "halves", hooks=[Watch()], **drawing)
    assert differences(tmp_path / "whole", tmp_path / "halves") == []


@pytest.mark.parametrize("earlier", [False, True])
def test_better_networks_than_the_checkpoints_are_not_replaced_by_worse(tmp_path, earlier):
    half(tmp_path)
    saved = tmp_path / "saved" / "best.safetensors"
    when = {"total_steps": HALF * STEPS + 1, "episode_return": 1e6}
    if earlier:  # by a version that wrote it into the JSON file alone
        saved.write_bytes(safetensors.numpy.save(safetensors.numpy.load(saved.read_bytes())))
        facts = json.loads(saved.with_suffix(".json").read_text())
        saved.with_suffix(".json").write_text(json.dumps({**facts, **when}))
    else:
        tensors = safetensors.numpy.load(saved.read_bytes())
        saved.write_bytes(safetensors.numpy.save(tensors, {"saved_at": json.dumps(when)}))
    networks = saved.read_bytes()
    assert train(tmp_path).best_return == 1e6
    assert saved.read_bytes() == networks


def test_a_kill_between_the_two_files_of_the_best_networks_leaves_no_trace(tmp_path):
    """The JSON file is of networks that are not there yet, and none as good would ever be saved."""
    train(tmp_path / "whole", hooks=[Watch()])
    half(tmp_path / "halves")
    best = tmp_path / "halves" / "saved" / "best.json"
    facts = json.loads(best.read_text())
    best.write_text(json.dumps({**facts, "total_steps": HALF * STEPS + 1, "episode_return": 1e6}))
    loaded = load_actor_critic(best.parent)
    assert (loaded.total_steps, loaded.episode_return) == (facts["total_steps"], facts["episode_return"])
    train(tmp_path / "halves", hooks=[Watch()])
    assert differences(tmp_path / "whole", tmp_path / "halves") == []
    whole = tmp_path / "whole" / "saved" / "best.safetensors"
    assert best.with_suffix(".safetensors").read_bytes() == whole.read_bytes()


def test_best_networks_that_are_missing_are_saved_again(tmp_path):
    falling = partial(ScriptedEnv, horizon=5, reward=lambda g, episode, step: 9.0 if episode < 3 else 1.0)
    given: dict[str, Any] = {"env_fn": falling, "env_kwargs": {}}
    half(tmp_path, **given)
    for ending in ("json", "safetensors"):
        (tmp_path / "saved" / f"best.{ending}").unlink()
    train(tmp_path, **given)
    assert (tmp_path / "saved" / "best.safetensors").exists()
