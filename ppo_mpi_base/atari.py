# SPDX-License-Identifier: MIT
"""Games of the Arcade Learning Environment, processed as in the literature: one at a time, or many in its native code.

Both ways give the same frames, rewards and ends for the same starts and actions: 4 frames per step, the last two
max-pooled; 84x84 grey pixels; 4 such frames stacked, (4, 84, 84) bytes, with black ones before a game's start; no
sticky actions. A game starts with FIRE, if it has that action, and up to 30 no-op frames. A lost life ends a training
episode, but the game continues from there (the agent must then press FIRE itself; OpenAI Baselines presses it), and
whole games are reported as `info["episode"]`. Rewards are the game's own: `PPO(clip_rewards=True)` learns from their
signs.

    PPO(env_fn=atari_env, make_vec_env_fn=atari_vector_env, env_kwargs={"env_id": "ALE/Breakout-v5"}, ...)

Source: Mnih et al. (2015), doi.org/10.1038/nature14236; Machado et al. (2018), arxiv.org/abs/1709.06009, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, RecordEpisodeStatistics, TimeLimit

from ppo_mpi_base.checks import Count, CountOrZero, checked
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.mpi import world
from ppo_mpi_base.threads import core_share

try:
    import ale_py
except ImportError as missing:
    raise ImportError("Atari games need more packages: pip install -e '.[atari]' in this package's clone") from missing

gymnasium.register_envs(ale_py)

FRAMES_PER_STEP = 4


def atari_env(
    env_id: str,
    *,
    life_loss_ends: bool = True,
    noop_max: int = 30,
    max_game_steps: int = 27_000,
    render_mode: str | None = None,
) -> gymnasium.Env:
    """Build one game with Gymnasium's wrappers. It needs the package opencv-python-headless.

    Args:
        env_id: such as "ALE/Breakout-v5".
        life_loss_ends: end an episode at each lost life; the game itself continues at the next reset.
        noop_max: a game starts with 1 to this many no-op frames, drawn from `np_random`; 0: none.
        max_game_steps: steps of 4 frames after which a game is truncated.
        render_mode: "rgb_array" for images of the screen, as in Gymnasium.

    Raises:
        ConfigurationError: `env_id` is not a game, or another keyword is out of range.
    """
    _check(env_id, life_loss_ends, noop_max, max_game_steps)
    # AtariPreprocessing reads frames from the emulator; "grayscale" only avoids colours for those that it skips.
    game = gymnasium.make(
        env_id,
        frameskip=1,
        repeat_action_probability=0.0,
        max_num_frames_per_episode=None,
        obs_type="grayscale",
        render_mode=render_mode,
        disable_env_checker=True,
    )
    if "FIRE" in game.unwrapped.get_action_meanings():  # type: ignore[attr-defined]
        game = FireAtStart(game)
    game = AtariPreprocessing(game, noop_max=noop_max, frame_skip=FRAMES_PER_STEP)
    game = TimeLimit(FrameStackObservation(game, 4, padding_type="zero"), max_game_steps)
    return LostLifeEnds(RecordEpisodeStatistics(game)) if life_loss_ends else game


def atari_vector_env(
    env_fn: Callable[..., gymnasium.Env] | None,
    n: int,
    env_id: str,
    *,
    life_loss_ends: bool = True,
    noop_max: int = 30,
    max_game_steps: int = 27_000,
    autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
) -> VectorEnv:
    """Build n games in ale_py's native vector environment, with as many threads as the rank has cores.

    Two things differ from `atari_env`. It draws the number of no-op frames itself, from the seeds of its first reset:
    0 to `noop_max - 2` after FIRE, or 0 to `noop_max - 1` if there is no FIRE. And in a truncated game, the very last
    frame is the one before it, pooled with a later screen.

    Args:
        env_fn: not called; `PPO` passes it to every `make_vec_env_fn`.
        n: number of games.
        env_id: as for `atari_env`, like the next three.
        life_loss_ends: end an episode at each lost life.
        noop_max: see above.
        max_game_steps: steps of 4 frames after which a game is truncated.
        autoreset_mode: NEXT_STEP or SAME_STEP; PPO trains alike with both.

    Raises:
        ConfigurationError: `env_id` is not a game, or another keyword is out of range.
    """
    _check(env_id, life_loss_ends, noop_max, max_game_steps)
    games = gymnasium.make_vec(
        env_id,
        num_envs=n,
        vectorization_mode="vector_entry_point",
        num_threads=core_share(world()),
        frameskip=FRAMES_PER_STEP,
        repeat_action_probability=0.0,
        reward_clipping=False,
        noop_max=noop_max,
        max_num_frames_per_episode=FRAMES_PER_STEP * max_game_steps,
        autoreset_mode=autoreset_mode,
    )
    return LostLivesEnd(games) if life_loss_ends else games


def _check(env_id: str, life_loss_ends: bool, noop_max: int, max_game_steps: int) -> None:
    """Raise `ConfigurationError` for a keyword that is out of range.

    `env_id` must name a game, in the version that leaves processing to us.
    """
    checked("life_loss_ends", life_loss_ends, bool)
    checked("noop_max", noop_max, CountOrZero)
    checked("max_game_steps", max_game_steps, Count)
    spec = gymnasium.registry.get(env_id)
    if spec is None or not env_id.startswith("ALE/"):
        raise ConfigurationError(f"env_id={env_id!r} must be an ale_py game ALE/<Game>-v5, such as 'ALE/Pong-v5'")


class FireAtStart(gymnasium.Wrapper):
    """Presses FIRE in the first frame of each game, since some games need it to start."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._fire = env.unwrapped.get_action_meanings().index("FIRE")  # type: ignore[attr-defined]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a game."""
        self.env.reset(seed=seed, options=options)
        observation, _, _, _, info = self.env.step(self._fire)
        return observation, info


