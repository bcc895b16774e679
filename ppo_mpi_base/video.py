# SPDX-License-Identifier: MIT
"""Record episodes of a saved policy as an mp4 or GIF, also on machines without a display."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from rich.console import Console
from torch import nn

from ppo_mpi_base.checks import Count, CountOrZero, checked
from ppo_mpi_base.errors import ConfigurationError, check_takes
from ppo_mpi_base.files import make_directory, write_output
from ppo_mpi_base.saved_policy import SavedPolicy, as_function, load_actor_critic
from ppo_mpi_base.whole_games import WholeGames

DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
GL_PACKAGES = "apt install libegl1 libgl1-mesa-dri (or libosmesa6)"
DEFAULT_RATE = 30.0
SHORTEST_FRAME = 2
"""Hundredths of a second; browsers slow down a GIF with shorter frames."""
GIF_TOLERANCE = 0.125
"""A GIF is at most this fraction faster or slower than the environment."""


def record_video(
    directory: str | Path,
    env_fn: Callable[..., gymnasium.Env],
    output: str | Path = "video.mp4",
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    episodes: int = 1,
    which: Literal["best", "latest"] = "best",
    seed: int = 0,
    deterministic: bool = True,
    max_steps: int | None = None,
    state_processing_hook: Callable[[Any], Any] | None = None,
    network_fn: Callable[..., nn.Module] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Record a video of episodes of a saved policy, and print the return of each.

    Without a display, MuJoCo renders with EGL or else OSMesa, and pygame with SDL's dummy driver: the environment
    variables MUJOCO_GL and SDL_VIDEODRIVER, unless already set, are set for the rest of the process.

    Args:
        directory: the `save_location` that was given to `PPO()`.
        env_fn: builds the environment, as for `PPO()`; must also accept `render_mode="rgb_array"`.
        output: the .mp4 or .gif file to write, whole or not at all. Its frame rate is the environment's
            `metadata["render_fps"]`. A GIF has at most 50 frames per second, each lasting whole hundredths of a second:
            it may skip frames, and be an eighth faster or slower.
        env_kwargs: keyword arguments of `env_fn`.
        episodes: number of episodes, one after another.
        which: the networks that earned the best mean return, or the latest.
        seed: seed of the environment and of sampled actions.
        deterministic: whether to take the most probable actions, rather than sample them.
        max_steps: agent steps after which an episode is cut off.
        state_processing_hook: the same function as for `PPO()`.
        network_fn: builds the policy network, if `load_policy` needs it.
        policy_kwargs: keyword arguments of `network_fn`.

    Returns:
        The path of the video.

    Raises:
        ConfigurationError: there is no such policy, the environment does not fit it or cannot be rendered, or the file
            cannot be written; if a package is missing, the message says which.
    """
    path = Path(output)
    if path.suffix not in (".mp4", ".gif"):
        raise ConfigurationError(f"output={str(output)!r} must end in .mp4 or .gif")
    episodes = checked("episodes", episodes, Count)
    max_steps = checked("max_steps", max_steps, Count | None)
    seed = checked("seed", seed, CountOrZero)
    checked("which", which, Literal["best", "latest"])
    saved = load_actor_critic(directory, which, network_fn=network_fn, policy_kwargs=policy_kwargs)
    policy = _policy(saved, deterministic, seed, state_processing_hook)
    with closing(_build(env_fn, env_kwargs or {})) as environment:
        make_directory("output", str(path.parent))  # before the work
        video, returns = _film(environment, policy, path, episodes, seed, max_steps)
    earned = ", ".join(f"{value:.6g}" for value in returns)
    print(f"{path}: {video.frames} frames at {video.rate:.4g} per second; return {earned}", flush=True)
    return path


def _policy(
    saved: SavedPolicy, deterministic: bool, seed: int, hook: Callable[[Any], Any] | None
) -> Callable[[Any], np.ndarray]:
    """Return a policy as a function of the environment's own observations."""
    saved.check_hook(hook)
    policy = as_function(saved.actor_critic, deterministic, seed)
    return policy if hook is None else lambda observation: policy(hook(observation))


def _film(
    environment: gymnasium.Env,
    policy: Callable[[Any], np.ndarray],
    path: Path,
    episodes: int,
    seed: int,
    max_steps: int | None,
) -> tuple[_Video, list[float]]:
    """Write a video of episodes to `path`, whole or not at all; return it, closed, and each episode's return."""
    with tempfile.TemporaryDirectory() as scratch:
        video = _Video(Path(scratch) / path.name, float(environment.metadata.get("render_fps") or DEFAULT_RATE))
        try:
            returns = _play(environment, policy, video, episodes, seed, max_steps)
        finally:
            video.close()
        write_output("output", path, video.path.read_bytes())
    return video, returns


