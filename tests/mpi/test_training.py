# SPDX-License-Identifier: MIT
"""Training on several ranks: they learn what one rank would, stay equal to the last bit, and end together."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.launch import Finished, launch

# 8 environments on R ranks, 4 updates an epoch of 32 samples each over all ranks, 3 epochs an iteration. Episodes end
# after 15 steps, some of CartPole's before, so that a rollout of 16 steps has all kinds of ends.
TRAINING = """
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO, ppo_losses

directory, iterations, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
ranks = world()
last = ranks.rank == ranks.size - 1
COLUMNS = ("observations", "next_observations", "actions", "rewards", "terminated", "truncated",
           "log_probs", "values", "next_values", "advantages", "returns")


def state(worker):
    moments = (worker.observation_moments, worker.reward_normalizer.moments)
    arrays = [array for m in moments for array in (m.count, m.mean, m.squares)]
    tensors = [worker.flat.data, worker.learner.optimizer.first_moment, worker.learner.optimizer.second_moment,
               *worker.actor_critic.state_dict().values(), *worker.coefficients.values()]
    arrays += [tensor.detach().numpy() for tensor in tensors] + [worker.learner.optimizer.steps]
    return [array.tobytes() for array in arrays], worker.learning_rates, worker.total_steps


def check_equal(worker):
    mine, *others = ranks.gather_all(state(worker))
    assert all(other == mine for other in others), f"ranks differ in iteration {worker.iteration}"


class Recorder(Hooks):
    def on_start(self, worker):
        check_equal(worker)
        self.found = {"start": worker.flat.data.numpy().copy()}

    def on_rollout(self, worker, rollout):
        self.collected = rollout

    def on_iteration(self, worker, statistics):
        check_equal(worker)
        if worker.iteration == 1:
            for name in COLUMNS:
                of_ranks = ranks.gather_all(getattr(self.collected, name).numpy())
                self.found[name] = np.concatenate(of_ranks, axis=1)
            own = self.collected.advantages.double()
            self.found["own_moments"] = np.array(ranks.gather_all((own.mean().item(), own.std().item())))
            self.found["data"] = worker.flat.data.numpy().copy()
            self.found["observation_mean"] = worker.observation_moments.mean.copy()
            self.found["observation_std"] = worker.observation_moments.std.copy()
            self.found["reward_std"] = worker.reward_normalizer.moments.std.copy()
        self.found["learning_rate"] = worker.learning_rates["policy"]
        self.found["steps"] = np.array(ranks.gather_all(worker.learner.optimizer.steps.tolist()))


def small(obs_dim, out_dim=1):
    return mlp(obs_dim, out_dim, hidden=(16,))


class Branching(nn.Module):
    # Has a part that only the last rank uses; on the others its parameters get no gradient.
    def __init__(self, obs_dim, out_dim=1):
        super().__init__()
        self.first, self.second = small(obs_dim, out_dim), small(obs_dim, out_dim)

    def forward(self, observations):
        return self.first(observations) + (self.second(observations) if last else 0)


