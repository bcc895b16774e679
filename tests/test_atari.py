# SPDX-License-Identifier: MIT
"""Atari games: the processing by hand, one game against ale_py's native vector environment, lives and whole games."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

ale_py = pytest.importorskip("ale_py")
cv2 = pytest.importorskip("cv2")

from ppo_mpi_base.atari import atari_env, atari_vector_env  # noqa: E402
from ppo_mpi_base.envs import Environments  # noqa: E402
from ppo_mpi_base.errors import ConfigurationError  # noqa: E402
from ppo_mpi_base.steppers import Episode  # noqa: E402

BREAKOUT, INVADERS, PONG = "ALE/Breakout-v5", "ALE/SpaceInvaders-v5", "ALE/Pong-v5"
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]


def random_actions(length: int, n: int, choices: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(choices, size=(length, n))


def play(environments: Any, actions: np.ndarray) -> tuple[list[np.ndarray], list[tuple], list[Episode]]:
    """Step with actions (T, N) through `Environments`; return observations, what each step gave, and the episodes."""
    ranks_own = Environments(environments, seed=0, first_global_index=0)
    out = np.zeros((actions.shape[1], 4, 84, 84), np.uint8)
    ranks_own.reset(out)
    observations, steps, episodes = [out.copy()], [], []
    for action in actions:
        step = ranks_own.step(action, out)
        observations.append(out.copy())
        steps.append((step.rewards, step.terminated, step.truncated, step.final_observations))
        episodes += step.episodes
    ranks_own.close()
    return observations, steps, episodes


# One game.


@pytest.mark.parametrize("env_id", [BREAKOUT, PONG])
def test_the_processing_is_that_of_the_literature(env_id: str) -> None:
    """By hand: 4 frames a step, maximum of the last two, area interpolation to 84x84, the last 4 of these."""
    actions = random_actions(40, 1, 4)[:, 0]
    game = atari_env(env_id, noop_max=0)
    seen = [game.reset(seed=0)[0]]
    gained = []
    for action in actions:
        observation, reward, *_ = game.step(action)
        seen.append(observation)
        gained.append(reward)

    bare = gymnasium.make(env_id, frameskip=1, repeat_action_probability=0.0).unwrapped
    bare.reset(seed=0)
    ale, meanings = bare.ale, bare.get_action_meanings()  # type: ignore[attr-defined]
    moves = ale.getMinimalActionSet()
    ale.act(moves[meanings.index("FIRE")])
    small = [np.zeros((84, 84), np.uint8)] * 3
    small.append(cv2.resize(ale.getScreenGrayscale(), (84, 84), interpolation=cv2.INTER_AREA))
    wanted, rewards = [np.stack(small)], []
    for action in actions:
        screens, reward = [], 0
        for _ in range(4):
            reward += ale.act(moves[action])
            screens.append(ale.getScreenGrayscale())
        small.append(cv2.resize(np.maximum(*screens[-2:]), (84, 84), interpolation=cv2.INTER_AREA))
        wanted.append(np.stack(small[-4:]))
        rewards.append(reward)
    assert game.observation_space == gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    np.testing.assert_array_equal(seen, wanted)
    assert gained == rewards


def test_games_start_by_up_to_30_frames_without_action() -> None:
    game = atari_env(PONG)
    game.reset(seed=0)
    frames = {game.reset()[1]["episode_frame_number"] for _ in range(50)}
    assert len(frames) > 10 and min(frames) >= 2 and max(frames) <= 31  # one of them is FIRE


def test_a_lost_life_ends_an_episode_and_the_game_goes_on() -> None:
    game = atari_env(BREAKOUT, noop_max=0)
    whole = atari_env(BREAKOUT, noop_max=0, life_loss_ends=False)
    observation, info = game.reset(seed=3)
    whole.reset(seed=3)
    lives, total, ends = [info["lives"]], 0.0, []
    for step, action in enumerate(random_actions(1000, 1)[:, 0], start=1):
        observation, reward, terminated, truncated, info = game.step(action)
        wanted, true_reward, over, *_ = whole.step(action)
        np.testing.assert_array_equal(observation, wanted)
        assert reward == true_reward and not truncated
        assert terminated == (info["lives"] < lives[-1]) and over == (info["lives"] == 0)
        assert ("episode" in info) == over
        total += true_reward
        if over:
            break
        if terminated:
            again, reset_info = game.reset()
            np.testing.assert_array_equal(again, observation)
            assert reset_info["lives"] == info["lives"]
            ends.append(step)
        lives.append(info["lives"])
    assert len(ends) == 4 and (info["episode"]["r"], info["episode"]["l"]) == (total, step)
    assert game.reset()[1]["lives"] == 5


def test_only_a_reset_after_a_lost_life_goes_on() -> None:
    game = atari_env(BREAKOUT, noop_max=0)
    first, _ = game.reset(seed=3)

    def lose_a_life() -> None:
        for action in itertools.cycle([1, 2]):
            if game.step(action)[2]:
                return

    lose_a_life()
    np.testing.assert_array_equal(game.reset(seed=3)[0], first)
    lose_a_life()
    assert game.reset()[1]["lives"] == 4
    np.testing.assert_array_equal(game.reset()[0], first)  # nothing has ended since
    lose_a_life()
    game.step(0)
    np.testing.assert_array_equal(game.reset()[0], first)  # nor here: max_ep_len may cut an episode


# Many games.


@pytest.fixture
def vector(request: pytest.FixtureRequest) -> Iterator[VectorEnv]:
    games = atari_vector_env(None, **request.param)
    yield games
    games.close()


@pytest.mark.parametrize(
    ("env_id", "keywords"),
    [(BREAKOUT, {}), (BREAKOUT, {"max_game_steps": 60}), (INVADERS, {"life_loss_ends": False}), (PONG, {})],
    ids=["lives", "truncated games", "points of many", "Pong"],
)
def test_the_vector_environment_plays_as_single_ones(env_id: str, keywords: dict[str, Any]) -> None:
    """In both of its autoreset modes: the same frames, rewards, ends and reports for the same actions."""
    keywords, actions = {"noop_max": 0, **keywords}, random_actions(230, 2)
    seen, steps, episodes = play([atari_env(env_id, **keywords) for _ in range(2)], actions)
    assert any(step[3] for step in steps) == (env_id == BREAKOUT)
    assert any((step[0] > 1).any() for step in steps) == (env_id == INVADERS)  # not clipped
    for mode in MODES:
        games = atari_vector_env(None, 2, env_id, autoreset_mode=mode, **keywords)
        seen_there, steps_there, episodes_there = play(games, actions)
        np.testing.assert_array_equal(seen_there, seen)
        assert episodes_there == episodes
        for mine, theirs in zip(steps, steps_there, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(mine[:3], theirs[:3], strict=True))
            assert mine[3].keys() == theirs[3].keys()
            for i, final in mine[3].items():
                # ale_py does not look at the screen at which it truncates; the frames before it are there.
                frames = 3 if mine[2][i] else 4
                np.testing.assert_array_equal(theirs[3][i][:frames], final[:frames])


def test_a_game_that_a_limit_cuts_is_reported_with_the_lives_before() -> None:
    """The limit counts from the last lost life on, and the report from the game's beginning."""
    actions = random_actions(230, 2)

    def cut_at(limit: int, environments: Any) -> list[Episode]:
        ranks_own = Environments(environments, seed=0, first_global_index=0, max_ep_len=limit)
        out = np.zeros((2, 4, 84, 84), np.uint8)
        ranks_own.reset(out)
        episodes = [episode for action in actions for episode in ranks_own.step(action, out).episodes]
        ranks_own.close()
        return episodes

    uncut = play([atari_env(BREAKOUT, noop_max=0, life_loss_ends=False) for _ in range(2)], actions)[2]
    limit = 60
    single = cut_at(limit, [atari_env(BREAKOUT, noop_max=0) for _ in range(2)])
    assert single != uncut and any(episode.length > limit for episode in single)
    for mode in MODES:
        assert cut_at(limit, atari_vector_env(None, 2, BREAKOUT, autoreset_mode=mode, noop_max=0)) == single


