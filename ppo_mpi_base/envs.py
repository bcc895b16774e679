# SPDX-License-Identifier: MIT
"""The N environments of one rank, stepped together: episode ends, length limits and episode statistics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from operator import add
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import VectorEnv

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.parts import with_rows
from ppo_mpi_base.steppers import Episode, Fit, Loop, Vector

RECORDED_STEPS = 50_000
"""Maximum number of actions kept of an episode in progress, for checkpoints; a longer episode cannot be resumed."""


class Transition(NamedTuple):
    """The results of one step of N environments.

    Attributes:
        rewards: (N,) float64, raw.
        terminated, truncated: (N,) bool, read-only; never both: a step that is both counts as terminated.
        final_observations: local index -> the last observation of the episode that this step ended.
        episodes: statistics of the episodes that this step ended, see `Environments`.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: dict[int, np.ndarray]
    episodes: list[Episode]


class Environments:
    """Step the N environments of one rank together, and begin a new episode when one has ended.

    A list of environments is stepped in a loop. Each episode is a function of (seed, global index, episode number) and
    its actions, as long as an environment draws only from its `np_random`. (ALE's sticky actions do not;
    `gymnasium.wrappers.StickyAction` does.) A vector environment gets its environments' seeds once. In all of its
    autoreset modes, its transitions are those of the list: no step is a hidden reset. Environments may reuse their
    arrays, but not under SAME_STEP, where Gymnasium itself resets them before it returns the last observation.

    Statistics count raw rewards and steps. If an environment itself reports `info["episode"]` (`{"r", "l"}`, like
    Gymnasium's RecordEpisodeStatistics), its reports are used instead, from the first one on, or from the start if the
    info of its reset has `"reports_episodes"`: an Atari wrapper may end a training episode at each lost life, but
    report whole games. A game that a wrapper around RecordEpisodeStatistics ends counts as far as it was recorded.

    Args:
        environments: N environments, or one vector environment of N.
        seed: the run's seed, at least 0.
        first_global_index: global index of the first environment, rank * N.
        max_ep_len: steps after which an episode is truncated.
        first_ep_lens: the same for each environment's first episode, (N,), which does not count in statistics if this
            cuts it. None: no such limits.
        state_processing_hook: function of one observation; its result replaces the observation.
        obs_space_override: the space of observations after `state_processing_hook`.

    Attributes:
        num_envs: N.
        observation_space, action_space: those of a single environment, the former after `obs_space_override`, and
            `Parts` instead of a Dict space.

    Raises:
        ConfigurationError: spaces differ or are not supported, an environment appears twice, or a vector environment
            has no autoreset mode or one that cannot be handled.
    """

    def __init__(
        self,
        environments: Sequence[gym.Env] | VectorEnv,
        *,
        seed: int,
        first_global_index: int,
        max_ep_len: int | None = None,
        first_ep_lens: Sequence[int] | None = None,
        state_processing_hook: Callable[[Any], Any] | None = None,
        obs_space_override: gym.Space | None = None,
    ) -> None:
        if isinstance(environments, VectorEnv):
            space, self.action_space = environments.single_observation_space, environments.single_action_space
        else:
            _check_alike(environments, first_global_index)
            space, self.action_space = environments[0].observation_space, environments[0].action_space
        source = "env_fn" if obs_space_override is None else OVERRIDE
        self.observation_space = with_rows(space if obs_space_override is None else obs_space_override, source)
        check_spaces(self.observation_space, self.action_space, source)
        fit = Fit(self.observation_space, state_processing_hook, first_global_index)
        self._stepper: Vector | Loop
        if isinstance(environments, VectorEnv):
            self.num_envs = environments.num_envs
            self._stepper = Vector(environments, seed, fit)
        else:
            self.num_envs = len(environments)
            self._stepper = Loop(environments, seed, fit)
        self._limit = math.inf if max_ep_len is None else float(max_ep_len)
        first: Sequence[float] = first_ep_lens or [math.inf] * self.num_envs
        self._first_limits = [min(length, self._limit) for length in first]
        self._none = np.zeros(self.num_envs, dtype=bool)  # most steps end no episode
        self._none.flags.writeable = False

    def reset(self, out: np.ndarray, episode: int = 0) -> None:
        """Begin the first episode of every environment; a second call begins the same episodes again.

        Args:
            out: (N, *observation shape) in the observation space's dtype; receives the first observations.
            episode: the first episode's number, above 0 if an earlier process has used lower ones.

        Raises:
            ConfigurationError: a vector environment does not accept a sequence of seeds.
            TrainingError: an observation does not fit its space.
        """
        self._clock = 0  # steps since this reset
        self._starts = [0] * self.num_envs  # the clock at the start of each environment's episode
        self._limits = self._first_limits.copy()  # on the lengths of the episodes in progress
        self._returns = [0.0] * self.num_envs  # of each environment's episode so far
        # Since the start of the oldest episode in progress, for `progress`; a vector environment's cannot be repeated.
        recorded = RECORDED_STEPS if isinstance(self._stepper, Loop) else 0
        self._actions: deque[np.ndarray] = deque(maxlen=recorded)
        self._reporting = self._stepper.reset(out, episode)  # environments that report their own episodes

    def step(self, actions: np.ndarray, out: np.ndarray) -> Transition:
        """Take one step in every environment.

        Args:
            actions: (N, *action shape), as the environments expect them.
            out: (N, *observation shape) in the observation space's dtype; receives the observations to act on next:
                after an ended episode, the first one of the next episode.

        Raises:
            ConfigurationError: a vector environment ignores `reset_mask`.
            TrainingError: an observation or a reward has the wrong shape.
        """
        self._clock += 1
        self._actions.append(actions.copy())
        # Another copy: an environment may keep its own, or change it in place.
        rewards, ended, final_observations, reports = self._stepper.step(actions.copy(), out)
        self._returns = list(map(add, self._returns, rewards.tolist()))  # NumPy's + is slower on so few
        late: list[int] = []
        if min(self._limits) != math.inf:
            lengths = [self._clock - start for start in self._starts]
            late = [i for i in range(self.num_envs) if lengths[i] >= self._limits[i] and i not in ended]
        if not (ended or late or reports):
            return Transition(rewards, self._none, self._none, {}, [])

        ended.update((i, False) for i in late)
        terminated, truncated = self._none.copy(), self._none.copy()
        for i, terminal in ended.items():
            terminated[i], truncated[i] = terminal, not terminal
        waiting = [i for i in ended if i not in final_observations]  # for their next episode to begin
        if waiting:
            final_observations.update((i, np.array(out[i])) for i in waiting)
            cut = self._stepper.restart(waiting, out)
            for i in late:
                if self._limits[i] < self._limit:  # cut by `first_ep_lens`, so not counted
                    cut.pop(i, None)
            reports = {**cut, **reports}
        episodes = self._statistics(ended, late, reports)
        for i in ended:
            self._starts[i], self._returns[i], self._limits[i] = self._clock, 0.0, self._limit
        for _ in range(len(self._actions) - (self._clock - min(self._starts))):
            self._actions.popleft()
        return Transition(rewards, terminated, truncated, final_observations, episodes)

    def progress(self) -> dict[str, np.ndarray]:
        """Return the episodes in progress, for `resume`: how far they are, and the actions that led there.

        Episodes of more than `RECORDED_STEPS` steps, and those of a vector environment, have no actions.
        """
        lengths = np.array([self._clock - start for start in self._starts])
        actions = np.stack(self._actions) if self._actions else np.zeros((0, self.num_envs))
        return {
            "episodes": np.array(self._stepper.next_episode) - 1,
            "lengths": lengths,
            "returns": np.array(self._returns),
            "reporting": np.array([i in self._reporting for i in range(self.num_envs)]),
            "cuts": np.array([limit if limit < self._limit else math.inf for limit in self._limits]),
            **{
                f"actions{i}": actions[len(actions) - length :, i] if length <= len(actions) else actions[:0, i]
                for i, length in enumerate(lengths.tolist())
            },
        }

    def resume(self, progress: dict[str, np.ndarray], observations: np.ndarray, out: np.ndarray) -> list[int]:
        """Resume the episodes of `progress` by repeating their actions; if that fails, begin episodes not yet used.

        Args:
            progress: as `progress()` returned it for as many environments.
            observations: (N, *observation shape), those to act on next at that time.
            out: (N, *observation shape), receives the observations to act on next.

        Returns:
            The environments whose episodes could not be repeated exactly, or were too long for it: for a vector
            environment, all.
        """
        newest = int(progress["episodes"].max())
        self.reset(out, newest + 1)
        if isinstance(self._stepper, Vector):
            return list(range(self.num_envs))
        self._starts = (-progress["lengths"]).tolist()
        self._returns = progress["returns"].tolist()
        if (cuts := progress.get("cuts")) is None:  # written by an earlier version
            cuts = np.where(progress["episodes"] == 0, self._first_limits, math.inf)
        self._limits = np.minimum(cuts, self._limit).tolist()
        self._reporting = set(np.flatnonzero(progress["reporting"]).tolist())
        past = max(len(progress[f"actions{i}"]) for i in range(self.num_envs))
        actions = np.zeros((past, self.num_envs, *progress["actions0"].shape[1:]), progress["actions0"].dtype)
        lost = []
        for i, episode in enumerate(progress["episodes"].tolist()):
            repeated, earned = progress[f"actions{i}"], progress["returns"][i]
            whole = len(repeated) == progress["lengths"][i]
            same = whole and self._stepper.repeat(i, episode, repeated, out) == earned
            if same and np.array_equal(out[i], observations[i]):
                actions[past - len(repeated) :, i] = repeated
            else:
                self._stepper.begin_anew(i, newest + 2, out)
                self._starts[i], self._returns[i], self._limits[i] = 0, 0.0, self._limit
                lost.append(i)
        self._actions.extend(actions)
        return lost

    def close(self) -> None:
        """Close all environments."""
        self._stepper.close()

    def _statistics(self, ended: dict[int, bool], late: list[int], reports: dict[int, Episode]) -> list[Episode]:
        """Return the episodes that ended, `late` ones at a length limit, as counted here or as reported.

        Those that `first_ep_lens` cut are left out.
        """

        def cut(i: int) -> bool:
            return not ended[i] and self._stepper.begun_anew(i)

        self._reporting.update(reports)
        episodes = []
        for i in ended:
            if i in late and self._limits[i] < self._limit:
                continue
            counted = Episode(self._returns[i], self._clock - self._starts[i], i)
            report = reports.pop(i, None)
            # A report that is too short has lost steps: RecordEpisodeStatistics around a vector environment forgets
            # those of all environments when one is reset. And no wrapper knows when max_ep_len, or a time limit
            # around it, ends an episode.
            if report is not None and report.length >= counted.length:
                episodes.append(report)
            elif report is not None or i not in self._reporting or i in late or cut(i):
                episodes.append(counted)
        return episodes + list(reports.values())


