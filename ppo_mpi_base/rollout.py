# SPDX-License-Identifier: MIT
"""What one rank collects in an iteration, its advantages, and the order in which minibatches are drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.mpi import Communicator


class Batch(NamedTuple):
    """B samples of a rollout, in the dtypes of `Rollout`; what a loss function sees."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    extras: dict[str, Tensor]

    def layout(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Return the name, shape and dtype of each tensor."""
        named = [*zip(self._fields[:-1], self[:-1], strict=True), *self.extras.items()]
        return [(name, x.shape, x.dtype) for name, x in named]

    def empty_like(self) -> Batch:
        """Return a batch of the same shapes and dtypes, with its own memory."""
        extras = {name: torch.empty_like(x) for name, x in self.extras.items()}
        return Batch._make([*map(torch.empty_like, self[:-1]), extras])

    @torch.no_grad()
    def gather_(self, samples: Batch, order: Tensor) -> None:
        """Overwrite sample k with sample `order[k]` of another batch; `order` is (B,) int64."""
        for x, content in zip(self[:-1], samples[:-1], strict=True):
            torch.index_select(content, 0, order, out=x)
        for name, x in self.extras.items():
            torch.index_select(samples.extras[name], 0, order, out=x)

    def split(self, size: int) -> list[Batch]:
        """Return batches of `size` samples each, the last with what is left; they share this one's memory."""
        columns = zip(*(x.split(size) for x in self[:-1]), strict=True)
        extras = {name: x.split(size) for name, x in self.extras.items()}
        return [Batch._make([*column, {name: x[k] for name, x in extras.items()}]) for k, column in enumerate(columns)]


@dataclass
class Rollout:
    """T steps of the N environments of one rank; the storage is reused in the next iteration.

    Attributes:
        observations: (T, N, *shape), in the observation space's own dtype, not normalized.
        next_observations: (T, N, *shape), as acted on next: after an episode's end, the first one of the next episode.
        actions: (T, N, *shape), as sampled (not clipped), or int64 in [0, n) for a Discrete space.
        rewards: (T, N), as used for learning: after `clip_rewards` and `normalize_rewards`.
        terminated, truncated: (T, N) bool, never both.
        log_probs, values: (T, N), of the policy and value function that collected the rollout.
        next_values: (T, N), the value of the observation that each step led to: at a truncation, of the episode's
            final observation, never of the one after the reset.
        advantages, returns: (T, N), filled by the algorithm.
        extras: more tensors (T, N, ...), from hooks or `advantage_fn`; minibatches include them.
        iteration: number of earlier iterations.
        total_steps: agent steps over all ranks, including these.
    """

    observations: Tensor
    next_observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)
    extras: dict[str, Tensor] = field(default_factory=dict)
    iteration: int = 0
    total_steps: int = 0

    @property
    def done(self) -> Tensor:
        """Where an episode ended, for either reason: (T, N) bool."""
        return self.terminated | self.truncated

    def samples(self) -> Batch:
        """Return all T*N samples as one batch; step t in environment i is at t*N + i."""
        return Batch(
            self.observations.flatten(0, 1),
            self.actions.flatten(0, 1),
            self.log_probs.flatten(0, 1),
            self.values.flatten(0, 1),
            self.advantages.flatten(0, 1),
            self.returns.flatten(0, 1),
            {name: x.flatten(0, 1) for name, x in self.extras.items()},
        )