def test_whole_games_are_reported_from_the_first_on() -> None:
    actions = random_actions(350, 2)
    games: list[Episode] = []
    for i in range(2):
        whole = atari_env(BREAKOUT, noop_max=0, life_loss_ends=False)
        whole.reset(seed=0)
        total = length = 0
        for step, action in enumerate(actions[:, i]):
            _, reward, terminated, _, _ = whole.step(action)
            total, length = total + reward, length + 1
            if terminated:
                games.append((step, Episode(total, length, i)))
                total = length = 0
                whole.reset()
    wanted = [episode for _, episode in sorted(games)]
    assert len(wanted) >= 3 and any(episode.return_ for episode in wanted)
    for mode in MODES:
        assert play(atari_vector_env(None, 2, BREAKOUT, noop_max=0, autoreset_mode=mode), actions)[2] == wanted
    assert play([atari_env(BREAKOUT, noop_max=0) for _ in range(2)], actions)[2] == wanted


@pytest.mark.parametrize("vector", [{"n": 6, "env_id": PONG}], indirect=True)
def test_native_starts_are_those_of_single_games(vector: VectorEnv) -> None:
    """Each seed chooses how many frames a game waits; a single game that waits as long looks the same."""
    seeds = np.arange(6)
    observations, infos = vector.reset(seed=seeds)
    waited = infos["episode_frame_number"] - 1  # one frame is FIRE
    assert waited.min() >= 0 and waited.max() <= 29 and len(set(waited.tolist())) > 3
    np.testing.assert_array_equal(vector.reset(seed=seeds)[1]["episode_frame_number"] - 1, waited)

    game = atari_env(PONG)
    game.reset(seed=0)
    for i in np.flatnonzero(waited > 0)[:4]:
        seed = next(k for k in itertools.count() if np.random.default_rng(k).integers(1, 31) == waited[i])
        game.unwrapped.np_random = np.random.default_rng(seed)
        np.testing.assert_array_equal(game.reset()[0], observations[i])


