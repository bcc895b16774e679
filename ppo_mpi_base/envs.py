# SPDX-License-Identifier: MIT
"""The N environments of one rank, stepped together: seeding, all autoreset modes made equal, episode statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.seeding import EPISODES, generator, seed_sequence


class Episode(NamedTuple):
    """A finished episode: undiscounted return of raw rewards, length in steps, local index of its environment."""

    return_: float
    length: int
    environment: int


class Transition(NamedTuple):
    """What one step of N environments gave.

    Attributes:
        rewards: (N,) float64, raw.
        terminated, truncated: (N,) bool, to be read only; never both: a step that is both counts as terminated.
        final_observations: local index -> the last observation of the episode that this step ended.
        episodes: the statistics of the episodes that this step ended, see `Environments`.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: dict[int, np.ndarray]
    episodes: list[Episode]


# What `_Loop` and `_Vector` return for a step, all by local index: rewards (N,); ended episodes, and whether they
# terminated; final observations of those of them that have begun the next episode already; reported episodes.
_Stepped: TypeAlias = tuple[np.ndarray, dict[int, bool], dict[int, np.ndarray], dict[int, Episode]]


class Environments:
    """Step the N environments of one rank together, and begin a new episode where one has ended.

    A list of environments is stepped in a loop, and each episode is a function of (seed, global index, number of the
    episode) and its actions, as far as an environment draws from its `np_random` alone. (ALE's sticky actions do not;
    `gymnasium.wrappers.StickyAction` does.) A vector environment gets its environments' seeds once, and in all of its
    autoreset modes its transitions are those of the list: no step is a reset in disguise. Environments may reuse their
    arrays, but not under SAME_STEP, where Gymnasium itself resets them before it hands out the last observation.

    Statistics count raw rewards and steps. An environment that itself reports `info["episode"]` (`{"r", "l"}`, as
    Gymnasium's RecordEpisodeStatistics does) is believed instead from its first report on, or from the start where the
    info of its reset has `"reports_episodes"`: an Atari wrapper may end an episode for training at each lost life, and
    yet report whole games.

    Args:
        environments: N environments, or one vector environment of N.
        seed: the run's seed, at least 0.
        first_global_index: global index of the first environment, rank * N.
        max_ep_len: steps after which an episode is truncated.
        first_ep_lens: the same for each environment's first episode, (N,), which does not count in statistics if it is
            cut by this. None: no such limits.
        state_processing_hook: function of one observation; what it returns takes the observation's place.
        obs_space_override: the space of observations after `state_processing_hook`.

    Attributes:
        num_envs: N.
        observation_space, action_space: those of a single environment, the first after `obs_space_override`.

    Raises:
        ConfigurationError: spaces that differ or are not supported, an environment that is there twice, a vector
            environment without an autoreset mode or with one that cannot be steered.
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
        self.observation_space = space if obs_space_override is None else obs_space_override
        check_spaces(self.observation_space, self.action_space)
        fit = _Fit(self.observation_space, state_processing_hook, first_global_index)
        self._stepper: _Vector | _Loop
        if isinstance(environments, VectorEnv):
            self.num_envs = environments.num_envs
            self._stepper = _Vector(environments, seed, fit)
        else:
            self.num_envs = len(environments)
            self._stepper = _Loop(environments, seed, fit)
        self._limit = math.inf if max_ep_len is None else float(max_ep_len)
        first: Sequence[float] = first_ep_lens or [math.inf] * self.num_envs
        self._first_limits = [min(length, self._limit) for length in first]
        self._none = np.zeros(self.num_envs, dtype=bool)  # what most steps end
        self._none.flags.writeable = False

    def reset(self, out: np.ndarray, episode: int = 0) -> None:
        """Begin the first episode of every environment; a second call begins the same episodes again.

        Args:
            out: (N, *observation shape) in the observation space's dtype; receives the first observations.
            episode: its number, where lower ones were used up by a former process.

        Raises:
            ConfigurationError: a vector environment takes no sequence of seeds.
            TrainingError: an observation does not fit its space.
        """
        self._clock = 0  # steps since this reset
        self._starts = [0] * self.num_envs  # the clock when each environment's episode began
        self._limits = self._first_limits.copy()  # to the lengths of the episodes in progress
        self._returns = [0.0] * self.num_envs  # of each environment's episode so far
        self._actions: list[np.ndarray] = []  # since the oldest episode in progress began, for `progress`
        self._reporting = self._stepper.reset(out, episode)  # environments that report their own episodes

    def step(self, actions: np.ndarray, out: np.ndarray) -> Transition:
        """Take one step in every environment.

        Args:
            actions: (N, *action shape), as the environments want them.
            out: (N, *observation shape) in the observation space's dtype; receives the observations to act on next: of
                an ended episode, the first one of the next episode.

        Raises:
            ConfigurationError: a vector environment ignores `reset_mask`.
            TrainingError: an observation or a reward has the wrong shape.
        """
        self._clock += 1
        self._actions.append(actions.copy())
        # Another copy: an environment may keep its own, or change it in place.
        rewards, ended, final_observations, reports = self._stepper.step(actions.copy(), out)
        self._returns = list(map(add, self._returns, rewards.tolist()))  # NumPy's + takes longer on so few
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
        episodes = self._statistics(ended, late, reports)
        for i in ended:
            self._starts[i], self._returns[i], self._limits[i] = self._clock, 0.0, self._limit
        del self._actions[: len(self._actions) - (self._clock - min(self._starts))]
        waiting = [i for i in ended if i not in final_observations]  # for their next episode to begin
        if waiting:
            final_observations.update((i, np.array(out[i])) for i in waiting)
            self._stepper.restart(waiting, out)
        return Transition(rewards, terminated, truncated, final_observations, episodes)

    def progress(self) -> dict[str, np.ndarray]:
        """Return the episodes in progress, for `resume`: how far they are, and the actions that led there."""
        lengths = np.array([self._clock - start for start in self._starts])
        actions = np.stack(self._actions) if self._actions else np.zeros((0, self.num_envs))
        return {
            "episodes": np.array(self._stepper.next_episode) - 1,
            "lengths": lengths,
            "returns": np.array(self._returns),
            "reporting": np.array([i in self._reporting for i in range(self.num_envs)]),
            **{f"actions{i}": actions[len(actions) - length :, i] for i, length in enumerate(lengths)},
        }

    def resume(self, progress: dict[str, np.ndarray], observations: np.ndarray, out: np.ndarray) -> list[int]:
        """Take up the episodes of `progress` by repeating their actions; for the rest, begin ones that never were.

        Args:
            progress: as `progress()` returned it for as many environments.
            observations: (N, *observation shape), what was to be acted on next.
            out: (N, *observation shape), receives what is to be acted on next.

        Returns:
            The environments whose episodes could not be repeated exactly: all of a vector environment.
        """
        newest = int(progress["episodes"].max())
        self.reset(out, newest + 1)
        if isinstance(self._stepper, _Vector):
            return list(range(self.num_envs))
        self._starts = (-progress["lengths"]).tolist()
        self._returns = progress["returns"].tolist()
        self._limits = [
            first if episode == 0 else self._limit
            for first, episode in zip(self._first_limits, progress["episodes"].tolist(), strict=True)
        ]
        self._reporting = set(np.flatnonzero(progress["reporting"]).tolist())
        past = int(progress["lengths"].max())
        actions = np.zeros((past, self.num_envs, *progress["actions0"].shape[1:]), progress["actions0"].dtype)
        lost = []
        for i, episode in enumerate(progress["episodes"].tolist()):
            repeated = progress[f"actions{i}"]
            if self._stepper.repeat(i, episode, repeated, out) and np.array_equal(out[i], observations[i]):
                actions[past - len(repeated) :, i] = repeated
            else:
                self._stepper.next_episode[i] = newest + 2
                self._stepper.restart([i], out)
                self._starts[i], self._returns[i], self._limits[i] = 0, 0.0, self._limit
                lost.append(i)
        self._actions = list(actions)
        return lost

    def close(self) -> None:
        """Close all environments."""
        self._stepper.close()

    def _statistics(self, ended: Iterable[int], late: list[int], reports: dict[int, Episode]) -> list[Episode]:
        """Return the episodes that ended, some of them only because they were late, as counted here or as reported.

        Those that were cut short of `max_ep_len` are left out.
        """
        self._reporting.update(reports)
        episodes = []
        for i in ended:
            if i in late and self._limits[i] < self._limit:
                continue
            counted = Episode(self._returns[i], self._clock - self._starts[i], i)
            report = reports.pop(i, None)
            # A report that is too short has lost steps: RecordEpisodeStatistics around a vector environment forgets
            # those of all environments when one is reset. And no wrapper knows that max_ep_len ends an episode.
            if report is not None and report.length >= counted.length:
                episodes.append(report)
            elif report is not None or i in late or i not in self._reporting:
                episodes.append(counted)
        return episodes + list(reports.values())


class _Fit:
    """Pass single observations through the user's hook, and check that they fit the observation space."""

    def __init__(self, space: gym.Space, hook: Callable[[Any], Any] | None, first_global_index: int) -> None:
        self.space, self.shape, self.hook, self.first = space, space.shape, hook, first_global_index

    def __call__(self, i: int, observation: Any) -> Any:
        """Return what stands for an observation of environment i, of the right shape."""
        if self.hook is not None:
            observation = self.hook(observation)
        if getattr(observation, "shape", None) != self.shape and np.shape(observation) != self.shape:
            raise self.error(i, f"observation of shape {np.shape(observation)}")
        return observation

    def initial(self, i: int, observation: Any) -> Any:
        """Do the same at a reset, and look at the dtype: fractions in an array of integers would all become 0."""
        observation = self(i, observation)
        dtype = np.asarray(observation).dtype
        if dtype.kind == "f" and np.dtype(self.space.dtype).kind != "f":
            raise self.error(i, f"observation of dtype {dtype}")
        return observation

    def error(self, i: int, what: str) -> TrainingError:
        source, remedy = "env_fn", "its observation_space must say what it returns"
        if self.hook is not None:
            source, remedy = "state_processing_hook", "obs_space_override must say what it returns"
        return TrainingError(f"environment {self.first + i}: {source} gave an {what} for {self.space}; {remedy}")


