# SPDX-License-Identifier: MIT
"""Small environments that do exactly what a test's script says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

END = {"terminated": (True, False), "truncated": (False, True), "both": (True, True)}


class ScriptedEnv(gym.Env):
    """An environment whose observation says where one is: (global index, episode, step, sum of the last action).

    Episodes count from 0 at the first reset, steps from 0 at each reset, and the last action after a reset is 0. So a
    trajectory can be written down by hand: with `horizon=3`, environment g's first episode is observed as (g, 0, 0, 0),
    (g, 0, 1, a), (g, 0, 2, a), (g, 0, 3, a), the last of which is the final one, and the next begins as (g, 1, 0, 0).

    Args:
        g: the first number of its observations.
        horizon: steps of an episode, or a function of (g, episode).
        end: how an episode ends, "terminated", "truncated" or "both" at once, or a function of (g, episode).
        reward: of every step, or a function of (g, episode, step) with step counted from 1.
        action_space: any; the default is a Box of two numbers.
        reuse: return one and the same array at every step, changed in place, as some environments do.
        info: function of (g, episode, step) that returns a step's info.
    """

    def __init__(
        self,
        g: int = 0,
        horizon: int | Callable[[int, int], int] = 5,
        end: str | Callable[[int, int], str] = "truncated",
        reward: float | Callable[[int, int, int], Any] = 1.0,
        action_space: gym.Space | None = None,
        reuse: bool = False,
        info: Callable[[int, int, int], dict[str, Any]] | None = None,
    ) -> None:
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32) if action_space is None else action_space
        self.g, self.horizon, self.end, self.reward, self.reuse, self.info = g, horizon, end, reward, reuse, info
        self.episode, self.steps = -1, 0
        self.observation = np.zeros(4, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin the next episode."""
        super().reset(seed=seed)
        self.episode, self.steps, self.over = self.episode + 1, 0, False
        return self._observe(0.0), {}

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Take a step; one after the end of an episode is an error."""
        assert not self.over, "a step after the end of an episode"
        self.steps += 1
        where = (self.g, self.episode)
        self.over = self.steps == (self.horizon(*where) if callable(self.horizon) else self.horizon)
        end = self.end(*where) if callable(self.end) else self.end
        terminated, truncated = END[end] if self.over else (False, False)
        reward = self.reward(*where, self.steps) if callable(self.reward) else self.reward
        info = {} if self.info is None else self.info(*where, self.steps)
        return self._observe(float(np.sum(action))), reward, terminated, truncated, info

    def _observe(self, action: float) -> np.ndarray:
        if not self.reuse:
            self.observation = np.zeros(4, dtype=np.float32)
        self.observation[:] = self.g, self.episode, self.steps, action
        return self.observation


class FaultyEnv(ScriptedEnv):
    """A `ScriptedEnv` that goes wrong once, at step `at` of episode `in_episode`; step 0 is the reset.

    Args:
        fault: "shape" (observation (3,)), "scalar" (observation ()), "nan" (in the observation), "nan reward",
            "vector reward" (of shape (1,)), "no reward" (None) or "raise" (a RuntimeError("scripted")).
        at: step; faults of rewards need at > 0.
        in_episode: number of the episode.
        kwargs: those of `ScriptedEnv`.
    """

    FAULTS = ("shape", "scalar", "nan", "nan reward", "vector reward", "no reward", "raise")

    def __init__(self, fault: str, at: int, in_episode: int = 0, **kwargs: Any) -> None:
        assert fault in self.FAULTS
        super().__init__(**kwargs)
        self.fault, self.at, self.in_episode = fault, at, in_episode

    def _observe(self, action: float) -> np.ndarray:
        observation = super()._observe(action)
        if not self._now():
            return observation
        if self.fault == "raise":
            raise RuntimeError("scripted")
        faulty = {"shape": observation[:3], "scalar": observation[0], "nan": observation * np.float32(np.nan)}
        return faulty.get(self.fault, observation)

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Take a step, with the scripted fault."""
        observation, reward, terminated, truncated, info = super().step(action)
        if self._now():
            faulty = {"nan reward": np.nan, "vector reward": np.array([reward]), "no reward": None}
            reward = faulty.get(self.fault, reward)
        return observation, reward, terminated, truncated, info

    def _now(self) -> bool:
        return self.episode == self.in_episode and self.steps == self.at


def scripted(n: int, **kwargs: Any) -> list[Callable[[], ScriptedEnv]]:
    """Return n functions that build `ScriptedEnv`s with g = 0 .. n - 1, as vector environments want them."""
    return [partial(ScriptedEnv, g=g, **kwargs) for g in range(n)]
