# SPDX-License-Identifier: MIT
"""Each example and each variant on two ranks, as short as they go: what they leave, and what shows in their logs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from ppo_mpi_base.saved_policy import load_policy
from tests.mpi.launch import ROOT, launch


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]


def trained(example: str, directory: Path, total_steps: int, saved: set[str]) -> list[dict[str, float]]:
    """Run an example on two ranks, look at what it leaves, and return the rows of its log."""
    arguments = ["--total-steps", str(total_steps), "--seed", "1", "--directory", str(directory)]
    done = launch(ROOT / "examples" / example / "train.py", 2, *arguments, timeout=280)
    assert done.code == 0, done.stderr
    for ending in ("safetensors", "json"):
        assert {path.stem for path in (directory / "saved_model").glob(f"*.{ending}")} == saved
    logs = directory / "logs"
    assert (logs / "learning_curve.png").stat().st_size > 1000 and list(logs.glob("events.out*"))
    assert str(logs / "learning_curve.png") in done.stdout
    found = rows(logs / "progress.csv")
    for row in found:
        assert all(math.isfinite(row[name]) for name in ("policy_loss", "value_loss", "kl", "entropy", "fps"))
    return found


@pytest.mark.timeout(300)
def test_classic_control(tmp_path: Path) -> None:
    found = trained("classic_control", tmp_path, 4096, {"best", "latest"})
    assert [row["total_steps"] for row in found] == [1024, 2048, 3072, 4096]
    assert found[0]["learning_rate_policy"] == pytest.approx(1e-3) and found[-1]["episode_return"] > 8
    assert load_policy(tmp_path / "saved_model")(np.zeros(4, np.float32)) in (0, 1)


@pytest.mark.timeout(300)
def test_mujoco(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    found = trained("mujoco", tmp_path, 8192, {"latest"})  # no episode of 1000 steps ends in 256 of each environment
    assert [row["total_steps"] for row in found] == [4096, 8192]
    assert found[0]["entropy"] == pytest.approx(6 * (0.5 * math.log(2 * math.pi * math.e) - 0.5), abs=0.6)


@pytest.mark.timeout(300)
def test_atari(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    (row,) = trained("atari", tmp_path, 1, {"latest"})  # one iteration, in which no game ends
    assert row["total_steps"] == 1024
    assert 0.9 * math.log(6) < row["entropy"] <= math.log(6) + 1e-5  # Pong has 6 actions


VARIANTS = """
import sys
from pathlib import Path

import gymnasium
import torch

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO
from variants import kl_penalty
from variants.adaptive_learning_rate import adaptive_ppo
from variants.json_logger import JsonLogger
from variants.kl_penalty import kl_penalty_ppo
from variants.rnd import RandomNetworkDistillation, rnd_ppo

directory = Path(sys.argv[1])


def small(obs_dim, out_dim=1):
    return mlp(obs_dim, out_dim, hidden=(16,))


def settings(name, env_id="CartPole-v1", **keywords):
    return dict(total_steps=2048, env_fn=lambda: gymnasium.make(env_id), network_fn=small, value_network_fn=small,
                rollout_length_per_worker=64, use_vectorized_envs=True, num_environments=2, train_pi_epochs=5,
                train_v_epochs=5, compile=False, quiet=True, log_directory=str(directory / name), save_location=None,
                **keywords)


class Watch(Hooks):
    # Logs how well the predictor does on one fixed batch, and what its bonus adds to MountainCar's reward of -1 a step.
    def __init__(self, rnd):
        self.rnd = rnd

    def on_rollout(self, worker, rollout):
        added = worker.ranks.gather_all((rollout.rewards + 1).mean().item())
        self.added = sum(added) / len(added)
        self.lowest = (rollout.rewards + 1).min().item()

    def on_iteration(self, worker, statistics):
        batch = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = (self.rnd.predictor(batch) - self.rnd.target(batch)).square().mean().item()
        statistics.update(error=error, added=self.added, lowest=self.lowest)
        mine, *others = worker.ranks.gather_all(tuple(
            tensor.numpy().tobytes() for tensor in (self.rnd.flat.data, *self.rnd.target.state_dict().values())
        ))
        assert all(other == mine for other in others), "the ranks' predictors or targets differ"


