# SPDX-License-Identifier: MIT
"""Running moments of observations and of returns, merged over ranks."""

from __future__ import annotations

import numpy as np
import torch

from ppo_mpi_base.mpi import Communicator

EPSILON = 1e-8
OBSERVATION_CLIP = 10.0
REWARD_CLIP = 10.0


class RunningMoments:
    """Count, mean and sum of squared deviations of all samples that any rank has seen, in float64."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = np.zeros(1)
        self.mean = np.zeros(shape)
        self.squares = np.zeros(shape)

    @property
    def std(self) -> np.ndarray:
        """The standard deviation, in the shape of the mean; ones before the first sample."""
        if self.count[0] == 0:
            return np.ones_like(self.mean)
        return np.sqrt(self.squares / self.count[0] + EPSILON)

    def update(self, samples: np.ndarray, ranks: Communicator) -> None:
        """Merge each rank's samples (n, *shape) into the moments, which stay equal on all ranks.

        Two reductions: the mean first, then the squared deviations from it, so that a large mean costs no precision.
        Merged as in Chan et al. (1979). Collective: call on all ranks.
        """
        samples = np.asarray(samples, np.float64)
        total = np.concatenate([[len(samples)], samples.sum(0).ravel()])
        ranks.sum_(total)
        count, mean = total[0], (total[1:] / total[0]).reshape(self.mean.shape)
        squares = np.atleast_1d(((samples - mean) ** 2).sum(0))
        ranks.sum_(squares)

        delta, seen = mean - self.mean, self.count[0] + count
        self.mean += delta * (count / seen)
        self.squares += squares.reshape(self.mean.shape) + delta**2 * (self.count[0] * count / seen)
        self.count[0] = seen

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors that share the moments' memory; writing into them restores the moments."""
        arrays = {"count": self.count, "mean": self.mean, "squares": self.squares}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, as in Engstrom et al. (2020).

    Source: arxiv.org/abs/2005.12729, appendix A.2. Each episode's return starts at 0, also after a truncation.
    """

    def __init__(self, environments: int, gamma: float) -> None:
        self.gamma = gamma
        self.returns = np.zeros(environments)
        self.moments = RunningMoments()

    def normalize(self, rewards: np.ndarray, done: np.ndarray, ranks: Communicator) -> np.ndarray:
        """Return rewards (T, N) scaled and clipped to 10; `done` (T, N) is True where an episode ended in that step.

        Collective: call on all ranks.
        """
        running = np.empty_like(rewards, np.float64)
        for t in range(len(rewards)):
            self.returns = self.returns * self.gamma + rewards[t]
            running[t] = self.returns
            self.returns[done[t]] = 0.0
        self.moments.update(running.ravel(), ranks)
        return np.clip(rewards / self.moments.std, -REWARD_CLIP, REWARD_CLIP)
