# SPDX-License-Identifier: MIT
"""Stepping and resetting the N environments of one rank: a list, or a vector environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.parts import Parts
from ppo_mpi_base.seeding import EPISODES, generator, seed_sequence
from ppo_mpi_base.whole_games import recorder_of


class Episode(NamedTuple):
    """A finished episode: undiscounted return of raw rewards, length in steps, local index of its environment."""

    return_: float
    length: int
    environment: int


# What `Loop` and `Vector` return for a step, all by local index: rewards (N,); ended episodes, and whether they
# terminated; final observations of those whose next episode has already begun; reported episodes.
Stepped: TypeAlias = tuple[np.ndarray, dict[int, bool], dict[int, np.ndarray], dict[int, Episode]]


class Fit:
    """Pass single observations through the user's hook, and check that they fit the observation space.

    If the space is `Parts`, the observations of its Dict space become rows.

    Attributes:
        exact: the dtype of a space of integers, into which other dtypes are written only if checked; None for floats.
        choices: the observations of a Discrete space; None for other spaces.
    """

    def __init__(self, space: gym.Space, hook: Callable[[Any], Any] | None, first_global_index: int) -> None:
        self.space, self.shape, self.hook, self.first = space, space.shape, hook, first_global_index
        dtype = np.dtype(space.dtype)
        self.exact = None if dtype.kind == "f" else dtype
        self.choices = range(int(space.start), int(space.start + space.n)) if isinstance(space, Discrete) else None
        self.parts = space if isinstance(space, Parts) else None

    def __call__(self, i: int, observation: Any) -> Any:
        """Return environment i's observation as stored, of the right shape, with values that its dtype can hold."""
        if self.hook is not None:
            observation = self.hook(observation)
        if self.parts is not None:
            try:
                return self.parts.join(observation)
            except TrainingError as error:
                raise TrainingError(f"environment {self.first + i}: {self._source()}: {error}") from None
        if getattr(observation, "shape", None) != self.shape and np.shape(observation) != self.shape:
            raise self.error(i, f"observation of shape {np.shape(observation)}")
        if self.exact is not None and getattr(observation, "dtype", None) != self.exact:
            self._check_whole(i, np.asarray(observation))
        if self.choices is not None and int(observation) not in self.choices:
            raise self.error(i, f"observation of {observation}")
        return observation

    def _check_whole(self, i: int, observation: np.ndarray) -> None:
        """Raise `TrainingError` for fractions, which would be truncated, and for integers that would wrap around."""
        if observation.dtype.kind not in "iub":
            raise self.error(i, f"observation of dtype {observation.dtype}")
        if observation.size and not np.array_equal(observation.astype(self.exact), observation):
            low, high = observation.min(), observation.max()
            raise self.error(i, f"observation of dtype {observation.dtype} from {low} to {high}")

    def error(self, i: int, what: str) -> TrainingError:
        """Return the error that says what is wrong with an observation, and what would be right."""
        says = "its observation_space" if self.hook is None else "obs_space_override"
        return TrainingError(
            f"environment {self.first + i}: {self._source()} gave an {what} for {self.space}; "
            f"{says} must say what it returns"
        )

    def _source(self) -> str:
        return "env_fn" if self.hook is None else "state_processing_hook"


