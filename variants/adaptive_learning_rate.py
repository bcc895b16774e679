# SPDX-License-Identifier: MIT
"""PPO with a learning rate adapted to the KL, after Rudin et al. (2022), arxiv.org/abs/2109.11978."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import torch

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.worker import Result, Worker


class AdaptiveLearningRate(Hooks):
    """Before each update, divides the learning rates by 1.5 if its KL is above twice the target.

    Multiplies them by 1.5 if the KL is below half of it.
    """

    def __init__(self, target: float = 0.01, lowest: float = 1e-5, highest: float = 1e-2) -> None:
        self.target, self.lowest, self.highest = target, lowest, highest

    def on_start(self, worker: Worker) -> None:
        """Start from `pi_lr`, and keep the rate here, since `anneal_lr` overwrites the worker's."""
        self.began_with = torch.tensor(worker.config.pi_lr, dtype=torch.float64)
        self.rate = self.began_with.clone()

    def on_update(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Compare the KL of the update's samples, which is equal on all ranks, with the target."""
        if "policy" not in worker.learner.moving():  # its epochs are over, so its KL does not change
            return
        if self.began_with.item() != worker.config.pi_lr:  # resumed with another `pi_lr`, which counts from then on
            self.began_with.fill_(worker.config.pi_lr)
            self.rate.fill_(worker.config.pi_lr)
        rate = self.rate.item()
        if statistics["kl"] > 2 * self.target:
            rate = max(self.lowest, rate / 1.5)
        elif statistics["kl"] < self.target / 2:
            rate = min(self.highest, rate * 1.5)
        self.rate.fill_(rate)
        worker.learning_rates = dict.fromkeys(worker.learning_rates, rate)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs."""
        return {"rate": self.rate, "began_with": self.began_with}


def adaptive_ppo(target: float = 0.01, hooks: Sequence[Hooks] = (), **keywords: Any) -> Result:
    """Train like `PPO(**keywords)`, but with the adaptive learning rate of both networks, which starts at `pi_lr`."""
    return PPO(hooks=[AdaptiveLearningRate(target), *hooks], **keywords)


if __name__ == "__main__":
    adaptive_ppo(total_steps=1e5, env_fn=lambda: gymnasium.make("CartPole-v1"), network_fn=mlp, value_network_fn=mlp)
