# SPDX-License-Identifier: MIT
"""The memory for a rank's rollouts, allocated once."""

from __future__ import annotations

from dataclasses import dataclass, field

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from ppo_mpi_base.policies import action_noise
from ppo_mpi_base.seeding import ACTIONS, generator


@dataclass
class Storage:
    """The data of T steps of N environments, in host memory that tensors share.

    Attributes:
        observations: (T+1, N, *shape) in the observation space's own dtype; row T is where the next rollout starts.
        actions: (T, N, *shape) as sampled, in the default dtype, or int64.
        log_probs, values: (T, N), if one network returns them with the actions.
        rewards: (T, N) float64, raw.
        terminated, truncated: (T, N) bool.
        final_observations: (t, i) -> the last observation of an episode truncated in step t of environment i.
    """

    length: int
    environments: int
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    final_observations: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Allocate."""
        size = (self.length, self.environments)
        shape = self.observation_space.shape or ()
        self.observations = np.zeros((self.length + 1, self.environments, *shape), self.observation_space.dtype)
        dtype = torch.int64 if isinstance(self.action_space, Discrete) else torch.get_default_dtype()
        self.actions = torch.zeros((*size, *(self.action_space.shape or ())), dtype=dtype)
        self.log_probs, self.values = torch.zeros(size), torch.zeros(size)
        self.rewards = np.zeros(size)
        self.terminated = np.zeros(size, bool)
        self.truncated = np.zeros(size, bool)

    @property
    def done(self) -> np.ndarray:
        """Where an episode ended: (T, N) bool."""
        return self.terminated | self.truncated

    def begin(self) -> None:
        """Forget the previous rollout's final observations."""
        self.final_observations.clear()

    def put(self, t: int, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> None:
        """Store the results of step t, (N,) each."""
        self.rewards[t], self.terminated[t], self.truncated[t] = rewards, terminated, truncated

    def keep_final(self, t: int, final_observations: dict[int, np.ndarray]) -> None:
        """Store the last observations of episodes truncated in step t, to bootstrap from their values."""
        for i, observation in final_observations.items():
            if self.truncated[t, i]:
                self.final_observations[t, i] = observation

    def start_next(self) -> None:
        """Let the next rollout begin where this one ended."""
        self.observations[0] = self.observations[-1]

    def noise(self, seed: int, first_global_index: int, iteration: int) -> Tensor:
        """Return the action noise for an iteration, (T, N, ...), keyed by each environment's global index."""
        columns = [
            action_noise(self.action_space, generator(seed, ACTIONS, first_global_index + i, iteration), self.length)
            for i in range(self.environments)
        ]
        return torch.as_tensor(np.stack(columns, axis=1), dtype=torch.get_default_dtype())

    def first_bad(self) -> tuple[str, int, int] | None:
        """Return what is not finite, and in which step and environment: (source, t, i), or None."""
        for source, values in (("observation", self.observations), ("reward", self.rewards)):
            with np.errstate(over="ignore", invalid="ignore"):  # finite float16 may overflow; inf - inf is invalid
                suspect = values.dtype.kind == "f" and not np.isfinite(values.sum())
            if suspect:
                bad = ~np.isfinite(values).reshape(*values.shape[:2], -1).all(-1)
                if bad.any():
                    t, i = np.argwhere(bad)[0]
                    return source, int(t), int(i)
        for (t, i), final in self.final_observations.items():
            if final.dtype.kind == "f" and not np.isfinite(final).all():
                return "final observation", t, i
        return None
