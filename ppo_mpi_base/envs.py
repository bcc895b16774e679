# SPDX-License-Identifier: MIT
"""The N environments of one rank, stepped together: seeding, all autoreset modes made equal, episode statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.seeding import EPISODES, generator, seed_sequence


class Episode(NamedTuple):
    """A finished episode: its undiscounted return of raw rewards, its length in steps, its environment's local index."""

    return_: float
    length: int
    environment: int


class Transition(NamedTuple):
    """What one step of N environments gave; its arrays belong to the caller.

    Attributes:
        rewards: (N,) float64, as the environments gave them.
        terminated, truncated: (N,) bool, never both; a step that is both counts as terminated.
        final_observations: local index -> the last observation of the episode that this step ended.
        episodes: the episodes that this step ended, for statistics only; see `Environments`.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: dict[int, np.ndarray]
    episodes: list[Episode]


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raise `ConfigurationError` unless observations and actions are Box (any shape) or Discrete (any start)."""
    for name, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Box | Discrete):
            raise ConfigurationError(f"env_fn: the {name} space {space} is not supported, only Box and Discrete are")


def first_seed(seed: int, global_index: int) -> int:
    """Return the seed of an environment's first reset, in [0, 2**31): ALE keeps seeds in 32 bits with a sign."""
    return int(seed_sequence(seed, EPISODES, global_index, 0).generate_state(1)[0] >> 1)


class Environments:
    """Step the N environments of one rank together, and begin a new episode where one has ended.

    A list of environments is stepped in a loop, and each episode is a function of (seed, global index, number of the
    episode) and its actions. A vector environment is seeded once; in all of its autoreset modes, the transitions are
    those of the list: an episode's last observation is in `final_observations`, and the step after it is the first
    of the next episode. Nothing that an environment returns is kept: it may reuse its arrays.

    `Transition.episodes` counts raw rewards and steps. An environment that itself reports `info["episode"]` (`{"r",
    "l"}`, as Gymnasium's RecordEpisodeStatistics does) is believed instead from its first report on: where each lost
    life ends an episode for training, it reports whole games.

    Args:
        environments: N environments, or one vector environment of N.
        seed: the run's seed, at least 0.
        first_global_index: global index of the first of them, rank * N.
        max_ep_len: steps after which an episode is truncated.
        state_processing_hook: function of one observation; what it returns takes the observation's place.
        obs_space_override: the space of what `state_processing_hook` or a wrapper makes of an observation.

    Attributes:
        num_envs: N.
        observation_space, action_space: those of a single environment, after `obs_space_override`.

    Raises:
        ConfigurationError: spaces that are unequal or not supported, an environment that is there twice, or a vector
            environment whose autoreset cannot be steered.
    """

    def __init__(
        self,
        environments: Sequence[gym.Env] | VectorEnv,
        *,
        seed: int,
        first_global_index: int,
        max_ep_len: int | None = None,
        state_processing_hook: Callable[[Any], Any] | None = None,
        obs_space_override: gym.Space | None = None,
    ) -> None:
        self._vector = environments if isinstance(environments, VectorEnv) else None
        self._list: list[gym.Env] = [] if isinstance(environments, VectorEnv) else list(environments)
        if self._vector is not None:
            self._mode = _autoreset_mode(self._vector)
            self.num_envs = self._vector.num_envs
            self.observation_space = self._vector.single_observation_space
            self.action_space = self._vector.single_action_space
        else:
            _check_alike(self._list, first_global_index)
            self.num_envs = len(self._list)
            self.observation_space = self._list[0].observation_space
            self.action_space = self._list[0].action_space
        self.observation_space = obs_space_override or self.observation_space
        check_spaces(self.observation_space, self.action_space)
        self._shape = self.observation_space.shape
        self._seed, self._first, self._max_ep_len, self._hook = seed, first_global_index, max_ep_len, state_processing_hook

    def reset(self, out: np.ndarray) -> None:
        """Begin the first episode of every environment; again, it begins the same episodes again.

        Args:
            out: (N, *observation shape) in the observation space's dtype; receives the first observations.

        Raises:
            TrainingError: an observation does not fit the observation space.
        """
        self._clock = 0  # steps since reset
        self._starts = [0] * self.num_envs  # the clock when each environment's episode began
        self._episodes = [0] * self.num_envs  # number of each environment's next episode
        self._returns = np.zeros(self.num_envs)
        self._reporting: set[int] = set()  # environments that report their own episodes
        if self._vector is None:
            self._restart_list(range(self.num_envs), out)
            return
        # Gymnasium wants Python integers in a sequence, ALE wants an array: this is both.
        seeds: Any = np.array([first_seed(seed=self._seed, global_index=g) for g in self._globals()], dtype=object)
        try:
            observations, _ = self._vector.reset(seed=seeds)
        except gym.error.Error as error:
            raise ConfigurationError(f"make_vec_env_fn: {self._vector} must take a sequence of seeds: {error}") from error
        for i in range(self.num_envs):
            out[i] = self._castable(i, self._processed(i, observations[i]))

    def step(self, actions: np.ndarray, out: np.ndarray) -> Transition:
        """Take one step in every environment.

        Args:
            actions: (N, *action shape), as the action space wants them.
            out: (N, *observation shape) in the observation space's dtype; receives the observations to act on next,
                of an ended episode the first one of the next.

        Raises:
            TrainingError: an observation or a reward does not fit.
            ConfigurationError: the vector environment ignores the mask of a reset.
        """
        self._clock += 1
        rewards = np.empty(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        take = self._step_list if self._vector is None else self._step_vector
        # `final` holds ended episodes' last observations where `out` has the next episode's first one already.
        ended, final, reports = take(actions, out, rewards, terminated, truncated)
        self._returns += rewards
        if self._max_ep_len is not None:
            overdue = [i for i, start in enumerate(self._starts) if self._clock - start >= self._max_ep_len]
            overdue = [i for i in overdue if i not in ended]
            truncated[overdue] = True
        else:
            overdue = []
        if not (ended or overdue or reports):
            return Transition(rewards, terminated, truncated, {}, [])

        episodes = self._finished(ended, overdue, reports)
        ended = ended + overdue
        pending = [i for i in ended if i not in final]
        final |= {i: np.array(out[i]) for i in pending}
        for i in ended:
            self._starts[i], self._returns[i] = self._clock, 0.0
        if pending:
            restart = self._restart_list if self._vector is None else self._restart_vector
            restart(pending, out)
        return Transition(rewards, terminated, truncated, final, episodes)