class _Loop:
    """Environments stepped one after another in this process."""

    def __init__(self, environments: Sequence[gym.Env], seed: int, fit: _Fit) -> None:
        self.environments, self.seed, self.fit = list(environments), seed, fit

    def reset(self, out: np.ndarray, episode: int) -> set[int]:
        """Begin the first episodes; return which environments say that they report their own."""
        if episode > 0:  # episode 0 is seeded so in `restart`
            for i, environment in enumerate(self.environments):
                environment.reset(seed=first_seed(self.seed, self.fit.first + i, episode))
        self.next_episode = [episode] * len(self.environments)
        infos = self.restart(range(len(self.environments)), out)
        return {i for i, info in enumerate(infos) if info.get("reports_episodes")}

    def repeat(self, i: int, episode: int, actions: np.ndarray, out: np.ndarray) -> bool:
        """Go through the beginning of an episode again; return whether it lasts as long as its actions."""
        self.next_episode[i] = episode
        self.restart([i], out)
        for action in actions:
            observation, _, terminated, truncated, _ = self.environments[i].step(action.copy())
            if terminated or truncated:
                return False
            out[i] = self.fit(i, observation)
        return True

    def step(self, actions: np.ndarray, out: np.ndarray) -> _Stepped:
        """Step each environment. This is the inner loop of all training: each microsecond counts."""
        rewards = np.empty(len(self.environments))
        ended: dict[int, bool] = {}
        reports: dict[int, Episode] = {}
        fit, shape, hook = self.fit, self.fit.shape, self.fit.hook
        for i, environment in enumerate(self.environments):
            observation, reward, terminated, truncated, info = environment.step(actions[i])
            if hook is not None or getattr(observation, "shape", None) != shape:
                observation = fit(i, observation)
            out[i] = observation
            rewards[i] = reward if isinstance(reward, float) else self._number(i, reward)
            if terminated or truncated:
                ended[i] = bool(terminated)
            if "episode" in info:
                reports[i] = Episode(float(info["episode"]["r"]), int(info["episode"]["l"]), i)
        return rewards, ended, {}, reports

    def restart(self, indices: Iterable[int], out: np.ndarray) -> list[dict[str, Any]]:
        """Begin the next episodes of some environments, each from a seed of its own; return what their resets say."""
        infos = []
        for i in indices:
            environment, g, episode = self.environments[i], self.fit.first + i, self.next_episode[i]
            if episode == 0:
                observation, info = environment.reset(seed=first_seed(self.seed, g))
            else:
                # Not reset(seed=...): ALE would load its ROM again, which takes as long as hundreds of steps.
                environment.unwrapped.np_random = generator(self.seed, EPISODES, g, episode)
                observation, info = environment.reset()
            self.next_episode[i] += 1
            out[i] = self.fit.initial(i, observation)
            infos.append(info)
        return infos

    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def _number(self, i: int, reward: Any) -> float:
        """Convert a reward that is neither a Python float nor NumPy's float64."""
        if reward is None or np.ndim(reward) != 0:
            raise TrainingError(f"environment {self.fit.first + i}: env_fn gave the reward {reward!r}, not one number")
        return float(reward)