OVERRIDE = "obs_space_override"


def check_spaces(observation_space: gym.Space, action_space: gym.Space, source: str = "env_fn") -> None:
    """Raise `ConfigurationError` unless both spaces are a Box (of any shape, actions of floats) or Discrete.

    `Parts` of a Dict space are a Box.

    Args:
        observation_space: the space that networks are built for.
        action_space: that of the environments.
        source: the keyword that the observation space comes from.
    """
    if not isinstance(observation_space, Box | Discrete):
        raise ConfigurationError(
            f"{source}: the observation space {observation_space} must be a Box, a Discrete or a Dict of these; "
            "gymnasium.wrappers.FlattenObservation turns others into a Box"
        )
    if not isinstance(action_space, Box | Discrete):
        raise ConfigurationError(f"env_fn: the action space {action_space} must be a Box or a Discrete")
    if isinstance(action_space, Box) and action_space.dtype.kind != "f":
        raise ConfigurationError(
            f"env_fn: the action space {action_space} has dtype {action_space.dtype}, but sampled actions are floats: "
            "let a wrapper round them, with a Box of floats as its action_space, or use Discrete"
        )


def _check_alike(environments: Sequence[gym.Env], first_global_index: int) -> None:
    """Raise `ConfigurationError` unless environments have equal spaces and are different objects."""
    seen: dict[int, int] = {}
    for g, environment in enumerate(environments, first_global_index):
        if (twin := seen.setdefault(id(environment.unwrapped), g)) != g:
            raise ConfigurationError(
                f"env_fn: environments {twin} and {g} are the same object; env_fn must build a new one"
            )
        for name in ("observation_space", "action_space"):
            space, first = getattr(environment, name), getattr(environments[0], name)
            if space != first:
                raise ConfigurationError(f"env_fn: the {name} of environment {g} is {space}, but the first has {first}")