def far_on_one_rank(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    return losses, {**statistics, "kl": statistics["kl"] * (1e6 if last else 0.0)}


MORE = {
    "seed": {"seed": 1},
    "kl": {"loss_fn": far_on_one_rank, "target_kl": 0.01, "pi_lr": 0.01, "train_batch_size": None},
    "branch": {"network_fn": Branching, "value_network_fn": Branching, "divide_networks": False},
}

for case in cases:
    kind, dtype, *more = case.split()
    torch.set_default_dtype(getattr(torch, dtype))
    env_id = {"gaussian": "Pendulum-v1", "categorical": "CartPole-v1"}[kind]
    recorder = Recorder()
    keywords = {
        "env_fn": lambda: gymnasium.make(env_id),
        "network_fn": small,
        "value_network_fn": small,
        "train_batch_size": 32 // ranks.size,
        "pi_lr": 3e-3,
        "vf_lr": 3e-3,
        "adam_epsilon": 1e-5,
        "divide_networks": "auto" if dtype == "float64" else False,
    }
    for name in more:
        keywords.update(MORE[name])
    PPO(
        total_steps=128 * iterations,
        use_vectorized_envs=True,
        num_environments=8 // ranks.size,
        rollout_length_per_worker=16,
        max_ep_len=15,
        stagger_episodes=14 if kind == "gaussian" else None,
        train_pi_epochs=3,
        train_v_epochs=3,
        normalize_observations=True,
        normalize_rewards=True,
        entropy_coef=0.01,
        anneal_lr=True,
        hooks=[recorder],
        log_directory=str(directory / case.replace(" ", "-")),
        save_location=None,
        compile=False,
        quiet=True,
        **keywords,
    )
    if ranks.is_root:
        np.savez(directory / (case.replace(" ", "-") + ".npz"), **recorder.found)
"""

CASES = [f"{kind} {dtype}" for kind in ("gaussian", "categorical") for dtype in ("float64", "float32")]
SEED, KL, BRANCH = "gaussian float32 seed", "gaussian float64 kl", "categorical float32 branch"
EXTRA = {1: [SEED], 4: [KL, BRANCH]}
Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Found]]:
    """Return what a number of ranks found in each case; each number is launched once."""

    @cache
    def run(ranks: int) -> dict[str, Found]:
        directory, cases = tmp_path_factory.mktemp(f"ranks{ranks}"), CASES + EXTRA.get(ranks, [])
        iterations = 5  # 12 updates each
        if ranks > 4:  # many more than cores are slow
            iterations, cases = 1, CASES[::3]
        done = launch(TRAINING, ranks, str(directory), str(iterations), *cases, timeout=280)
        assert done.code == 0, done.stderr
        return {case: dict(np.load(directory / f"{case.replace(' ', '-')}.npz")) for case in cases}

    return run


Trained = Callable[[int], dict[str, Found]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_equal_to_the_last_bit_at_the_start_and_after_50_updates(trained: Trained, ranks: int) -> None:
    for case in CASES:  # the script itself compares the ranks, at the start and after each iteration
        found = trained(ranks)[case]
        assert found["steps"].tolist() == [[60, 60]] * ranks
        assert not np.array_equal(found["start"], found["data"]) and found["learning_rate"] == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_collect_and_learn_what_one_rank_would(trained: Trained, ranks: int) -> None:
    for case in filter(trained(ranks).__contains__, CASES):
        one, several = trained(1)[case], trained(ranks)[case]
        tolerance = 1e-10 if "float64" in case else 1e-5
        np.testing.assert_array_equal(several["start"], one["start"])
        assert one["truncated"].any() and one["terminated"].any() == ("categorical" in case)
        assert one["observations"].shape[:2] == (16, 8)
        for name in one.keys() - {"own_moments", "steps", "learning_rate"}:
            what = f"{case}: {name}"
            np.testing.assert_allclose(several[name], one[name], rtol=tolerance, atol=tolerance, err_msg=what)


@pytest.mark.timeout(300)
def test_advantages_are_standardized_over_all_ranks(trained: Trained) -> None:
    for case in CASES:
        found = trained(4)[case]
        assert abs(found["advantages"].mean(dtype=np.float64)) < 1e-6
        assert found["advantages"].std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        means, stds = found["own_moments"].T
        assert np.abs(means).max() > 1e-3 and np.abs(stds - 1).max() > 1e-3, "each rank standardized its own"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_first_observations_differ_and_repeat_with_the_seed(trained: Trained, ranks: int) -> None:
    first = {case: found["observations"][0] for case, found in trained(ranks).items()}
    for observations in first.values():
        assert len(np.unique(observations, axis=0)) == 8
    np.testing.assert_array_equal(first["gaussian float32"], first["gaussian float64"])
    other = trained(1)[SEED]["observations"][0]
    assert len(np.unique([*first["gaussian float32"], *other], axis=0)) == 16


@pytest.mark.timeout(300)
def test_one_rank_far_above_the_kl_threshold_stops_all_at_the_same_update(trained: Trained) -> None:
    found = trained(4)[KL]
    # One update an epoch. Its KL is 0 in the first, and far too large, on the last rank alone, from the second on.
    assert found["steps"].tolist() == [[5, 15]] * 4


@pytest.mark.timeout(300)
def test_a_parameter_without_a_gradient_on_all_ranks_but_one_is_trained_alike(trained: Trained) -> None:
    found = trained(4)[BRANCH]  # the script itself compares the ranks
    assert (found["steps"] == 60).all()
    changed = found["data"] != found["start"]
    assert changed.mean() > 0.95


FAILING = """
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO

where, directory = sys.argv[1], Path(sys.argv[2])
rank, last = world().rank, world().size - 1


def fail(here):
    if rank == last and here == where:
        (directory / "failed_at").write_text(str(time.time()))
        raise KeyError("scripted failure")


class Failing(gymnasium.Wrapper):
    steps = 0

    def reset(self, **keywords):
        fail("reset")
        return self.env.reset(**keywords)

    def step(self, action):
        self.steps += 1
        if self.steps == 40:  # in the third iteration
            fail("step")
        return self.env.step(action)


class FailingHook(Hooks):
    def on_iteration(self, worker, statistics):
        if worker.iteration == 2:
            fail("hook")


def env_fn():
    fail("env_fn")
    return Failing(gymnasium.make("CartPole-v1"))


def network_fn(obs_dim, act_dim):
    fail("network_fn")
    return mlp(obs_dim, act_dim)


PPO(total_steps=1e9, env_fn=env_fn, network_fn=network_fn, value_network_fn=mlp, rollout_length_per_worker=16,
    train_pi_epochs=1, train_v_epochs=1, hooks=[FailingHook()], compile=False, quiet=True,
    log_directory=str(directory / "logs"), save_location=None)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("where", "ranks"), [("env_fn", 2), ("reset", 2), ("step", 3), ("network_fn", 2), ("hook", 2)])