class _Vector:
    """A vector environment, with its autoreset mode made of no consequence."""

    def __init__(self, vector: VectorEnv, seed: int, fit: _Fit) -> None:
        self.vector, self.seed, self.fit = vector, seed, fit
        self.same_step = _autoreset_mode(vector) is AutoresetMode.SAME_STEP

    def reset(self, out: np.ndarray, episode: int) -> set[int]:
        """Begin the first episodes; return which environments say that they report their own."""
        n = self.vector.num_envs
        # It counts resumed processes: the episodes' own seeds are the vector's matter.
        self.next_episode = [episode + 1] * n
        # Gymnasium wants a sequence of Python integers, ALE an array: an array of Python integers is both.
        seeds: Any = np.array([first_seed(self.seed, self.fit.first + i, episode) for i in range(n)], dtype=object)
        try:
            observations, infos = self.vector.reset(seed=seeds)
        except gym.error.Error as error:
            raise self._unfit(f"reset(seed=...) takes no sequence of seeds: {error}") from error
        for i in range(n):
            out[i] = self.fit.initial(i, observations[i])
        return set(np.flatnonzero(infos.get("reports_episodes", ())).tolist())

    def step(self, actions: np.ndarray, out: np.ndarray) -> _Stepped:
        self.observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        if np.shape(rewards) != (len(out),):
            raise TrainingError(f"make_vec_env_fn: {self.vector} gave rewards of shape {np.shape(rewards)}")
        ended = {i: bool(terminated[i]) for i in np.flatnonzero(np.logical_or(terminated, truncated)).tolist()}
        final_observations = {}
        if self.same_step:
            final_observations = {i: np.array(self.fit(i, infos["final_obs"][i]), dtype=out.dtype) for i in ended}
        if self.fit.hook is None and np.shape(self.observations) == out.shape:
            out[...] = self.observations
        else:
            for i in range(len(out)):
                out[i] = self.fit(i, self.observations[i])
        return np.array(rewards, dtype=np.float64), ended, final_observations, _vector_reports(infos)

    def restart(self, indices: list[int], out: np.ndarray) -> None:
        """Begin the next episodes of some environments now, rather than with the step that comes next."""
        mask = np.zeros(len(out), dtype=bool)
        mask[indices] = True
        others = ~mask
        observations, _ = self.vector.reset(options={"reset_mask": mask.copy()})
        if len(observations) == len(out):  # EnvPool returns no others
            if not np.array_equal(observations[others], self.observations[others], equal_nan=True):
                raise self._unfit("reset(options={'reset_mask': ...}) resets all environments")
            observations = observations[mask]
        for i, observation in zip(np.flatnonzero(mask).tolist(), observations, strict=True):
            out[i] = self.fit.initial(i, observation)

    def close(self) -> None:
        self.vector.close()

    def _unfit(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"make_vec_env_fn: {self.vector}: {why}; use SyncVectorEnv or AsyncVectorEnv")


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raise `ConfigurationError` unless both spaces are a Box (of any shape) or Discrete (with any start)."""
    for name, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Box | Discrete):
            raise ConfigurationError(f"env_fn: the {name} space {space} is not supported, only Box and Discrete are")


def first_seed(seed: int, g: int, episode: int = 0) -> int:
    """Return the seed of global environment `g`'s first reset, in [0, 2**31): ALE's are 32-bit integers with a sign."""
    return int(seed_sequence(seed, EPISODES, g, episode).generate_state(1)[0] >> 1)


def _check_alike(environments: Sequence[gym.Env], first_global_index: int) -> None:
    """Raise `ConfigurationError` unless environments have equal spaces and are different objects."""
    seen: dict[int, int] = {}
    for g, environment in enumerate(environments, first_global_index):
        if (twin := seen.setdefault(id(environment.unwrapped), g)) != g:
            raise ConfigurationError(f"env_fn: environments {twin} and {g} are one object; env_fn must build a new one")
        for name in ("observation_space", "action_space"):
            space, first = getattr(environment, name), getattr(environments[0], name)
            if space != first:
                raise ConfigurationError(f"env_fn: the {name} of environment {g} is {space}, of the first {first}")


def _autoreset_mode(vector: VectorEnv) -> AutoresetMode:
    """Return when a vector environment resets its environments by itself."""
    base = vector.unwrapped
    # Its own attribute first: ALE's vector environments write their mode into one `metadata` that they all share.
    named = getattr(base, "autoreset_mode", None) or vector.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(named)
    except ValueError as error:
        raise ConfigurationError(
            f"make_vec_env_fn: metadata['autoreset_mode'] of {vector} is {named!r}, no gymnasium.vector.AutoresetMode"
        ) from error
    if mode is AutoresetMode.NEXT_STEP and isinstance(base, AsyncVectorEnv) and not base.shared_memory:
        # Gymnasium (1.4 still) does not cancel a pending reset there, and the next action would be lost.
        raise ConfigurationError("make_vec_env_fn: AsyncVectorEnv(shared_memory=False) needs another autoreset_mode")
    return mode


def _vector_reports(infos: dict[str, Any]) -> dict[int, Episode]:
    """Return what environments report of ended episodes; under SAME_STEP, that is in `final_info`."""
    reports = {}
    for source in (infos, infos.get("final_info", {})):
        if "episode" in source:
            returns, lengths = source["episode"]["r"], source["episode"]["l"]
            indices = np.flatnonzero(source["_episode"]).tolist()
            reports.update({i: Episode(float(returns[i]), int(lengths[i]), i) for i in indices})
    return reports