class LostLifeEnds(gymnasium.Wrapper):
    """Ends an episode at each lost life. The next reset then continues the game, from the last frame that was seen.

    A reset at any other time, or with a seed, begins a new game.
    """

    _last: tuple[Any, dict[str, Any]] | None = None  # what a reset returns if it continues
    _lives = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. Its info says that whole games will be reported as `info["episode"]`."""
        anew = self._last is None or seed is not None
        observation, info = self.env.reset(seed=seed, options=options) if anew else self._last  # type: ignore[misc]
        self._last, self._lives = None, info["lives"]
        return observation, {**info, "reports_episodes": True}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take one step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        # Some games continue for a few frames without a life; then the episode ends when they do.
        lost = 0 < info["lives"] < self._lives and not (terminated or truncated)
        self._last, self._lives = (observation, info) if lost else None, info["lives"]
        return observation, reward, terminated or lost, truncated, info


class LostLivesEnd(VectorWrapper):
    """Does for ale_py's vector environment what `LostLifeEnds` does for one game, and reports whole games.

    No autoreset mode restarts a game when only a life was lost: after such an end, the next step continues the same
    game, and the next reset with a "reset_mask" leaves that game alone.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        # Not metadata["autoreset_mode"]: all vector environments of ale_py write theirs into one dictionary.
        self._same_step = env.unwrapped.autoreset_mode is AutoresetMode.SAME_STEP  # type: ignore[attr-defined]
        self._lives = np.zeros(env.num_envs, np.int32)
        self._lost, self._over = np.zeros((2, env.num_envs), bool)  # what the last step ended: lives, and games
        self._returns, self._lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)  # of games so far

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin episodes: of all environments, or of those of `options["reset_mask"]`, (n,) bool."""
        chosen = (options or {}).get("reset_mask")
        if chosen is None or seed is not None:
            self._lost = np.zeros_like(self._lost)
        chosen = np.ones(self.num_envs, bool) if chosen is None else chosen
        anew = chosen & ~self._lost
        infos: dict[str, Any] = {"lives": self._lives}
        cut = anew & ~self._over & (self._lengths > 0)
        games = {"r": self._returns.copy(), "l": self._lengths.copy()}
        if anew.any():
            self._observations, infos = self.env.reset(seed=seed, options={"reset_mask": anew})
        if cut.any() and seed is None:  # by a step limit; reported as far as they went
            infos = {**infos, "episode": games, "_episode": cut}
        self._begin(anew, infos["lives"])
        self._lost = self._lost & ~chosen
        return self._observations, {**infos, "reports_episodes": np.ones(self.num_envs, bool)}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step; `infos["episode"]` has return "r" and length "l" of the games in `infos["_episode"]`."""
        started = np.zeros_like(self._over) if self._same_step else self._over  # by this step, instead of an action
        self._observations, rewards, terminated, truncated, infos = self.env.step(actions)
        self._returns += rewards
        self._lengths += 1
        self._begin(started, infos["lives"])
        self._over = terminated | truncated
        self._lost = (infos["lives"] > 0) & (infos["lives"] < self._lives) & ~self._over
        if self._over.any():
            infos["episode"] = {"r": self._returns.copy(), "l": self._lengths.copy()}
            infos["_episode"] = self._over.copy()
        if self._same_step:
            if self._lost.any():
                finals = infos.get("final_obs", self._observations)
                infos["final_obs"] = np.where(self._lost[:, None, None, None], self._observations, finals)
            self._begin(self._over, infos["lives"])
        self._lives = infos["lives"]
        return self._observations, rewards, terminated | self._lost, truncated, infos

    def _begin(self, games: np.ndarray, lives: np.ndarray) -> None:
        """Reset the counts of games, (n,) bool, that have begun."""
        self._returns[games], self._lengths[games] = 0.0, 0
        self._lives = np.where(games, lives, self._lives)
        self._over = self._over & ~games