def _build(env_fn: Callable[..., gymnasium.Env], env_kwargs: Mapping[str, Any]) -> gymnasium.Env:
    """Return an environment that can be rendered on this machine."""
    remedy = "it must take render_mode and pass it on, as in gymnasium.make(..., render_mode=render_mode)"
    parameters = inspect.signature(env_fn).parameters.values()
    if not any(p.name == "render_mode" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ConfigurationError(f"env_fn: {remedy}")
    check_takes("env_fn", env_fn, **{**env_kwargs, "render_mode": "rgb_array"})
    headless = not any(os.environ.get(name) for name in DISPLAYS)
    if headless:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    environment = env_fn(**{**env_kwargs, "render_mode": "rgb_array"})
    if environment.render_mode != "rgb_array":
        environment.close()
        raise ConfigurationError(f"env_fn built an environment with render_mode={environment.render_mode!r}: {remedy}")
    if headless and hasattr(environment.unwrapped, "mujoco_renderer"):
        choose_mujoco_backend()
    return WholeGames(environment)


def choose_mujoco_backend() -> None:
    """Set MUJOCO_GL, unless already set, to a backend that works without a display: "egl", or else "osmesa".

    Gymnasium reads it at an environment's first `render()`, MuJoCo's own renderers when `mujoco` is imported.

    Raises:
        ConfigurationError: neither works.
    """
    if os.environ.get("MUJOCO_GL"):
        return
    for backend in ("egl", "osmesa"):
        # In another process, because PyOpenGL keeps the first backend tried in this one for good. A library may be
        # installed without a driver, so the trial creates a whole context.
        trial = f"from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
        variables = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", trial], env=variables, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise ConfigurationError(f"MuJoCo cannot draw here: no display, and neither EGL nor OSMesa works: {GL_PACKAGES}")


def _play(
    environment: gymnasium.Env,
    policy: Callable[[Any], np.ndarray],
    video: _Video,
    episodes: int,
    seed: int,
    max_steps: int | None,
) -> list[float]:
    """Play and record the episodes, and return the return of each."""
    returns = []
    with Console(stderr=True).status("") as status:
        for episode in range(episodes):
            observation, _ = environment.reset(seed=seed if episode == 0 else None)
            video.add(_frame(environment))
            earned, steps, over = 0.0, 0, False
            while not over and steps != max_steps:
                action = _action(policy, observation, environment.action_space)
                observation, reward, terminated, truncated, _ = environment.step(action)
                video.add(_frame(environment))
                earned, steps, over = earned + float(reward), steps + 1, terminated or truncated
                status.update(f"episode {episode + 1} of {episodes}: step {steps}, return {earned:.6g}")
            returns.append(earned)
    return returns


def _action(policy: Callable[[Any], np.ndarray], observation: Any, space: gymnasium.Space) -> np.ndarray:
    try:
        action = policy(observation)
    except (RuntimeError, ConfigurationError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"env_fn: the policy was saved for observations other than {np.shape(observation)}: {reason}"
        ) from error
    if np.shape(action) != space.shape:
        raise ConfigurationError(f"env_fn: the policy was saved for actions other than {space}")
    return action


def _frame(environment: gymnasium.Env) -> np.ndarray:
    """Return the environment's current image, (H, W, 3) uint8."""
    try:
        frame = environment.render()
    except Exception as error:  # from whichever library renders
        reason = " ".join(str(error).split())
        mujoco = hasattr(environment.unwrapped, "mujoco_renderer")
        hint = f"; on a machine without a display, unset DISPLAY and MUJOCO_GL, and {GL_PACKAGES}" if mujoco else ""
        raise ConfigurationError(f"env_fn: the environment cannot be rendered: {reason}{hint}") from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        what = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ConfigurationError(f"env_fn: the environment renders {what}, not an image (height, width, 3) of uint8")
    return frame


def _gif_timing(rate: float) -> tuple[int, float]:
    """Return k, if a GIF keeps every k-th frame, and its frame rate: frames last whole hundredths of a second."""
    for stride in itertools.count(1):
        exact = 100 * stride / rate
        shown = max(SHORTEST_FRAME, round(exact))
        if abs(shown / exact - 1) <= GIF_TOLERANCE:
            break
    return stride, 100 / shown


class _Video:
    """An mp4 or GIF written frame by frame, since thousands of frames do not fit into memory."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.frames, self._seen = path, 0, 0
        self._stride, self.rate = _gif_timing(rate) if path.suffix == ".gif" else (1, rate)
        try:
            import imageio.v2 as imageio

            if path.suffix == ".gif":
                self._writer: Any = imageio.get_writer(path, mode="I", duration=round(1000 / self.rate), loop=0)
            else:
                # Sizes are even already; imageio's default would blur frames by scaling them to multiples of 16.
                self._writer = imageio.get_writer(
                    path, mode="I", fps=rate, codec="libx264", macro_block_size=1, ffmpeg_log_level="error"
                )
        except (ImportError, ValueError) as error:  # ValueError: imageio finds no plugin for .mp4
            raise ConfigurationError(
                'output: videos need a package that is missing: pip install "imageio[ffmpeg]"'
            ) from error

    def add(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3); repeat its last row or column if an mp4 needs an even size."""
        if self._seen % self._stride == 0:
            height, width, _ = frame.shape
            if self.path.suffix == ".mp4":
                frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            self._writer.append_data(frame)
            self.frames += 1
        self._seen += 1

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
