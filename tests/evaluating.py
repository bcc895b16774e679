# SPDX-License-Identifier: MIT
"""An environment that draws from everything, a policy for it, tiny trainings, and what tells two of them apart."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.worker import Worker

OBSERVATIONS = Box(-np.inf, np.inf, (4,), np.float32)
ACTIONS = Box(-1.0, 1.0, (2,), np.float32)


def policy_of(
    network: nn.Module | None = None, actions: gymnasium.Space = ACTIONS, normalize: bool = False, log_std: float = 0.0
) -> ActorCritic:
    torch.manual_seed(0)
    n = int(actions.n) if isinstance(actions, Discrete) else actions.shape[0]
    return ActorCritic(network or mlp(4, n, (64, 64)), mlp(4), OBSERVATIONS, actions, log_std, normalize)


class Drawing(gymnasium.Env):
    """Draws from its own generator and all global ones; counts its resets and how many of it are there."""

    observation_space, action_space = OBSERVATIONS, ACTIONS
    built = closed = 0

    def __init__(self) -> None:
        type(self).built += 1
        self.resets, self.at_first = 0, np.random.uniform()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.resets = 0, self.resets + 1
        self.horizon = int(self.np_random.integers(1, 9))
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        drawn = self.np_random.normal(), np.random.normal(), random.random(), torch.rand(()).item()
        return np.array(drawn, np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert ACTIONS.contains(action), action
        self.steps += 1
        observation = self._observe()
        reward = float(observation.sum() + action.sum() + self.at_first + 10 * (self.resets - 1))
        return observation, reward, self.steps == self.horizon, False, {}

    def close(self) -> None:
        type(self).closed += 1


small = partial(mlp, hidden=(8,))


def train(directory: Path, **keywords: Any) -> Worker:
    """Train for four iterations of 16 steps, or as the keywords say, and return the worker."""

    class Keep(Hooks):
        def on_start(self, worker: Worker) -> None:
            self.worker = worker

    keep = Keep()
    np.random.seed(0)
    random.seed(0)
    given: dict[str, Any] = {
        "total_steps": 64,
        "env_fn": Drawing,
        "network_fn": small,
        "value_network_fn": small,
        "rollout_length_per_worker": 16,
        "train_batch_size": 8,
        "train_pi_epochs": 2,
        "train_v_epochs": 2,
        "normalize_observations": True,
        "normalize_rewards": True,
        "log_directory": directory / "logs",
        "save_location": directory / "saved",
        "checkpoint_seconds": 0,
        "resume": "auto",
        "compile": False,
        "quiet": True,
        "hooks": [keep],
        **keywords,
    }
    PPO(**given)
    return keep.worker


def rows(directory: Path) -> list[dict[str, float]]:
    found = read_progress(directory / "logs" / "progress.csv")[1]
    return [{name: float(text) for name, text in row.items()} for row in found]


def rest(row: dict[str, float]) -> dict[str, float]:
    """Return the part of a row that is neither about evaluation nor about time."""
    others = ("evaluation_", "time_", "fps", "seconds", "slowest_rank")
    return {name: value for name, value in row.items() if not name.startswith(others)}


def state(worker: Worker) -> list[bytes]:
    tensors = [*worker.actor_critic.state_dict().values(), *worker.learner.optimizer.state().values()]
    arrays = [x.detach().numpy() for x in tensors] + [*worker.environments.progress().values()]
    return [np.asarray(array).tobytes() for array in (*arrays, np.random.get_state()[1], torch.get_rng_state())]
