# SPDX-License-Identifier: MIT
"""Videos: what is filmed, what is told, and rendering where there is no display."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import RecordEpisodeStatistics
from PIL import Image

from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic, action_dim, observation_dim
from ppo_mpi_base.saved_policy import save_policy
from ppo_mpi_base.video import choose_mujoco_backend, record_video

iio = pytest.importorskip("imageio.v3", reason="imageio is not installed")
pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")


class Lamp(gymnasium.Env):
    """Episodes of 5 steps, each worth 1.5, that show a grey brighter by 40 at each step, from 20 on."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(3)

    def __init__(self, render_mode: str | None = None, height: int = 32, rate: float = 25) -> None:
        self.render_mode, self.height = render_mode, height
        self.metadata = {**self.metadata, "render_fps": rate}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(self.observation_space.shape, np.float32), 1.5, self.steps == 5, False, {}

    def render(self) -> Any:
        return np.full((self.height, 48, 3), 20 + 40 * self.steps, np.uint8)


def save(directory: Path, environment: gymnasium.Env, **keywords: Any) -> Path:
    """Save a policy with random weights for an environment, and return where."""
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(directory), **keywords)
    torch.manual_seed(0)
    observations, actions = environment.observation_space, environment.action_space
    network = mlp(observation_dim(observations), action_dim(actions))
    save_policy(config, "best", ActorCritic(network, mlp(1), observations, actions), 1, 0.0)
    return directory


SHADES = [20, 60, 100, 140, 180, 220]


def test_an_mp4_shows_each_step_of_each_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, Lamp())
    path = record_video(tmp_path, Lamp, tmp_path / "new" / "a.mp4", env_kwargs={"height": 33}, episodes=2)
    assert list(path.parent.iterdir()) == [path]
    frames = iio.imread(path)
    assert frames.shape == (12, 34, 48, 3)  # of an even height
    np.testing.assert_allclose(frames.mean((1, 2, 3)), SHADES * 2, atol=4)  # compression, colours of another range
    assert iio.immeta(path)["fps"] == 25
    assert capsys.readouterr().out == f"{path}: 12 frames at 25 per second; return 7.5, 7.5\n"


def test_a_gif_of_a_part(tmp_path: Path) -> None:
    path = record_video(save(tmp_path, Lamp()), Lamp, tmp_path / "a.gif", max_steps=3)
    frames = iio.imread(path)
    assert frames.shape == (4, 32, 48, 3)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], SHADES[:4])
    assert iio.immeta(path)["duration"] == 40  # ms


def test_a_gif_leaves_frames_out_where_they_are_too_many(tmp_path: Path) -> None:
    path = record_video(save(tmp_path, Lamp()), Lamp, tmp_path / "a.gif", env_kwargs={"rate": 100})
    np.testing.assert_array_equal(iio.imread(path)[:, 0, 0, 0], SHADES[::2])
    assert iio.immeta(path)["duration"] == 20


