# SPDX-License-Identifier: MIT
"""Evaluate a policy in fresh environments: episodes are divided among ranks; results are the same for any number."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import nn

from ppo_mpi_base.builders import build_environment, checked_together
from ppo_mpi_base.checks import Count, CountOrZero, checked
from ppo_mpi_base.envs import Environments
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.failing import About, meet
from ppo_mpi_base.files import write_whole
from ppo_mpi_base.mpi import Communicator, world
from ppo_mpi_base.parts import with_rows
from ppo_mpi_base.policies import ActorCritic, action_noise
from ppo_mpi_base.saved_policy import SavedPolicy, load_actor_critic
from ppo_mpi_base.seeding import EVALUATION, generator, seed_sequence
from ppo_mpi_base.steppers import Episode
from ppo_mpi_base.undisturbed import undisturbed
from ppo_mpi_base.whole_games import WholeGames

RESAMPLES = 10_000
"""Number of bootstrap samples for the interval."""
SLICE = 0.5
"""Seconds between synchronizations: no rank waits longer for others, and an error on one soon ends all."""


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation's episodes.

    Attributes:
        returns: undiscounted sums of raw rewards, in order of episode number.
        lengths: steps of the same episodes; for whole games, as reported by the environment.
        deterministic: whether each action was the most probable one, rather than sampled.
        seed: what all random numbers derive from.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    deterministic: bool
    seed: int

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """The standard deviation of the returns about their mean (ddof=0)."""
        return float(np.std(self.returns))

    @property
    def median(self) -> float:
        """The median return."""
        return float(np.median(self.returns))

    @property
    def mean_length(self) -> float:
        """The mean number of steps."""
        return float(np.mean(self.lengths))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the mean return, by the percentile bootstrap; NaN for a single episode.

        Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
        """
        if len(self.returns) < 2:  # nothing is known about the spread
            return float("nan"), float("nan")
        returns, draws = np.array(self.returns), generator(self.seed, EVALUATION)
        means = [returns[draws.integers(0, len(returns), len(returns))].mean() for _ in range(RESAMPLES)]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)

    def as_dict(self) -> dict[str, Any]:
        """Return all statistics, and each episode's return and length, for JSON."""
        return {
            "episodes": len(self.returns),
            "deterministic": self.deterministic,
            "seed": self.seed,
            "mean": self.mean,
            "std": self.std,
            "median": self.median,
            "interval": list(self.interval) if len(self.returns) > 1 else None,
            "mean_length": self.mean_length,
            "returns": list(self.returns),
            "lengths": list(self.lengths),
        }

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all; call on one rank only."""
        write_whole(Path(path), json.dumps(self.as_dict(), indent=1).encode())

    def __str__(self) -> str:
        """Return the statistics as one readable line."""
        (low, high), n = self.interval, len(self.returns)
        interval = f" (95% interval {low:.6g} to {high:.6g})" if n > 1 else ""
        return (
            f"mean return {self.mean:.6g}{interval}, std {self.std:.6g}, "
            f"median {self.median:.6g}, length {self.mean_length:.6g}: {n} {'episode' if n == 1 else 'episodes'}, "
            f"{'most probable' if self.deterministic else 'sampled'} actions, seed {self.seed}"
        )


def evaluate(
    policy: ActorCritic | str | Path,
    env_fn: Callable[..., gymnasium.Env],
    *,
    env_kwargs: dict[str, Any] | None = None,
    episodes: int = 100,
    seed: int = 0,
    deterministic: bool = True,
    max_ep_len: int | None = None,
    state_processing_hook: Callable[[Any], Any] | None = None,
    which: Literal["best", "latest"] = "best",
    network_fn: Callable[..., nn.Module] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    ranks: Communicator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Play episodes with a policy, divided among ranks, and return the results on each rank.

    Episode k depends only on the policy, the seed and k: it is played in its own environment, and even the global
    random states of `random`, NumPy and torch are set for it. So on one machine the returns are the same for any
    number of ranks, in a new process and in the one that trained. The policy, including its normalization, and the
    global random states are left unchanged. Collective: call on all ranks, with the same policy on each.

    If an environment contains Gymnasium's RecordEpisodeStatistics, it is played until that reports an episode: a
    wrapper around it may end an episode at each lost life, but whole games are counted.

    Args:
        policy: a `save_location`; in training, the worker's `actor_critic`; or `load_actor_critic(...).actor_critic`.
        env_fn: builds one environment, as for `PPO()`: `env_fn(**env_kwargs)`.
        env_kwargs: keyword arguments of `env_fn`.
        episodes: number of episodes, over all ranks.
        seed: what all random numbers derive from, at least 0.
        deterministic: whether to take the most probable actions, rather than sample them.
        max_ep_len: steps after which an episode (a whole game) is truncated.
        state_processing_hook: the same function as for `PPO()`.
        which: for a `save_location`, the networks that earned the best return, or the latest.
        network_fn: builds the network of a `save_location`, if its class is your own.
        policy_kwargs: keyword arguments of `network_fn`.
        ranks: the ranks that share the episodes. None: all ranks.
        progress: called about every half second, on each rank, with the number of finished episodes; an exception
            that it raises (on each rank) ends the evaluation.

    Raises:
        ConfigurationError: an argument, or what `env_fn` builds, is unsuitable; on all ranks.
        TrainingError: an environment's observation or reward has the wrong shape or is not finite; on all ranks.
    """
    if ranks is None:
        ranks = world()
        meet(About.EVALUATING)
    arguments = {
        "env_fn": (env_fn, Callable[..., gymnasium.Env]),
        "env_kwargs": (env_kwargs, dict[str, Any] | None),
        "episodes": (episodes, Count),
        "seed": (seed, CountOrZero),
        "deterministic": (deterministic, bool),
        "max_ep_len": (max_ep_len, Count | None),
        "which": (which, Literal["best", "latest"]),
    }
    load = partial(load_actor_critic, which=which, network_fn=network_fn, policy_kwargs=policy_kwargs)
    policy = checked_together(ranks, lambda: _checked(policy, arguments, state_processing_hook, load))
    episodes, seed = int(episodes), int(seed)

    environment = partial(_environment, policy, env_fn, env_kwargs or {}, state_processing_hook)
    numbers = range(ranks.rank, episodes, ranks.size)
    playing = _play(policy, environment, numbers, seed, deterministic, max_ep_len, state_processing_hook)
    returns, lengths = zip(*_play_together(policy, playing, episodes, ranks, progress), strict=True)
    return Evaluation(returns, lengths, deterministic, seed)