def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path: Path, where: str, ranks: int) -> None:
    done = launch(FAILING, ranks, where, str(tmp_path), timeout=280)
    took = time.time() - float((tmp_path / "failed_at").read_text())
    assert done.code != 0
    assert took < 20, f"{took:.0f} s from the failure to the end of all ranks"
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
    assert f"[rank {ranks - 1}] KeyError: 'scripted failure'" in done.stderr
    assert done.stderr.count("scripted failure") == 2  # the last line, and the source line that raised it
    assert "in fail" in done.stderr and "script.py" in done.stderr


SMALL = """
import sys

import gymnasium
import numpy as np

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO

rank = world().rank
keywords = dict(network_fn=mlp, value_network_fn=mlp, rollout_length_per_worker=16, train_pi_epochs=2, train_v_epochs=2,
                compile=False, quiet=True, log_directory=sys.argv[1], save_location=None)
"""

SPACES = """
def env_fn():
    return gymnasium.make("CartPole-v1" if rank == 0 else "Acrobot-v1")

PPO(total_steps=1e9, env_fn=env_fn, **keywords)
"""

NOT_FINITE = """
class Watch(Hooks):
    def on_start(self, worker):
        self.worker = worker

    def on_iteration(self, worker, statistics):
        self.after = worker.flat.data.clone()

watch = Watch()
numbers = iter(range(3))


class Blind(gymnasium.ObservationWrapper):
    def __init__(self, environment):
        super().__init__(environment)
        self.number, self.steps = next(numbers), 0

    def observation(self, observation):
        self.steps += 1  # the reset's observation is the first
        blind = self.number == 1 and rank == 1 and self.steps == 40
        return observation * np.float32(np.nan) if blind else observation

    def close(self):  # what comes last before the end of the ranks
        if self.number == 0:
            worker = watch.worker
            unchanged = bool((worker.flat.data == watch.after).all())
            print(f"{unchanged} {worker.learner.optimizer.steps[0]} {worker.iteration}\\n", end="", flush=True)


PPO(total_steps=1e9, env_fn=lambda: Blind(gymnasium.make("Pendulum-v1")), use_vectorized_envs=True, num_environments=3,
    hooks=[watch], **keywords)
"""

# What is told of each keyword that differs; of the last one by PPO, which ends the ranks.
KEYWORDS = """
from ppo_mpi_base.builders import check_equal_keywords, checked_together
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError

several = {**keywords, "total_steps": 1e9, "env_fn": lambda: gymnasium.make("CartPole-v1")}
*others, last = [dict([each]) for each in {
    "seed": (0, 1000)[rank],
    "save_location": (sys.argv[1], None)[rank],
    "stall_seconds": (1800.0, None)[rank],
    "loss_coefficients": ({"clip_ratio": 0.1}, {"clip_ratio": 0.2})[rank],
}.items()]
for other in others:
    try:
        checked_together(world(), lambda: check_equal_keywords(Config(**{**several, **other}), world()))
    except ConfigurationError as error:
        if rank == 0:
            print(error, flush=True)
PPO(**{**several, **last})
"""