@pytest.mark.parametrize("rate", [5, 12, 15, 24, 25, 30, 40, 60, 62.5, 75, 125, 500])
def test_a_gif_is_about_as_fast_as_the_environment(
    tmp_path: Path, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record_video(save(tmp_path, Lamp()), Lamp, tmp_path / "a.gif", env_kwargs={"rate": rate}, episodes=4)
    with Image.open(path) as film:
        milliseconds, frames = film.info["duration"], film.n_frames
    strides = [stride for stride in range(1, 24) if math.ceil(24 / stride) == frames]
    assert milliseconds >= 20
    assert any(abs(milliseconds * rate / stride / 1000 - 1) <= 0.125 for stride in strides)
    assert f"{frames} frames at {1000 / milliseconds:.4g} per second" in capsys.readouterr().out


def test_errors_of_the_environment_are_its_own(tmp_path: Path) -> None:
    class Lost(Lamp):
        def reset(self, **keywords: Any) -> Any:
            return (tmp_path / "missing" / "level.dat").read_bytes()

    with pytest.raises(FileNotFoundError, match="level.dat"):
        record_video(save(tmp_path, Lamp()), Lost, tmp_path / "a.gif")
    refused("env_fn.*typo", tmp_path, Lamp, env_kwargs={"typo": 1})


def test_what_was_trained_with_a_hook_is_filmed_with_it(tmp_path: Path) -> None:
    save(tmp_path, Lamp(), state_processing_hook=np.negative)
    refused("state_processing_hook=None, but the policy was trained with one", tmp_path, Lamp)
    seen: list[np.ndarray] = []

    def hook(observation: np.ndarray) -> np.ndarray:
        seen.append(observation)
        return observation

    record_video(tmp_path, Lamp, tmp_path / "a.gif", state_processing_hook=hook)
    assert len(seen) == 5


class Blinking(gymnasium.Wrapper):
    """Ends an episode of training at every second step, and goes on from there."""

    def reset(self, **keywords: Any) -> Any:
        return self.env.reset(**keywords) if self.env.unwrapped.steps in (0, 5) else (self.seen, {})  # type: ignore[attr-defined]

    def step(self, action: Any) -> Any:
        self.seen, reward, terminated, truncated, info = self.env.step(action)
        return self.seen, reward, terminated or self.env.unwrapped.steps % 2 == 0, truncated, info  # type: ignore[attr-defined]


def blinking(render_mode: str | None = None) -> gymnasium.Env:
    lamp = Lamp(render_mode)
    lamp.steps = 0
    return Blinking(RecordEpisodeStatistics(lamp))


def test_episodes_are_whole_games(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record_video(save(tmp_path, Lamp()), blinking, tmp_path / "a.gif", episodes=2)
    np.testing.assert_array_equal(iio.imread(path)[:, 0, 0, 0], SHADES * 2)
    assert "return 7.5, 7.5" in capsys.readouterr().out


class Tiny(Lamp):
    observation_space = Box(-1.0, 1.0, (5,), np.float32)


class Continuous(Lamp):
    action_space = Box(-1.0, 1.0, (3,), np.float32)


class Blind(Lamp):
    def render(self) -> Any:
        return None


class Failing(Lamp):
    def render(self) -> Any:
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")


def deaf(**kwargs: Any) -> gymnasium.Env:
    return Lamp()


def refused(text: str, directory: Path, env_fn: Callable[..., gymnasium.Env], name: str = "a.mp4", **kw: Any) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(ConfigurationError, match=text) as raised:
        record_video(directory, env_fn, directory / name, **kw)
    assert "\n" not in str(raised.value) and sorted(directory.iterdir()) == before


def test_whole_floats_count_as_counts(tmp_path: Path) -> None:
    save(tmp_path, Lamp())
    record_video(tmp_path, Lamp, tmp_path / "a.gif", episodes=1.0, seed=1.0, max_steps=3.0)  # type: ignore[arg-type]
    assert (tmp_path / "a.gif").exists()


def test_what_cannot_be_filmed_is_told_and_nothing_written(tmp_path: Path) -> None:
    refused("was a policy saved there", tmp_path, Lamp)
    save(tmp_path, Lamp())
    refused("must take render_mode", tmp_path, lambda height=3: Lamp(height=height))
    refused("render_mode=None: it must take", tmp_path, deaf)
    refused("observations other than \\(5,\\)", tmp_path, Tiny)
    refused("actions other than Box", tmp_path, Continuous)
    refused("renders NoneType", tmp_path, Blind)
    refused("cannot be rendered: pygame is not installed$", tmp_path, Failing)
    refused("must end in .mp4 or .gif", tmp_path, Lamp, "a.avi")
    refused("episodes=0", tmp_path, Lamp, episodes=0)
    refused("max_steps=0", tmp_path, Lamp, max_steps=0)
    refused("episodes=1.5 must be a whole number", tmp_path, Lamp, episodes=1.5)
    refused("seed=-1 must be a whole number", tmp_path, Lamp, seed=-1)
    refused("which='newest' is not one of", tmp_path, Lamp, which="newest")
    refused("output=.*cannot be written", tmp_path, Lamp, "best.json/a.mp4")


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM", "SDL_VIDEODRIVER"):
        monkeypatch.setenv(name, "")  # so that what is set during the test goes with it
        monkeypatch.delenv(name)
    return monkeypatch


def cheetah(render_mode: str | None = None) -> gymnasium.Env:
    return gymnasium.make("HalfCheetah-v5", render_mode=render_mode, width=64, height=64)


def test_mujoco_without_a_display(tmp_path: Path, headless: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    try:
        choose_mujoco_backend()
    except ConfigurationError as error:
        pytest.skip(str(error))
    os.environ.pop("MUJOCO_GL")
    path = record_video(save(tmp_path, cheetah()), cheetah, tmp_path / "a.gif", max_steps=2)
    frames = iio.imread(path)
    assert frames.shape == (3, 64, 64, 3) and frames.std() > 20, "the picture is blank"


def test_mujoco_without_gl_is_told_what_to_install(tmp_path: Path, headless: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    headless.setenv("PYOPENGL_PLATFORM", "none")  # both of MuJoCo's backends refuse it
    refused("no display.*apt install libegl1 libgl1-mesa-dri", save(tmp_path, cheetah()), cheetah)
    assert "MUJOCO_GL" not in os.environ


def test_a_backend_that_the_user_chose_stays(headless: pytest.MonkeyPatch) -> None:
    headless.setenv("MUJOCO_GL", "glfw")
    choose_mujoco_backend()
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_cart_pole(tmp_path: Path, headless: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame", reason="pygame is not installed")

    def cart_pole(render_mode: str | None = None) -> gymnasium.Env:
        return gymnasium.make("CartPole-v1", render_mode=render_mode)

    frames = iio.imread(record_video(save(tmp_path, cart_pole()), cart_pole, tmp_path / "a.mp4", max_steps=3))
    assert frames.shape[0] == 4 and frames.std() > 10


def test_pong(tmp_path: Path, headless: pytest.MonkeyPatch) -> None:
    ale_py = pytest.importorskip("ale_py", reason="ale_py is not installed")
    gymnasium.register_envs(ale_py)

    def pong(render_mode: str | None = None) -> gymnasium.Env:
        return gymnasium.make("ALE/Pong-v5", obs_type="ram", render_mode=render_mode)

    frames = iio.imread(record_video(save(tmp_path, pong()), pong, tmp_path / "a.gif", max_steps=2))
    assert frames.shape[1:] == (210, 160, 3) and frames.std() > 10