class Loop:
    """Environments stepped one after another in this process."""

    def __init__(self, environments: Sequence[gym.Env], seed: int, fit: Fit) -> None:
        self.environments, self.seed, self.fit = list(environments), seed, fit
        self.next_episode = [0] * len(self.environments)
        self.recorders = [recorder_of(environment) for environment in self.environments]

    def reset(self, out: np.ndarray, episode: int) -> set[int]:
        """Begin the first episodes; return which environments say that they report their own episodes."""
        infos = [self.begin_anew(i, episode, out) for i in range(len(self.environments))]
        return {i for i, info in enumerate(infos) if info.get("reports_episodes")}

    def begin_anew(self, i: int, episode: int, out: np.ndarray) -> dict[str, Any]:
        """Begin the episode of a number, even in the midst of another; return the info of its reset."""
        self.next_episode[i] = episode
        if episode > 0:  # `_begin` seeds episode 0 in this way
            # With a seed: at any other reset, a wrapper may continue a game.
            self.environments[i].reset(seed=first_seed(self.seed, self.fit.first + i, episode))
        return self._begin(i, out)

    def repeat(self, i: int, episode: int, actions: np.ndarray, out: np.ndarray) -> float | None:
        """Replay the beginning of an episode; return the sum of its rewards, or None if it ends sooner or fails."""
        self.next_episode[i], earned = episode, 0.0
        try:
            self._begin(i, out)
            for action in actions:
                observation, reward, terminated, truncated, _ = self.environments[i].step(action.copy())
                if terminated or truncated:
                    return None
                out[i] = self.fit(i, observation)
                earned += self._number(i, reward)
        except Exception:  # an episode that goes another way this time may not allow these actions
            return None
        return earned

    def step(self, actions: np.ndarray, out: np.ndarray) -> Stepped:
        """Step each environment. This is the inner loop of all training: every microsecond counts."""
        rewards = np.empty(len(self.environments))
        ended: dict[int, bool] = {}
        reports: dict[int, Episode] = {}
        fit, shape = self.fit, self.fit.shape
        look = fit.hook is not None or fit.exact is not None or fit.parts is not None
        for i, environment in enumerate(self.environments):
            observation, reward, terminated, truncated, info = environment.step(actions[i])
            if look or getattr(observation, "shape", None) != shape:
                observation = fit(i, observation)
            out[i] = observation
            rewards[i] = reward if isinstance(reward, float) else self._number(i, reward)
            if terminated or truncated:
                ended[i] = bool(terminated)
            if "episode" in info and _is_report(info["episode"]):
                reports[i] = Episode(float(info["episode"]["r"]), int(info["episode"]["l"]), i)
        return rewards, ended, {}, reports

    def restart(self, indices: Iterable[int], out: np.ndarray) -> dict[int, Episode]:
        """Begin the next episodes of some environments; return games that this ends, as far as they were recorded.

        A wrapper around RecordEpisodeStatistics, such as a time limit, may end a game, which is then not reported. Or
        it may end only a training episode, while the game continues.
        """
        games = {}
        for i in indices:
            recorder = self.recorders[i]
            if recorder is not None:
                game = Episode(float(recorder.episode_returns), int(recorder.episode_lengths), i)
            self._begin(i, out)
            if recorder is not None and recorder.episode_lengths < game.length:
                games[i] = game
        return games

    def _begin(self, i: int, out: np.ndarray) -> dict[str, Any]:
        """Begin an environment's next episode, with its own seed; return the info of its reset."""
        environment, g, episode = self.environments[i], self.fit.first + i, self.next_episode[i]
        if episode == 0 or not isinstance(environment.unwrapped.np_random, np.random.Generator):
            observation, info = environment.reset(seed=first_seed(self.seed, g, episode))
        else:
            # Not reset(seed=...): ALE would reload its ROM, which takes as long as hundreds of steps. Environments
            # without Gymnasium's generator, such as dm_control's through Shimmy, are reset with a seed.
            environment.unwrapped.np_random = generator(self.seed, EPISODES, g, episode)
            observation, info = environment.reset()
        self.next_episode[i] += 1
        out[i] = self.fit(i, observation)
        return info

    def begun_anew(self, i: int) -> bool:
        """Return whether a recorded game has already ended without a report: here, never before `restart`."""
        return False

    def close(self) -> None:
        """Close all environments."""
        for environment in self.environments:
            environment.close()

    def _number(self, i: int, reward: Any) -> float:
        """Convert a reward that is neither a Python float nor NumPy's float64."""
        if reward is None or np.ndim(reward) != 0:
            raise TrainingError(f"environment {self.fit.first + i}: env_fn gave the reward {reward!r}, not one number")
        return float(reward)