class Shuffled:
    """The samples of an epoch in its order, as minibatches of `size`; all epochs of a run use the same memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._whole: Batch | None = None
        self._minibatches: list[Batch] = []

    def epochs(self, samples: Batch, orders: Iterable[np.ndarray]) -> Iterator[list[Batch]]:
        """Yield each epoch's minibatches, the last with what is left; each epoch overwrites the one before.

        Args:
            samples: all T*N of an iteration.
            orders: for each epoch, (T*N,) indices into them.
        """
        whole = self._whole
        if whole is None or whole.layout() != samples.layout():  # the first call, or a hook has changed the extras
            whole = self._whole = samples.empty_like()
            self._minibatches = whole.split(self.size)  # once: making so many tensors takes as long as filling them
        for order in orders:
            whole.gather_(samples, torch.as_tensor(order, device=samples.advantages.device))
            yield self._minibatches


def gae(rollout: Rollout, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    r"""Return generalized advantage estimates and value targets, both (T, N).

    Source: Schulman et al. (2016), arxiv.org/abs/1506.02438, equations 11 and 16.

    \delta_t = r_t + \gamma (1 - terminated_t) V(s'_t) - V(s_t)
    A_t      = \delta_t + \gamma \lambda (1 - done_t) A_{t+1}

    where s'_t is the observation that step t led to, including final ones of truncated episodes. Value targets are
    A_t + V(s_t).
    """
    values = rollout.values
    deltas = rollout.rewards + gamma * rollout.next_values.masked_fill(rollout.terminated, 0.0) - values
    decay = (gamma * lam) * (~rollout.done).to(values.dtype)
    advantages = torch.empty_like(values)
    following = torch.zeros_like(values[0])
    rows = zip(deltas.unbind(), decay.unbind(), advantages.unbind(), strict=True)  # each is indexed only once
    for delta, weight, advantage in reversed(list(rows)):
        following = torch.addcmul(delta, weight, following, out=advantage)
    return advantages, advantages + values


def checked_estimates(advantage_fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an advantage estimate whose results are checked: tensors (T, N) of numbers, without a gradient.

    Raises:
        ConfigurationError: it returns something else.
        TrainingError: a number is not finite.
    """

    def estimate(rollout: Rollout, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        returned = advantage_fn(rollout, gamma, lam)
        shape = tuple(rollout.rewards.shape)
        wanted = f"advantage_fn must return (advantages, value targets), each a floating-point tensor (T, N) = {shape}"
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            found = f"{len(returned)} things" if isinstance(returned, tuple | list) else type(returned).__name__
            raise ConfigurationError(f"{wanted}, not {found}")
        for name, x in zip(("advantages", "value targets"), returned, strict=True):
            if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
                found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ConfigurationError(f"{wanted}, but its {name} are {found}")
            if x.device != rollout.rewards.device:
                raise ConfigurationError(f"{wanted} on {rollout.rewards.device}, but its {name} are on {x.device}")
            if not x.isfinite().all():
                raise TrainingError(f"advantage_fn: its {name} are not all finite")
        advantages, targets = returned
        return advantages.detach(), targets.detach()

    return estimate


Step = tuple[np.ndarray, np.ndarray, float, float, float]
"""(observation, action, reward, value, log-probability) of one step, as a `rollout_interception_callback` sees it."""


def intercept(rollout: Rollout, callback: Callable[[list[Step]], list[Step]]) -> None:
    """Call the callback on steps up to each episode's or the rollout's end, and write back what it returns.

    Raises:
        ConfigurationError: the callback returned no sequence, or another number of steps than it got.
    """
    columns = [rollout.observations, rollout.actions, rollout.rewards, rollout.values, rollout.log_probs]
    length, environments = rollout.rewards.shape
    done = rollout.done.cpu()
    for i in range(environments):
        ends = [*(t + 1 for t in range(length - 1) if done[t, i]), length]
        for start, end in zip([0, *ends], ends, strict=False):
            steps = list(zip(*(x[start:end, i].cpu().numpy().copy() for x in columns), strict=True))
            changed = callback(steps)
            if not isinstance(changed, Sequence):
                raise ConfigurationError(
                    f"rollout_interception_callback must return a list of steps, not {type(changed).__name__}"
                )
            if len(changed) != len(steps):
                raise ConfigurationError(
                    f"rollout_interception_callback returned {len(changed)} steps for {len(steps)}: "
                    "it must not change their number"
                )
            for column, values in zip(columns, zip(*changed, strict=True), strict=True):
                column[start:end, i] = torch.as_tensor(np.stack(values), dtype=column.dtype, device=column.device)


def explained_variance(values: Tensor, returns: Tensor, ranks: Communicator) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over all ranks, from (T, N) of each.

    It is 1 for a perfect value function, 0 for one no better than a constant, and NaN if the returns do not vary.
    Collective: call on all ranks.
    """
    errors, targets = (returns - values).double(), returns.double()
    parts = torch.stack([errors.sum(), errors.square().sum(), targets.sum(), targets.square().sum()])
    sums = np.array([targets.numel(), *parts.tolist()])
    ranks.sum_(sums)
    n, error, error_squares, target, target_squares = sums
    variance = target_squares - target**2 / n
    varies = variance > 1e-12 * target_squares  # anything less is rounding of the two sums
    return float(1 - (error_squares - error**2 / n) / variance) if varies else float("nan")


def minibatch_order(length: int, generators: list[np.random.Generator], between: np.random.Generator) -> np.ndarray:
    """Return the order (T*N,) in which an epoch visits the samples (t, i) of a rank, as indices t*N + i.

    Any N consecutive samples, starting at a multiple of N, have one from each environment, at a time step drawn by
    that environment's own generator. So a minibatch of a multiple of N samples has equally many from each environment,
    and R ranks together draw what one rank with all their environments would draw.

    Args:
        length: T.
        generators: one for each of the N environments.
        between: shuffles the environments within such a group, for minibatches smaller than N.
    """
    n = len(generators)
    times = np.stack([generator.permutation(length) for generator in generators], axis=1)
    order = times * n + np.arange(n)
    return between.permuted(order, axis=1).ravel()
