# SPDX-License-Identifier: MIT
"""The few named points in training at which user code runs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, check_takes, did_you_mean

if TYPE_CHECKING:
    from ppo_mpi_base.policies import ActorCritic
    from ppo_mpi_base.rollout import Batch, Rollout
    from ppo_mpi_base.worker import Worker


class Hooks:
    """Run code at points in training: subclass this, and write the methods that you need.

    Every rank runs every hook in the same order, so a hook may call collectives of `worker.ranks`. Decisions that
    change training must come from numbers that are equal on all ranks (`statistics`, or what you reduced).
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Reject a method that is named like a hook but is none, so would never run, or takes other arguments."""
        super().__init_subclass__(**keywords)
        for name, value in vars(cls).items():
            if name in MOMENTS and isinstance(value, FunctionType):
                check_takes(f"{cls.__name__}.{name}", value, *inspect.signature(getattr(Hooks, name)).parameters)
            elif name not in MOMENTS and (name.lower().startswith("on_") or _plain(name) in map(_plain, MOMENTS)):
                known, meant = ", ".join(MOMENTS), did_you_mean(name, MOMENTS)
                raise ConfigurationError(f"{cls.__name__}.{name} would never run: the hook methods are {known}{meant}")

    def on_start(self, worker: Worker) -> None:
        """Run once, after networks and environments are built and before the first rollout: build what you need."""

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Run after each rollout, before its advantages: change rewards, or add (T, N, ...) to `rollout.extras`."""

    def on_losses(self, actor_critic: ActorCritic, batch: Batch, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run for each minibatch: return the losses to minimise, each a scalar tensor; their sum is differentiated.

        It is traced when the loss is compiled: compute with tensors only, from `batch` (and `batch.extras`).
        """
        return losses

    def on_update(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Run before each optimizer step: change `worker.learning_rates` or `worker.coefficients` during an iteration.

        `statistics` has the losses and statistics of the update's samples, equal on all ranks. With this method, all
        ranks train both networks: see `divide_networks`.
        """

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Run after the updates of each iteration: change `worker.learning_rates` or `worker.coefficients`.

        `statistics` is the iteration's log row; what you write into it is logged. All of it is equal on all ranks,
        except `fps` and `seconds`, which come from this rank's clock.
        """

    def on_end(self, worker: Worker) -> None:
        """Run once, after the last iteration, even of an interrupted run: close what you opened."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold what this hook learns, by name: checkpoints save them and restore into them.

        They may differ between ranks, such as a buffer of own samples: each rank gets back its own. A run that is
        resumed on another number of ranks gives all ranks those of rank 0, if their shapes fit.
        """
        return {}

    def does_something(self) -> bool:
        """Return whether this object has a method that runs at some point, or a state."""
        return any(self.has(name) for name in (*MOMENTS, "state"))

    def has(self, name: str) -> bool:
        """Return whether this object has a method of its own with this name of a method of `Hooks`."""
        own = getattr(self, name)
        return getattr(own, "__func__", own) is not getattr(Hooks, name)


MOMENTS = tuple(name for name in vars(Hooks) if name.startswith("on_"))


def by_name(hooks: Sequence[Hooks]) -> dict[str, Hooks]:
    """Return hooks by the names of their classes; the second of a class gets a 2, and so on."""
    named: dict[str, Hooks] = {}
    of_class: Counter[str] = Counter()
    for hook in hooks:
        kind = type(hook).__name__
        of_class[kind] += 1
        named[kind if of_class[kind] == 1 else f"{kind} {of_class[kind]}"] = hook
    return named


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