ORDER = """
class Same(gymnasium.Wrapper):  # CartPole as rank many points, and over after each step
    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        return observation, float(rank), True, truncated, info


result = PPO(total_steps=400, env_fn=lambda: Same(gymnasium.make("CartPole-v1")),
             **{**keywords, "rollout_length_per_worker": 200}, max_seconds=1000 + rank)  # as clocks do
print(f"returns {result.last_return} {result.best_return}\\n", end="", flush=True)
"""

NETWORKS = """
PPO(total_steps=1e9, env_fn=lambda: gymnasium.make("CartPole-v1"),
    **{**keywords, "network_fn": lambda obs_dim, act_dim: mlp(obs_dim, act_dim, hidden=(8 + rank,))})
"""

BUFFERS = """
import torch
from torch import nn


class Counting(nn.Module):
    def __init__(self, obs_dim, out_dim=1):
        super().__init__()
        self.linear = nn.Linear(obs_dim, out_dim)
        self.register_buffer("mean", torch.zeros(obs_dim))

    def forward(self, observations):
        self.mean = 0.9 * self.mean + 0.1 * observations.mean(0).detach()
        return self.linear(observations - self.mean)


class Look(Hooks):
    def on_rollout(self, worker, rollout):
        self.mine = worker.actor_critic.network.mean.clone()

    def on_iteration(self, worker, statistics):
        ranks = worker.ranks
        all_own = ranks.gather_all(self.mine.tolist())
        now = ranks.gather_all(worker.actor_critic.network.mean.tolist())
        assert all_own[0] != all_own[1] and now[0] == now[1], (all_own, now)


PPO(total_steps=64, env_fn=lambda: gymnasium.make("CartPole-v1"), hooks=[Look()],
    **{**keywords, "network_fn": Counting, "value_network_fn": Counting})
print("buffers alike\\n", end="", flush=True)
"""

# One rank's BLAS as on an older processor: its products differ in the last bits. Steps are small enough to be clipped.
PROCESSORS = (
    """
import os

if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    os.environ["OPENBLAS_CORETYPE"] = "Prescott"
"""
    + SMALL
    + """
from ppo_mpi_base.threads import blas_code

codes = world().gather_all(blas_code())
PPO(total_steps=2 * 10 * 512, env_fn=lambda: gymnasium.make("CartPole-v1"), pi_grad_clip=0.01, v_grad_clip=0.01,
    train_batch_size=32, divide_networks=False, **{**keywords, "rollout_length_per_worker": 512})
print(f"{len(set(codes))}\\n", end="", flush=True)
"""
)

ENDING = """
class Ending(Hooks):
    def on_iteration(self, worker, statistics):
        assert statistics["external_loss"] == 1  # of the one rank that gives any
        if worker.iteration == 2 and rank == 1:
            worker.end()


result = PPO(total_steps=1e9, env_fn=lambda: gymnasium.make("CartPole-v1"), hooks=[Ending()],
             external_update_callback=lambda: rank if rank > 0 else None, **keywords)
print(f"{rank} ended at {result.total_steps}\\n", end="", flush=True)
"""


# Networks whose builders differ over ranks; rank 1 is slow.
ALIKE = """
import time

import torch


def network_fn(obs_dim, out_dim=1):
    network = mlp(obs_dim, out_dim)
    with torch.no_grad():
        network[1].bias.fill_(rank + 0.5)
    return network


class Slow(gymnasium.Wrapper):
    def step(self, action):
        time.sleep(0.01 * rank)
        return self.env.step(action)


class Alike(Hooks):
    def on_start(self, worker):
        first, other = worker.ranks.gather_all(worker.flat.data.numpy().tobytes())
        assert first == other, "other weights"

    def on_rollout(self, worker, rollout):
        first, other = worker.ranks.gather_all(torch.rand(3).tolist())
        assert first != other, "the same random numbers"

    def on_iteration(self, worker, statistics):
        mine = {name: x for name, x in statistics.items() if name not in ("fps", "seconds")}
        first, other = worker.ranks.gather_all(mine)
        different = [name for name in first if str(first[name]) != str(other[name])]
        assert not different and statistics["slowest_rank"] == 1, different


PPO(total_steps=64, env_fn=lambda: Slow(gymnasium.make("CartPole-v1")), hooks=[Alike()],
    **{**keywords, "network_fn": network_fn, "value_network_fn": network_fn})
print("rows alike\\n", end="", flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the lines of four short runs, one after the other on the same two ranks."""
    done = launch(SMALL + ENDING + ORDER + BUFFERS + ALIKE, 2, str(tmp_path_factory.mktemp("said")), timeout=280)
    lines = sorted(done.stdout.splitlines())
    assert done.code == 0 and len(lines) == 4 * 2, done.stdout + done.stderr
    return lines