def _play(
    policy: ActorCritic,
    build: Callable[[], gymnasium.Env],
    numbers: Iterable[int],
    seed: int,
    deterministic: bool,
    max_ep_len: int | None,
    state_processing_hook: Callable[[Any], Any] | None,
) -> Generator[Episode | None, None, None]:
    """Play the episodes with these numbers, each in its own environment; yield after each step, see `_episode`."""
    for k in numbers:
        noise = None if deterministic else generator(seed, EVALUATION, k, 1)
        of_environment = _seed_all(seed, k)
        environments = Environments(
            [WholeGames(build())],
            seed=of_environment,
            first_global_index=k,
            max_ep_len=max_ep_len,
            state_processing_hook=state_processing_hook,
            obs_space_override=policy.observation_space,
        )
        with closing(environments):
            yield from _episode(policy, environments, k, noise)


def _play_together(
    policy: ActorCritic,
    playing: Generator[Episode | None, None, None],
    episodes: int,
    ranks: Communicator,
    progress: Callable[[int], None] | None,
) -> list[tuple[float, int]]:
    """Return each episode's return and length, in order, from all ranks. Collective: call on all ranks."""
    own: list[Episode] = []
    over = np.zeros(1, np.int64)
    with undisturbed(policy), closing(playing):
        while over[0] < episodes:
            checked_together(ranks, lambda: own.extend(_next(playing)))
            over[0] = len(own)
            ranks.sum_(over)
            if progress is not None:
                progress(int(over[0]))
    of_ranks = ranks.gather_all([(episode.return_, episode.length) for episode in own])
    return [of_ranks[k % ranks.size][k // ranks.size] for k in range(episodes)]


def check_environments(
    policy: ActorCritic,
    env_fn: Callable[..., gymnasium.Env],
    env_kwargs: dict[str, Any],
    state_processing_hook: Callable[[Any], Any] | None,
) -> None:
    """Build two environments and close them, as a check before training with periodic evaluations.

    Raises:
        ConfigurationError: they are not environments, are the same object, or their spaces are not the policy's.
    """
    with undisturbed(policy):
        first, second = (_environment(policy, env_fn, env_kwargs, state_processing_hook) for _ in range(2))
        first.close()
        second.close()
    if first.unwrapped is second.unwrapped:
        raise ConfigurationError(
            "evaluate_every: env_fn returns the same object each time, so evaluations would disturb the "
            "training environment; env_fn must build a new one"
        )


def _checked(
    policy: Any,
    arguments: dict[str, tuple[Any, Any]],
    state_processing_hook: Callable[[Any], Any] | None,
    load: Callable[[str | Path], SavedPolicy],
) -> ActorCritic:
    """Check all arguments, then return the policy, loaded from its files if it is a path."""
    for name, (value, annotation) in arguments.items():
        checked(name, value, annotation)
    if isinstance(policy, str | Path):
        saved = load(policy)
        saved.check_hook(state_processing_hook)
        return saved.actor_critic
    if not isinstance(policy, ActorCritic):
        raise ConfigurationError(
            "policy must be a save_location or an ActorCritic, such as load_actor_critic(...).actor_critic, "
            f"not {type(policy).__name__}"
        )
    return policy


def _environment(
    policy: ActorCritic,
    env_fn: Callable[..., gymnasium.Env],
    env_kwargs: dict[str, Any],
    state_processing_hook: Callable[[Any], Any] | None,
) -> gymnasium.Env:
    """Build an environment and check that it has the policy's spaces; what a hook returns is checked only later."""
    environment = build_environment(env_fn, env_kwargs)
    for name, wanted in (("observation", policy.observation_space), ("action", policy.action_space)):
        found = with_rows(getattr(environment, f"{name}_space"))
        if found != wanted and not (name == "observation" and state_processing_hook):
            environment.close()
            raise ConfigurationError(f"env_fn: the {name} space is {found}, but the policy's is {wanted}")
    return environment


def _seed_all(seed: int, k: int) -> int:
    """Set the global random states for episode k, and return the seed of its environment."""
    of_environment, *of_states = seed_sequence(seed, EVALUATION, k, 0).generate_state(4).tolist()
    random.seed(of_states[0])
    np.random.seed(of_states[1])
    torch.manual_seed(of_states[2])
    return int(of_environment)


def _next(playing: Iterator[Episode | None]) -> Iterator[Episode]:
    """Yield the episodes that end within `SLICE` seconds."""
    until = time.monotonic() + SLICE
    for episode in playing:
        if episode is not None:
            yield episode
        if time.monotonic() >= until:
            return


def _episode(
    policy: ActorCritic, environments: Environments, k: int, noise: np.random.Generator | None
) -> Iterator[Episode | None]:
    """Play episode k in the single environment; yield None after each step, but the episode after the last."""
    space = policy.observation_space
    observations = np.zeros((1, *(space.shape or ())), space.dtype)
    environments.reset(observations)
    ended: list[Episode] = []
    while not ended:
        _check_finite("observation", observations, k)
        step = environments.step(_action(policy, observations, noise), observations)
        _check_finite("reward", step.rewards, k)
        ended = step.episodes
        yield ended[0] if ended else None


def _check_finite(what: str, found: np.ndarray, k: int) -> None:
    if not np.isfinite(found).all():
        raise TrainingError(f"{what} is not finite: env_fn's environment, in episode {k} of an evaluation")


def _action(policy: ActorCritic, observations: np.ndarray, noise: np.random.Generator | None) -> np.ndarray:
    """Return the environment's action for observations (1, ...): the most probable one, or one sampled with `noise`."""
    # A copy: torch aligns its own memory, and the last bit of matrix products depends on that.
    distribution = policy.policy(torch.tensor(observations, device=policy.device))
    if noise is None:
        actions = distribution.mode()
    else:
        drawn = torch.as_tensor(action_noise(policy.action_space, noise, 1), dtype=torch.get_default_dtype())
        actions = distribution.sample(drawn.to(policy.device))
    return policy.to_environment(actions).cpu().numpy()