@pytest.mark.parametrize("vector", [{"n": 2, "env_id": BREAKOUT, "noop_max": 0, "max_game_steps": 30}], indirect=True)
def test_without_masked_resets_the_next_step_begins_the_next_game(vector: VectorEnv) -> None:
    first, _ = vector.reset(seed=np.arange(2))
    lengths = []
    for step in range(1, 63):
        observations, rewards, _, truncated, infos = vector.step(np.array([0, 0]))
        if "episode" in infos:
            lengths.append((step, infos["episode"]["l"].tolist(), infos["_episode"].tolist()))
        assert truncated.all() == (step in (30, 61))
        if step == 31:
            np.testing.assert_array_equal(observations, first)
    assert lengths == [(30, [30, 30], [True, True]), (61, [30, 30], [True, True])]


@pytest.mark.parametrize("vector", [{"n": 3, "env_id": BREAKOUT, "noop_max": 0}], indirect=True)
def test_a_masked_reset_begins_only_what_is_chosen(vector: VectorEnv) -> None:
    first, _ = vector.reset(seed=np.arange(3))
    for _ in range(100):
        # FIRE has been pressed at the start: the first ball is lost after some 20 steps, by all of them.
        observations, _, terminated, _, infos = vector.step(np.zeros(3, np.int64))
        if terminated.any():
            break
    assert terminated.all() and infos["lives"].tolist() == [4, 4, 4]
    again, infos = vector.reset(options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(again, observations)
    assert infos["lives"].tolist() == [4, 4, 4]
    # The first has begun its next episode; to choose it once more begins a game.
    again, infos = vector.reset(options={"reset_mask": np.array([True, True, False])})
    np.testing.assert_array_equal(again, [first[0], observations[1], observations[2]])
    assert infos["lives"].tolist() == [5, 4, 4]
    np.testing.assert_array_equal(vector.reset()[0], first)


@pytest.mark.parametrize("env_id", ["Pong", "ALE/Pung-v5", "CartPole-v1"])
def test_what_is_no_game_is_told(env_id: str) -> None:
    for build in (lambda: atari_env(env_id), lambda: atari_vector_env(None, 2, env_id)):
        with pytest.raises(ConfigurationError, match=f"env_id='{env_id}' .*'ALE/Pong-v5'"):
            build()


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ({"max_game_steps": 0}, "max_game_steps=0 must be a whole number of at least 1"),
        ({"noop_max": -5}, "noop_max=-5 must be a whole number of at least 0"),
        ({"noop_max": "3"}, "noop_max='3' must be a whole number"),
        ({"life_loss_ends": "no"}, "life_loss_ends='no' must be True or False"),
    ],
)
def test_a_keyword_of_a_game_that_is_out_of_range_is_told(keyword: dict[str, Any], text: str) -> None:
    for build in (lambda: atari_env(PONG, **keyword), lambda: atari_vector_env(None, 2, PONG, **keyword)):
        with pytest.raises(ConfigurationError, match=text):
            build()