kl_penalty_ppo(target=1e-6, **settings("above", pi_lr=3e-2))
kl_penalty_ppo(target=1e3, **settings("below"))
kl_penalty.LOWEST, kl_penalty.HIGHEST = 0.25, 4.0
kl_penalty_ppo(target=1e-6, **settings("highest", pi_lr=3e-2))
kl_penalty_ppo(target=1e3, **settings("lowest"))
adaptive_ppo(target=1e-6, **settings("falls", pi_lr=1e-2))
adaptive_ppo(target=1e3, **settings("rises", pi_lr=1e-4))
adaptive_ppo(target=1e3, **settings("annealed", pi_lr=1e-4, anneal_lr=True))
rnd_ppo(coefficient=0.1, **settings("rnd", "MountainCar-v0"))
rnd_ppo(hooks=[JsonLogger(directory / "rows.jsonl")], **settings("rnd_discrete", "FrozenLake-v1"))
saved = dict(save_location=str(directory / "saved"), resume="auto", hooks=[JsonLogger(directory / "more.jsonl")])
for rate, steps in ((1e-4, 512), (1e-3, 2048)):
    adaptive_ppo(target=1e3, **{**settings("resumed", pi_lr=rate), **saved, "total_steps": steps})
rnd = RandomNetworkDistillation()
PPO(hooks=[rnd, Watch(rnd)], **settings("watched", "MountainCar-v0"))
"""


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the logs of all variants, which one launch trains."""
    directory = tmp_path_factory.mktemp("variants")
    done = launch(VARIANTS, 2, str(directory), timeout=280)
    assert done.code == 0, done.stderr
    return directory


@pytest.mark.timeout(300)
def test_the_kl_penalty_doubles_above_its_target_and_halves_below(variants: Path) -> None:
    above, below = (rows(variants / name / "progress.csv") for name in ("above", "below"))
    assert [row["beta"] for row in above] == [2.0 ** (k + 1) for k in range(8)]
    assert [row["beta"] for row in below] == [0.5 ** (k + 1) for k in range(8)]
    assert all(row["kl"] > 1.5e-6 for row in above)
    highest, lowest = (rows(variants / name / "progress.csv") for name in ("highest", "lowest"))
    assert [row["beta"] for row in highest] == [2.0] + [4.0] * 7
    assert [row["beta"] for row in lowest] == [0.5] + [0.25] * 7


@pytest.mark.timeout(300)
def test_the_learning_rate_follows_the_kl_within_its_bounds(variants: Path) -> None:
    falls, rises, annealed = (rows(variants / name / "progress.csv") for name in ("falls", "rises", "annealed"))
    # An iteration has five updates. Before the first, the policy is the one that acted, so its KL is 0: the rate rises,
    # except in the first iteration, where it is already the highest.
    assert [row["learning_rate_policy"] for row in falls[:2]] == pytest.approx([1e-2 / 1.5**4, 1e-2 / 1.5**7])
    assert falls[-1]["learning_rate_policy"] < 2e-4
    rising = [min(1e-2, 1e-4 * 1.5 ** (5 * k)) for k in range(1, 9)]
    assert [row["learning_rate_policy"] for row in rises] == pytest.approx(rising)
    assert all(row["learning_rate_value"] == row["learning_rate_policy"] for row in falls + rises)
    assert [row["learning_rate_policy"] for row in annealed] == [row["learning_rate_policy"] for row in rises]
    rates = [row["learning_rate_policy"] for row in rows(variants / "resumed" / "progress.csv")]
    assert rates == pytest.approx(rising[:2] + [min(1e-2, 1e-3 * 1.5 ** (5 * k)) for k in range(1, 7)])


@pytest.mark.timeout(300)
def test_random_network_distillation_rewards_novelty_that_wears_off(variants: Path) -> None:
    found = rows(variants / "watched" / "progress.csv")
    errors = [row["error"] for row in found]
    assert errors[-1] < 0.9 * errors[0]
    assert all(row["bonus"] > 1e-3 and row["lowest"] >= 0 for row in found)
    assert [row["bonus"] for row in found] == pytest.approx([row["added"] for row in found], rel=1e-5)
    for name in ("rnd", "rnd_discrete"):
        assert len(rows(variants / name / "progress.csv")) == 8