def one_line(done: Finished) -> str:
    """Return the only line about an error, from which all launchers' remarks are dropped."""
    assert done.code != 0
    lines = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.timeout(300)
def test_other_spaces_on_one_rank_are_told_in_one_line(tmp_path: Path) -> None:
    done = launch(SMALL + SPACES, 2, str(tmp_path), timeout=280)
    line = one_line(done)
    assert line.startswith("ConfigurationError: env_fn: the observation space on rank 1 is Box(")
    assert "(6,)" in line and "but on rank 0" in line and "(4,)" in line
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(300)
def test_an_observation_that_is_not_finite_on_one_rank_stops_all_before_a_parameter_changes(tmp_path: Path) -> None:
    done = launch(SMALL + NOT_FINITE, 2, str(tmp_path), timeout=280)
    # Global environment 4 is the second of rank 1's; its 40th observation is the one before step 39, the eighth of the
    # third iteration. Two iterations of 2 ranks x 3 environments x 16 steps came before.
    text = "observation is not finite: rank 1, environment 4, step 7 of iteration 2 (total_steps 192)"
    assert text in one_line(done)
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stdout.splitlines() == ["True 4 2"] * 2


@pytest.mark.timeout(300)
def test_a_hook_on_one_rank_ends_the_run_on_all(said: list[str]) -> None:
    assert [line for line in said if "ended" in line] == ["0 ended at 64", "1 ended at 64"]


@pytest.mark.timeout(300)
def test_other_keywords_on_one_rank_are_told_in_one_line(tmp_path: Path) -> None:
    done = launch(SMALL + KEYWORDS, 2, str(tmp_path), timeout=280)
    told = [
        "seed=1000 on rank 1, but 0 on rank 0",
        "save_location=None on rank 1, but 'a directory' on rank 0",
        "stall_seconds=None on rank 1, but 1800.0 on rank 0",
        "ConfigurationError: loss_coefficients['clip_ratio']=0.2 on rank 1, but 0.1 on rank 0",
    ]
    assert [*done.stdout.splitlines(), one_line(done)] == [f"{text}: it must be equal on all ranks" for text in told]


@pytest.mark.timeout(300)
def test_other_networks_on_one_rank_are_told_in_one_line(tmp_path: Path) -> None:
    line = one_line(launch(SMALL + NETWORKS, 2, str(tmp_path), timeout=280))
    text = r"parameter network\.1\.bias has shape \(9,\) on rank 1, but \(8,\) on rank 0"
    assert re.search(text, line), line


@pytest.mark.timeout(300)
def test_the_last_100_episodes_are_those_of_all_ranks(said: list[str]) -> None:
    assert [line for line in said if "returns" in line] == ["returns 0.5 0.5"] * 2


@pytest.mark.timeout(300)
def test_what_networks_note_in_buffers_is_rank_0s_after_each_iteration(said: list[str]) -> None:
    assert said.count("buffers alike") == 2  # the script itself compares the ranks


@pytest.mark.timeout(300)
def test_ranks_on_other_processors_stay_in_step(tmp_path: Path) -> None:
    done = launch(PROCESSORS, 2, str(tmp_path), timeout=280)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines() == ["2"] * 2, "both ranks ran the same code: the test says nothing"


@pytest.mark.timeout(300)
def test_ranks_begin_and_log_alike_but_draw_their_own_random_numbers(said: list[str]) -> None:
    assert said.count("rows alike") == 2  # the script itself compares the ranks
