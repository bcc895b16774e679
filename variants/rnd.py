# SPDX-License-Identifier: MIT
"""PPO with random network distillation, a reward for novelty: Burda et al. (2019), arxiv.org/abs/1810.12894."""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch

from ppo_mpi_base.flat_parameters import Adam, FlatParameters
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.normalize import OBSERVATION_CLIP, RunningMoments
from ppo_mpi_base.policies import observation_dim
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.rollout import Rollout
from ppo_mpi_base.worker import Result, Worker


class RandomNetworkDistillation(Hooks):
    """Rewards the predictor's error on a fixed random network at the next observation, in standard deviations."""

    def __init__(self, coefficient: float = 0.5, learning_rate: float = 1e-3, features: int = 16) -> None:
        self.coefficient, self.learning_rate, self.features = coefficient, learning_rate, features

    def on_start(self, worker: Worker) -> None:
        """Build both networks, equal on all ranks because all have drawn the same random numbers so far."""
        space = worker.environments.observation_space
        self.is_discrete = isinstance(space, gymnasium.spaces.Discrete)
        shape = (observation_dim(space),) if self.is_discrete else space.shape or ()
        self.target, self.predictor = (mlp(math.prod(shape), self.features).to(worker.device) for _ in range(2))
        self.flat = FlatParameters({"predictor": list(self.predictor.parameters())})
        self.optimizer = Adam(self.flat)
        self.observations, self.errors = RunningMoments(shape), RunningMoments()

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Reward novelty, then train the predictor by one step on the observations, which makes them less novel."""
        seen = rollout.next_observations.flatten(0, 1)
        if self.is_discrete:
            seen = worker.actor_critic.preprocess(seen)  # one-hot
        self.observations.update(seen.cpu().numpy(), worker.ranks)
        moments = self.observations.mean, self.observations.std
        mean, std = (torch.as_tensor(x, device=worker.device) for x in moments)
        inputs = ((seen - mean) / std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP).to(self.flat.data.dtype)
        inputs = inputs.reshape(len(inputs), -1)
        errors = (self.predictor(inputs) - self.target(inputs).detach()).square().mean(-1)
        self.errors.update(errors.detach().cpu().numpy(), worker.ranks)
        bonus = self.coefficient * errors.detach() / float(self.errors.std)
        rollout.rewards += bonus.view_as(rollout.rewards)
        self.bonus = np.array([bonus.mean().item()])
        worker.ranks.mean_(self.bonus)
        self.flat.message.zero_()
        errors.mean().backward()
        self.flat.to_host()
        worker.ranks.mean_(self.flat.host)
        self.flat.from_host()
        self.optimizer.step({"predictor": self.learning_rate})

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Log the bonus, which no logged return includes."""
        statistics["bonus"] = float(self.bonus[0])

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that a resumed run needs; the target is drawn again from the seed."""
        parts = {"adam": self.optimizer.state(), "seen": self.observations.state(), "errors": self.errors.state()}
        named = {f"{part}/{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
        return {"predictor": self.flat.data, **named}


def rnd_ppo(coefficient: float = 0.5, hooks: Sequence[Hooks] = (), **keywords: Any) -> Result:
    """Train like `PPO(**keywords)`, but with the bonus times `coefficient` added to the rewards."""
    return PPO(hooks=[RandomNetworkDistillation(coefficient), *hooks], **keywords)


if __name__ == "__main__":
    rnd_ppo(total_steps=1e5, env_fn=lambda: gymnasium.make("MountainCar-v0"), network_fn=mlp, value_network_fn=mlp)