class Vector:
    """A vector environment, whose autoreset mode makes no difference here."""

    def __init__(self, vector: VectorEnv, seed: int, fit: Fit) -> None:
        self.vector, self.seed, self.fit = vector, seed, fit
        self.same_step = _autoreset_mode(vector) is AutoresetMode.SAME_STEP
        self.recorded = _all_record(vector)

    def reset(self, out: np.ndarray, episode: int) -> set[int]:
        """Begin the first episodes; return which environments say that they report their own episodes."""
        n = self.vector.num_envs
        # Here it counts resumed processes; the vector environment itself seeds later episodes.
        self.next_episode = [episode + 1] * n
        # Gymnasium expects a sequence of Python integers, ALE an array: an array of Python integers is both.
        seeds: Any = np.array([first_seed(self.seed, self.fit.first + i, episode) for i in range(n)], dtype=object)
        try:
            observations, infos = self.vector.reset(seed=seeds)
        except (gym.error.Error, TypeError, ValueError) as error:
            known = isinstance(self.vector.unwrapped, SyncVectorEnv | AsyncVectorEnv)
            if known and not isinstance(error, gym.error.Error):  # from within one of the environments
                raise
            raise self._unfit(f"reset(seed=...) does not accept a sequence of seeds: {error}") from error
        for i in range(n):
            out[i] = self.fit(i, _at(observations, i))
        return set(np.flatnonzero(infos.get("reports_episodes", ())).tolist())

    def step(self, actions: np.ndarray, out: np.ndarray) -> Stepped:
        """Step all environments, whatever the autoreset mode does with ended ones."""
        self.observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        if np.shape(rewards) != (len(out),):
            raise TrainingError(f"make_vec_env_fn: {self.vector} gave rewards of shape {np.shape(rewards)}")
        ended = {i: bool(terminated[i]) for i in np.flatnonzero(np.logical_or(terminated, truncated)).tolist()}
        final_observations = {}
        if self.same_step:
            finals = infos.get("final_obs")
            if ended and finals is None:
                raise self._unfit(
                    "under SAME_STEP, step() must return infos['final_obs'], in which element i is the last "
                    "observation of ended episode i"
                )
            final_observations = {i: np.array(self.fit(i, _at(finals, i)), dtype=out.dtype) for i in ended}
        fit, exact = self.fit, self.fit.exact
        fits = np.shape(self.observations) == out.shape and (exact is None or self.observations.dtype == exact)
        if fits and fit.hook is None and fit.choices is None:
            out[...] = self.observations
        else:
            for i in range(len(out)):
                out[i] = fit(i, _at(self.observations, i))
        return np.array(rewards, dtype=np.float64), ended, final_observations, _vector_reports(infos)

    def restart(self, indices: list[int], out: np.ndarray) -> dict[int, Episode]:
        """Begin the next episodes of some environments now, instead of with the next step.

        Return the games that this ends, as far as they were recorded, if not reported with the reset. (If a wrapper
        around RecordEpisodeStatistics ends one under SAME_STEP, nothing is left to return: see `begun_anew`.)
        """
        games = self._games()
        mask = np.zeros(len(out), dtype=bool)
        mask[indices] = True
        others = ~mask
        before = _at(self.observations, others)  # a copy: the environment may reuse its arrays
        observations, infos = self.vector.reset(options={"reset_mask": mask.copy()})
        if _length(observations) == len(out):  # EnvPool returns only those that were reset
            if not _equal(_at(observations, others), before):
                raise self._unfit("reset(options={'reset_mask': ...}) resets all environments")
            observations = _at(observations, mask)
        for i, k in zip(np.flatnonzero(mask).tolist(), range(_length(observations)), strict=True):
            out[i] = self.fit(i, _at(observations, k))
        now = self._games()
        cut = {i: game for i, game in games.items() if now[i].length < game.length}
        return {**cut, **_vector_reports(infos)}

    def begun_anew(self, i: int) -> bool:
        """Return whether a recorded game has already ended without a report, and the next one has begun."""
        return self.same_step and self.recorded and self._games()[i].length == 0

    def _games(self) -> dict[int, Episode]:
        """Return the games so far, as the environments' RecordEpisodeStatistics counted them; none without these."""
        if not self.recorded:
            return {}
        base: Any = self.vector.unwrapped
        counted = zip(base.get_attr("episode_returns"), base.get_attr("episode_lengths"), strict=True)
        return {i: Episode(float(returned), int(length), i) for i, (returned, length) in enumerate(counted)}

    def close(self) -> None:
        """Close all environments."""
        self.vector.close()

    def _unfit(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"make_vec_env_fn: {self.vector}: {why}; use SyncVectorEnv or AsyncVectorEnv")


