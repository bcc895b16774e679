# SPDX-License-Identifier: MIT
"""The few named moments of training at which a user's code runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    from ppo_mpi_base.policies import ActorCritic
    from ppo_mpi_base.rollout import Batch, Rollout
    from ppo_mpi_base.worker import Worker


class Hooks:
    """Do something at a moment of training: subclass, and write the methods that you need.

    Every rank runs every hook in the same order, so that a hook may call collectives of `worker.ranks`. Decisions that
    change the training must come from figures that are equal on all ranks (`statistics`, or what you reduced).
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Reject a method that is named as a moment, but is none: it would never run."""
        super().__init_subclass__(**keywords)
        moments = [name for name in vars(Hooks) if name.startswith("on_")]
        for name in vars(cls):
            if name.startswith("on_") and name not in moments:
                known, meant = ", ".join(moments), did_you_mean(name, moments)
                raise ConfigurationError(f"{cls.__name__}.{name} would never run: there are {known}{meant}")

    def on_start(self, worker: Worker) -> None:
        """Run once, after networks and environments are built and before the first rollout: build what you need."""

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Run after each rollout, before its advantages: change rewards, or add (T, N, ...) to `rollout.extras`."""

    def on_losses(self, actor_critic: ActorCritic, batch: Batch, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run in each minibatch: return the losses to minimise, each a scalar tensor; their sum is differentiated.

        It is traced when the loss is compiled: compute with tensors only, from `batch` (and `batch.extras`).
        """
        return losses

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Run after the updates of each iteration: change `worker.learning_rates` or `worker.coefficients`.

        `statistics` is the iteration's row of the logs; what you write into it is logged. All but `fps` and `seconds`,
        which are this rank's clock, is equal on all ranks.
        """

    def on_end(self, worker: Worker) -> None:
        """Run once, after the last iteration, also of a run that was interrupted: close what you opened."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold what this hook learns, by name: checkpoints save and fill them."""
        return {}
