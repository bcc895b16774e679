# SPDX-License-Identifier: MIT
"""The gradient of the user's losses, and the policy's actions: run as they are written, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ppo_mpi_base.flat_parameters import FlatParameters
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.rollout import Batch

LossFunction = Callable[[ActorCritic, Batch, dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]


class Objective(nn.Module):
    """The sum of the losses that are being minimised, and the statistics, as one function of the parameters."""

    def __init__(self, actor_critic: ActorCritic, loss_fn: LossFunction, hooks: Sequence[Hooks]) -> None:
        super().__init__()
        self.actor_critic, self.loss_fn, self.hooks = actor_critic, loss_fn, list(hooks)

    def terms(self, batch: Batch, coefficients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the named losses, after all hooks, and the statistics with the losses among them."""
        losses, statistics = self.loss_fn(self.actor_critic, batch, coefficients)
        for hook in self.hooks:
            losses = hook.on_losses(self.actor_critic, batch, losses)
        return losses, {**{f"{name}_loss": loss for name, loss in losses.items()}, **statistics}

    def forward(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str]) -> tuple[Tensor, Tensor]:
        """Return the sum of all losses but the idle ones, a scalar, and the statistics, (S,)."""
        losses, statistics = self.terms(batch, coefficients)
        total = torch.stack([loss for name, loss in losses.items() if name not in idle]).sum()
        return total, torch.stack([value.detach() for value in statistics.values()])


class EagerGradients:
    """Adds gradients to the flat gradient by autograd, operation by operation."""

    def __init__(self, objective: Objective, flat: FlatParameters) -> None:
        self.objective, self.flat = objective, flat

    def add(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str], weight: float) -> None:
        """Add `weight` times the gradient, and the statistics, of one minibatch to the flat message."""
        total, statistics = self.objective(batch, coefficients, idle)
        (total * weight).backward()
        self.flat.statistics.add_(statistics, alpha=weight)

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampled actions for observations (N, ...), and what the environments get."""
        return self.objective.actor_critic.act(observations, noise)