def _at(observations: Any, index: Any) -> Any:
    """Return a vector environment's observations at an index or, as a copy, at a mask; a dict stays a dict."""
    if isinstance(observations, dict):
        return {name: _at(x, index) for name, x in observations.items()}
    return observations[index]


def _length(observations: Any) -> int:
    """Return the number of environments that these observations are from."""
    return _length(next(iter(observations.values()))) if isinstance(observations, dict) else len(observations)


def _equal(some: Any, others: Any) -> bool:
    """Return whether these are the same observations."""
    if isinstance(some, dict):
        return all(_equal(x, others[name]) for name, x in some.items())
    return np.array_equal(some, others, equal_nan=True)


def first_seed(seed: int, g: int, episode: int = 0) -> int:
    """Return the seed for resetting global environment `g`, in [0, 2**31): ALE's seeds are signed 32-bit integers."""
    return int(seed_sequence(seed, EPISODES, g, episode).generate_state(1)[0] >> 1)


def _autoreset_mode(vector: VectorEnv) -> AutoresetMode:
    """Return the mode in which a vector environment itself resets its environments."""
    base = vector.unwrapped
    # Its own attribute first: ALE's vector environments all write their mode into one shared `metadata`.
    named = getattr(base, "autoreset_mode", None) or vector.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(named)
    except ValueError as error:
        raise ConfigurationError(
            f"make_vec_env_fn: metadata['autoreset_mode'] of {vector} is {named!r}, not an AutoresetMode of "
            "gymnasium.vector"
        ) from error
    if mode is AutoresetMode.NEXT_STEP and isinstance(base, AsyncVectorEnv) and not base.shared_memory:
        # There, Gymnasium (still in 1.4) does not cancel a pending reset, and the next action would be lost.
        raise ConfigurationError("make_vec_env_fn: AsyncVectorEnv(shared_memory=False) needs another autoreset_mode")
    return mode


def _all_record(vector: VectorEnv) -> bool:
    """Return whether this is Gymnasium's own vector environment, with RecordEpisodeStatistics in each environment."""
    base = vector.unwrapped
    if not isinstance(base, SyncVectorEnv | AsyncVectorEnv):
        return False
    names = ("episode_returns", "episode_lengths")
    if not all(all(base.call("has_wrapper_attr", name)) for name in names):
        return False
    # Other wrappers, such as Stable-Baselines3's Monitor, keep lists of all episodes under these names.
    return all(np.isscalar(value) for name in names for value in base.get_attr(name))


def _is_report(episode: Any) -> bool:
    """Return whether this looks like RecordEpisodeStatistics' report; an environment may put an episode count there."""
    return isinstance(episode, dict) and "r" in episode and "l" in episode


def _vector_reports(infos: dict[str, Any]) -> dict[int, Episode]:
    """Return environments' reports of ended episodes; under SAME_STEP, these are in `final_info`."""
    reports = {}
    for source in (infos, infos.get("final_info", {})):
        if "episode" in source and _is_report(source["episode"]):
            returns, lengths = source["episode"]["r"], source["episode"]["l"]
            indices = np.flatnonzero(source["_episode"]).tolist()
            reports.update({i: Episode(float(returns[i]), int(lengths[i]), i) for i in indices})
    return reports
