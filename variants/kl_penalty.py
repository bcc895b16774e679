# SPDX-License-Identifier: MIT
"""PPO with an adaptive KL penalty instead of clipping: Schulman et al. (2017), arxiv.org/abs/1707.06347, section 4."""

from collections.abc import Sequence
from typing import Any

import gymnasium
from torch import Tensor

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.ppo import PPO, approximate_kl, value_loss
from ppo_mpi_base.rollout import Batch
from ppo_mpi_base.worker import Result, Worker

LOWEST, HIGHEST = 1e-6, 1e6
"""Limits of beta: doubling 0 would have no effect, and infinity times a KL of 0 is NaN."""


def kl_penalty_losses(
    actor_critic: ActorCritic, batch: Batch, coefficients: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of equation 8: minus (surrogate - beta KL(pi_old | pi)), and the squared error of the value."""
    policy, values = actor_critic.policy_and_value(batch.observations)
    log_probs = policy.log_prob(batch.actions)
    kl = approximate_kl(log_probs, batch.log_probs)
    surrogate = ((log_probs - batch.log_probs).exp() * batch.advantages).mean()
    losses = {"policy": coefficients["beta"] * kl - surrogate, "value": value_loss(values, batch.returns)}
    return losses, {"kl": kl, "entropy": policy.entropy().mean()}


class AdaptBeta(Hooks):
    """Doubles beta if the last epoch's KL is above 1.5 times the target, and halves it if below the target / 1.5."""

    def __init__(self, target: float) -> None:
        self.target = target

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Compare the KL, which is equal on all ranks, with the target."""
        beta = worker.coefficients["beta"]
        if "kl" not in statistics:  # nothing was learned in this iteration
            return
        if statistics["kl"] > 1.5 * self.target:
            beta.mul_(2).clamp_(max=HIGHEST)
        elif statistics["kl"] < self.target / 1.5:
            beta.div_(2).clamp_(min=LOWEST)
        statistics["beta"] = beta.item()


def kl_penalty_ppo(target: float = 0.01, hooks: Sequence[Hooks] = (), **keywords: Any) -> Result:
    """Train like `PPO(**keywords)`, but with the penalized objective."""
    adapted = [AdaptBeta(target), *hooks]
    return PPO(loss_fn=kl_penalty_losses, loss_coefficients={"beta": 1.0}, hooks=adapted, **keywords)


if __name__ == "__main__":
    kl_penalty_ppo(total_steps=1e5, env_fn=lambda: gymnasium.make("CartPole-v1"), network_fn=mlp, value_network_fn=mlp)
