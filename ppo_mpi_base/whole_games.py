# SPDX-License-Identifier: MIT
"""Play whole games, even if a wrapper ends an episode at each lost life."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.wrappers import RecordEpisodeStatistics


class WholeGames(gymnasium.Wrapper):
    """Continues if an episode ends but the inner RecordEpisodeStatistics reports none: the game is not over.

    If the reset starts a new game anyway, such as after a time limit applied outside it, the episode is over, and is
    reported as far as it was recorded.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._recorder = recorder_of(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step; if it ends an episode but not the game, also reset."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._recorder is None or not (terminated or truncated) or "episode" in info:
            return observation, reward, terminated, truncated, info
        game = {"r": self._recorder.episode_returns, "l": self._recorder.episode_lengths}
        following, _ = self.env.reset()
        if self._recorder.episode_lengths < game["l"]:
            return observation, reward, terminated, truncated, {**info, "episode": game}
        return following, reward, False, False, info


def recorder_of(env: gymnasium.Env) -> RecordEpisodeStatistics | None:
    """Return the outermost RecordEpisodeStatistics within an environment, or None."""
    while isinstance(env, gymnasium.Wrapper) and not isinstance(env, RecordEpisodeStatistics):
        env = env.env
    return env if isinstance(env, RecordEpisodeStatistics) else None
