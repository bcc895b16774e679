# SPDX-License-Identifier: MIT
"""Evaluation: episodes that depend on policy, seed and number alone, their statistics, and a training left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import scipy.stats
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from torch import Tensor, nn

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.evaluate import RESAMPLES, Evaluation, evaluate
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.interruption import REQUEUE
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.saved_policy import load_actor_critic
from ppo_mpi_base.seeding import EVALUATION, generator
from ppo_mpi_base.steppers import first_seed
from ppo_mpi_base.worker import Worker
from tests.evaluating import ACTIONS, Drawing, policy_of, rest, rows, small, state, train
from tests.scripted import FaultyEnv, ScriptedEnv
from tests.test_saved_policy import Own


class Constant(nn.Module):
    """Has the same means or logits for all observations."""

    def __init__(self, *output: float) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.tensor(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.output.expand(len(x), -1)


# Statistics.

SOME = Evaluation((3.0, 1.0, 8.0, 4.0), (3, 1, 8, 5), True, 7)


def test_statistics_of_a_few_returns() -> None:
    assert (SOME.mean, SOME.median, SOME.mean_length) == (4.0, 3.5, 4.25)
    assert SOME.std == pytest.approx(6.5**0.5)  # squares of -1, -3, 4, 0, divided by 4
    one = Evaluation((2.5,), (9,), False, 0)
    assert (one.mean, one.std, one.median) == (2.5, 0.0, 2.5)
    assert np.isnan(one.interval).all() and one.as_dict()["interval"] is None  # JSON has no NaN


@pytest.mark.parametrize("returns", [SOME.returns, tuple(np.random.default_rng(0).lognormal(3, 1, 50).tolist())])
def test_the_interval_is_scipys_for_the_same_draws(returns: tuple[float, ...]) -> None:
    found = Evaluation(returns, (1,) * len(returns), True, 7).interval
    draws = generator(7, EVALUATION)
    wanted = scipy.stats.bootstrap((returns,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=draws)
    np.testing.assert_allclose(found, wanted.confidence_interval, rtol=1e-12)


def test_the_interval_of_many_returns_is_that_of_the_normal_distribution() -> None:
    returns = np.random.default_rng(1).normal(100, 20, 400)
    low, high = Evaluation(tuple(returns.tolist()), (1,) * 400, True, 0).interval
    half = 1.96 * returns.std() / 20
    np.testing.assert_allclose((low, high), (returns.mean() - half, returns.mean() + half), atol=0.1)


def test_json_and_a_line(tmp_path: Path) -> None:
    SOME.save(tmp_path / "evaluation.json")
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found == SOME.as_dict() and [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    low, high = found.pop("interval")
    assert found.pop("std") == SOME.std and (low, high) == SOME.interval
    assert found == {
        "episodes": 4,
        "deterministic": True,
        "seed": 7,
        "mean": 4.0,
        "median": 3.5,
        "mean_length": 4.25,
        "returns": [3.0, 1.0, 8.0, 4.0],
        "lengths": [3, 1, 8, 5],
    }
    assert str(SOME) == (
        f"mean return 4 (95% interval {low:g} to {high:g}), std 2.54951, median 3.5, length 4.25: "
        "4 episodes, most probable actions, seed 7"
    )
    assert str(Evaluation((-0.125,), (1,), False, 0)) == (
        "mean return -0.125, std 0, median -0.125, length 1: 1 episode, sampled actions, seed 0"
    )


# What is played.


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_episode_is_a_function_of_policy_seed_and_number(deterministic: bool) -> None:
    policy = policy_of()
    play = partial(evaluate, policy, Drawing, deterministic=deterministic)
    few, many = play(episodes=3, seed=5), play(episodes=8, seed=5)
    assert many.returns[:3] == few.returns and many.lengths[:3] == few.lengths
    assert (many.deterministic, many.seed, len(many.returns)) == (deterministic, 5, 8)
    assert len(set(many.returns)) == 8 and len(set(many.lengths)) > 2
    assert not set(play(episodes=8, seed=6).returns) & set(many.returns)
    np.random.seed(123)
    random.seed(123)
    torch.manual_seed(123)
    assert play(episodes=8, seed=5) == many
    assert play(episodes=8.0, seed=np.int64(5)) == many


def test_each_environment_is_closed() -> None:
    Drawing.built = Drawing.closed = 0
    evaluate(policy_of(), Drawing, episodes=4)
    assert Drawing.built == Drawing.closed == 4
    with pytest.raises(ZeroDivisionError):
        evaluate(policy_of(), Drawing, episodes=4, progress=lambda over: 1 // 0)
    assert Drawing.built == Drawing.closed


def test_the_training_plays_other_episodes() -> None:
    """The reset seeds are not those of the run with the same seed."""

    class Seeds(ScriptedEnv):
        seen: list[int | None] = []

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
            self.seen.append(seed)
            return super().reset(seed=seed)

    evaluate(policy_of(), Seeds, episodes=5, seed=3)
    seeds = [seed for seed in Seeds.seen if seed is not None]
    assert len(set(seeds)) == 5 and not set(seeds) & {first_seed(3, g, k) for g in range(5) for k in range(5)}


class Echo(ScriptedEnv):
    """Its reward is the first number of the action; an episode is one step."""

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        observation, _, _, _, info = super().step(action)
        return observation, float(np.ravel(action)[0]), True, False, info


def test_actions_are_the_most_probable_or_sampled_ones() -> None:
    policy = policy_of(Constant(0.1, 0.0), log_std=-1.5)
    assert evaluate(policy, Echo, episodes=3).returns == (pytest.approx(0.1),) * 3
    sampled = evaluate(policy, Echo, episodes=400, deterministic=False)
    # Bounds are more than 4 standard deviations away.
    assert scipy.stats.kstest(sampled.returns, scipy.stats.norm(0.1, np.exp(-1.5)).cdf).pvalue > 0.01

    choice = Discrete(3, start=5)
    policy, env_fn = policy_of(Constant(0.0, 1.0, -1.0), choice), partial(Echo, action_space=choice)
    assert evaluate(policy, env_fn, episodes=3).returns == (6.0,) * 3
    counts = np.bincount(np.array(evaluate(policy, env_fn, episodes=400, deterministic=False).returns, int))[5:]
    expected = 400 * np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01


def test_actions_are_clipped_to_the_bounds() -> None:
    assert evaluate(policy_of(Constant(3.0, 0.0)), Echo, episodes=1).returns == (1.0,)


def test_observations_are_normalized_by_what_training_saw_and_by_nothing_else() -> None:
    network = nn.Linear(4, 2)
    policy = policy_of(network, normalize=True)
    mean, std = np.array([7.0, 0.5, -1.0, 0.0]), np.array([2.0, 0.5, 4.0, 1.0])
    policy.set_observation_moments(mean, std)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.1, 0.2, 0.03, 0.0], [0.0] * 4]))
        network.bias.copy_(torch.tensor([0.05, 0.0]))
    # First observations are (3, 0, 0, 0): ((3 - 7) / 2, -1, 1/4, 0) after normalization.
    assert evaluate(policy, partial(Echo, g=3), episodes=2).returns == (pytest.approx(0.05 - 0.2 - 0.2 + 0.0075),) * 2
    np.testing.assert_array_equal(policy.observation_mean, mean)
    np.testing.assert_array_equal(policy.observation_std, std)


class Changeable(nn.Module):
    """Drops out, and counts its calls in one buffer in place and in another by assignment."""

    in_place: Tensor
    assigned: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.assigned = self.assigned + 1
        return self.inner(x)


def test_the_policy_is_left_as_it_was() -> None:
    network = Changeable()
    policy = policy_of(network)
    network.inner[0].eval()
    held = [*policy.parameters(), *policy.buffers()]
    before = [(id(tensor), tensor.data_ptr(), tensor.clone()) for tensor in held]
    modes = [module.training for module in policy.modules()]
    played = evaluate(policy, ScriptedEnv, episodes=2, max_ep_len=3)
    after = [*policy.parameters(), *policy.buffers()]
    assert [(id(tensor), tensor.data_ptr()) for tensor in after] == [(i, at) for i, at, _ in before]
    assert all(torch.equal(tensor, content) for tensor, (_, _, content) in zip(after, before, strict=True))
    assert [module.training for module in policy.modules()] == modes and len(set(modes)) == 2
    assert torch.is_grad_enabled() and played.returns == (3.0, 3.0)

    noisy, still = policy_of(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))), Echo
    assert len(set(evaluate(noisy, still, episodes=9).returns)) == 1, "dropout is at work"


def test_the_global_random_states_and_threads_are_left_as_they_were() -> None:
    def drawn() -> tuple[float, float, float, int]:
        return random.random(), np.random.normal(), torch.rand(()).item(), torch.get_num_threads()

    policy, threads = policy_of(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for evaluated in (True, False):
            random.seed(1)
            np.random.seed(1)
            torch.manual_seed(1)
            np.random.normal()  # NumPy keeps the second of each pair
            if evaluated:
                evaluate(policy, Drawing, episodes=3)
                found = drawn()
        assert drawn() == found and found[3] == 2
    finally:
        torch.set_num_threads(threads)


def test_max_ep_len_and_the_hook_of_observations() -> None:
    played = evaluate(policy_of(), partial(ScriptedEnv, horizon=9), episodes=3, max_ep_len=4)
    assert (played.returns, played.lengths) == ((4.0,) * 3, (4,) * 3)
    seen = []

    def hook(observation: np.ndarray) -> np.ndarray:
        seen.append(observation.copy())
        return np.append(observation, 5.0).astype(np.float32)

    policy = ActorCritic(Constant(0.0, 0.0), None, Box(-9, 9, (5,)), ACTIONS)
    policy.value_network = nn.Identity()
    evaluate(policy, partial(ScriptedEnv, g=2, horizon=3), episodes=1, state_processing_hook=hook)
    assert [list(x) for x in seen[:4]] == [[2, 0, 0, 0], [2, 0, 1, 0], [2, 0, 2, 0], [2, 0, 3, 0]]


def test_progress_is_told() -> None:
    told: list[int] = []
    evaluate(policy_of(), ScriptedEnv, episodes=3, progress=told.append)
    assert told == [3]

    class Slow(ScriptedEnv):
        def reset(self, **keywords: Any) -> tuple[np.ndarray, dict]:
            time.sleep(0.2)
            return super().reset(**keywords)

    told.clear()
    evaluate(policy_of(), Slow, episodes=4, progress=told.append)
    assert told[-1] == 4 and len(told) > 2 and told == sorted(told)


# Whole games, where an episode of training is less than one.


class Lives(gymnasium.Wrapper):
    """Ends an episode every 2 steps; a reset goes on with the game unless that is over, or `anew`."""

    def __init__(self, env: gymnasium.Env, anew: bool = False, moves: bool = False) -> None:
        super().__init__(env)
        self.over, self.anew, self.moves = True, anew, moves

    def reset(self, **keywords: Any) -> tuple[Any, dict]:
        self.steps = 0
        if self.over or self.anew:
            self.observation, info = self.env.reset(**keywords)
            self.over = False
            return self.observation, info
        if self.moves:
            self.observation = self.env.step(np.zeros(2))[0]
        return self.observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps, self.over = self.steps + 1, terminated or truncated
        return self.observation, reward / 100, self.over or self.steps == 2, False, info


class Announces(gymnasium.Wrapper):
    """Says that it will report its episodes."""

    def reset(self, **keywords: Any) -> tuple[Any, dict]:
        observation, info = self.env.reset(**keywords)
        return observation, {**info, "reports_episodes": True}


def game(horizon: int = 7, reward: float = 100.0) -> gymnasium.Env:
    return RecordEpisodeStatistics(ScriptedEnv(horizon=horizon, reward=reward))


@pytest.mark.parametrize(
    ("env_fn", "returns", "lengths"),
    [
        (game, 700.0, 7),
        (lambda: Lives(game()), 700.0, 7),
        (lambda: Lives(game(horizon=1)), 100.0, 1),
        (lambda: Lives(game(), moves=True), 700.0, 7),
        (lambda: Lives(game(), anew=True), 200.0, 2),  # the reset begins a new game: that one will never be reported
        (lambda: TimeLimit(game(), 3), 300.0, 3),  # likewise
        (lambda: TimeLimit(Announces(game()), 3), 300.0, 3),
        (lambda: TimeLimit(Lives(game()), 99), 700.0, 7),
        (lambda: RecordEpisodeStatistics(Lives(ScriptedEnv(horizon=7))), 0.02, 2),  # a life is an episode to it
        (lambda: RecordEpisodeStatistics(ScriptedEnv(horizon=4), stats_key="other"), 4.0, 4),
        (lambda: ScriptedEnv(horizon=4, info=lambda g, e, t: {"episode": {"r": 9, "l": 8}} if t == 4 else {}), 9.0, 8),
    ],
)
def test_games_are_counted_as_they_are_reported(env_fn: Callable[[], Any], returns: float, lengths: int) -> None:
    played = evaluate(policy_of(), env_fn, episodes=2)
    assert (played.returns, played.lengths) == ((pytest.approx(returns),) * 2, (lengths,) * 2)


def test_a_game_that_takes_too_long_counts_as_far_as_it_went() -> None:
    played = evaluate(policy_of(), lambda: Lives(game(horizon=50)), episodes=1, max_ep_len=5)
    assert (played.returns, played.lengths) == ((pytest.approx(5.0),), (5,))


# What does not fit.


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        (
            {"policy": lambda observation: 0},
            "policy must be a save_location or an ActorCritic.*load_actor_critic.*not function",
        ),
        ({"episodes": 0}, "episodes=0 must be a whole number of at least 1"),
        ({"episodes": 2.5}, "episodes=2.5 must be a whole number"),
        ({"episodes": None}, "episodes=None must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"deterministic": 1}, "deterministic=1 must be True or False"),
        ({"max_ep_len": 0}, "max_ep_len=0 must be"),
        ({"env_fn": ScriptedEnv()}, "env_fn=.* must be a function"),
        ({"env_kwargs": [1]}, r"env_kwargs=\[1\] must be a dict"),
        ({"env_fn": lambda: 3}, "env_fn must return a gymnasium.Env, not int"),
        (
            {"env_fn": partial(ScriptedEnv, action_space=Discrete(2))},
            "the action space is Discrete.* the policy's is Box",
        ),
        (
            {"policy": ActorCritic(mlp(3, 2), None, Box(0, 1, (3,)), ACTIONS)},
            "the observation space is Box.*the policy's",
        ),
        ({"state_processing_hook": lambda x: x[1:]}, "state_processing_hook gave an observation of shape"),
        ({"env_fn": partial(FaultyEnv, "nan", 2)}, "observation is not finite: .*episode 0 of an evaluation"),
        (
            {
                "policy": policy_of(actions=Discrete(2)),
                "env_fn": partial(FaultyEnv, "nan", 0, action_space=Discrete(2)),  # NaN gives action 0, no other sign
            },
            "observation is not finite",
        ),
        ({"env_fn": partial(FaultyEnv, "nan reward", 5)}, "reward is not finite"),
        ({"env_fn": partial(FaultyEnv, "shape", 2)}, "environment 0: env_fn gave an observation of shape"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else x[:50],
)
def test_what_does_not_fit_is_told_in_a_line(keywords: dict[str, Any], text: str) -> None:
    given = {"policy": policy_of(), "env_fn": ScriptedEnv, **keywords}
    with pytest.raises((ConfigurationError, TrainingError), match=text) as raised:
        evaluate(given.pop("policy"), given.pop("env_fn"), **given)
    assert "\n" not in str(raised.value)


def test_an_episode_that_fails_is_named_by_its_number() -> None:
    built: list[gymnasium.Env] = []

    def env_fn() -> gymnasium.Env:
        built.append(FaultyEnv("shape" if len(built) == 2 else "nan", 2, in_episode=0 if len(built) == 2 else 9))
        return built[-1]

    with pytest.raises(TrainingError, match="environment 2: env_fn gave an observation of shape"):
        evaluate(policy_of(), env_fn, episodes=4)


# During training.


def test_a_run_with_evaluations_is_the_run_without(tmp_path: Path) -> None:
    dropout = {
        "network_fn": lambda obs_dim, act_dim: nn.Sequential(small(obs_dim, 8), nn.Dropout(), nn.Linear(8, act_dim))
    }
    without = train(tmp_path / "without", seed=3, **dropout)
    evaluated = train(tmp_path / "with", seed=3, evaluate_every=24, evaluate_episodes=3, **dropout)
    assert state(evaluated) == state(without) and evaluated.flat.attached()
    ours, theirs = rows(tmp_path / "with"), rows(tmp_path / "without")
    np.testing.assert_equal([rest(row) for row in ours], [rest(row) for row in theirs])
    # Iterations end at 16, 32, 48 and 64; the multiples of 24 are 24 and 48.
    assert [np.isfinite(row["evaluation_return"]) for row in ours] == [False, True, True, False]
    assert "evaluation_return" not in theirs[0]
    wanted = train(tmp_path / "short", seed=3, total_steps=48, **dropout)
    played = evaluate(wanted.actor_critic, Drawing, episodes=3, seed=3)
    assert (ours[2]["evaluation_return"], ours[2]["evaluation_length"]) == (played.mean, played.mean_length)


def test_evaluations_go_on_after_a_resume(tmp_path: Path) -> None:
    env_fn = {"env_fn": partial(gymnasium.make, "CartPole-v1"), "evaluate_every": 32, "evaluate_episodes": 2, "seed": 3}
    train(tmp_path / "stopped", total_steps=48, **env_fn)
    for name in ("stopped", "whole"):
        train(tmp_path / name, total_steps=96, **env_fn)
    ours, theirs = rows(tmp_path / "stopped"), rows(tmp_path / "whole")
    assert [np.isfinite(row["evaluation_return"]) for row in theirs] == [False, True] * 3
    assert [row["evaluation_return"] for row in ours] == pytest.approx(
        [row["evaluation_return"] for row in theirs], nan_ok=True, rel=0, abs=0
    )


def test_an_evaluation_is_told_and_seen_by_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class See(Hooks):
        seen: list[float | None] = []

        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.seen.append(statistics.get("evaluation_return"))

    env_fn = partial(ScriptedEnv, horizon=3, reward=2.0)
    with pytest.raises(AttributeError):  # the worker was not kept
        train(tmp_path, env_fn=env_fn, evaluate_every=32, evaluate_episodes=2, quiet=False, hooks=[See()])
    assert See.seen == [None, 6.0, None, 6.0]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation")]
    assert [line.split(":")[0] for line in told] == ["evaluation at 32 steps", "evaluation at 64 steps"]
    assert "mean return 6 (95% interval 6 to 6)" in told[0]


def test_an_evaluations_time_is_neither_the_environments_nor_the_learnings(tmp_path: Path) -> None:
    class Slow(ScriptedEnv):
        built = 0

        def __init__(self) -> None:
            super().__init__(horizon=2)
            Slow.built += 1
            self.seconds = 0.2 if Slow.built > 3 else 0.0  # one is trained in, two are there to be checked

        def step(self, action: Any) -> Any:
            time.sleep(self.seconds)
            return super().step(action)

    train(tmp_path, env_fn=Slow, total_steps=16, evaluate_every=16, evaluate_episodes=3)
    (row,) = rows(tmp_path)
    assert row["time_rest"] > 0.8 and row["seconds"] > 1.2


IN_A_NEW_PROCESS = """
import sys
import gymnasium
from ppo_mpi_base.evaluate import evaluate
from ppo_mpi_base.saved_policy import load_actor_critic
for directory in sys.argv[1:]:
    saved = load_actor_critic(directory, "latest")
    for deterministic in (True, False):
        env_fn = lambda: gymnasium.make("Pendulum-v1")
        played = evaluate(saved.actor_critic, env_fn, episodes=3, deterministic=deterministic)
        played.save(f"{directory}/{deterministic}.json")
    print(saved.which, saved.total_steps)
"""


def test_a_new_process_gives_the_returns_of_the_one_that_trained(tmp_path: Path) -> None:
    """In the one weights are at odd places of one tensor and there is one thread, in the other there are two."""
    env_fn = partial(gymnasium.make, "Pendulum-v1")
    network = partial(mlp, hidden=(64, 64))
    networks = {"network_fn": network, "value_network_fn": network, "evaluate_every": 64, "evaluate_episodes": 3}
    directories = {normalize: tmp_path / str(normalize) for normalize in (True, False)}
    workers = {
        normalize: train(directory, env_fn=env_fn, normalize_observations=normalize, **networks)
        for normalize, directory in directories.items()
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *(str(path / "saved") for path in directories.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "latest 64\n" * 2, done.stderr
    for normalize, directory in directories.items():
        for deterministic in (True, False):
            played = evaluate(workers[normalize].actor_critic, env_fn, episodes=3, deterministic=deterministic)
            assert json.loads((directory / "saved" / f"{deterministic}.json").read_text()) == played.as_dict()
            assert len(set(played.returns)) == 3
            if deterministic:
                assert rows(directory)[-1]["evaluation_return"] == played.mean


def test_a_network_of_ones_own_class_is_evaluated_from_its_files(tmp_path: Path) -> None:
    own: dict[str, Any] = {"network_fn": Own, "policy_kwargs": {"width": 7}}
    worker = train(tmp_path, env_fn=partial(ScriptedEnv, horizon=5), **own)
    saved, env_fn = tmp_path / "saved", partial(ScriptedEnv, horizon=5)
    played = evaluate(saved, env_fn, episodes=2, **own)
    assert played.lengths == evaluate(worker.actor_critic, env_fn, episodes=2).lengths
    with pytest.raises(ConfigurationError, match="own class: give network_fn, .* to load_policy, evaluate"):
        evaluate(saved, env_fn, episodes=2)


def test_what_was_saved_is_told(tmp_path: Path) -> None:
    worker = train(tmp_path, env_fn=partial(ScriptedEnv, horizon=1000))
    saved = load_actor_critic(tmp_path / "saved")
    assert saved[1:] == ("latest", 64, None, False)
    for name, tensor in saved.actor_critic.state_dict().items():
        assert torch.equal(tensor, worker.actor_critic.state_dict()[name]), name
    train(tmp_path / "other", env_fn=partial(ScriptedEnv, horizon=8, reward=-1.0))
    saved = load_actor_critic(tmp_path / "other" / "saved")
    assert saved[1:] == ("best", 16, -8.0, False)


def test_the_latest_networks_can_be_asked_for(tmp_path: Path) -> None:
    env_fn = partial(gymnasium.make, "Pendulum-v1", max_episode_steps=8)
    worker = train(tmp_path, env_fn=env_fn, pi_lr=0.1)
    best, latest = (evaluate(tmp_path / "saved", env_fn, episodes=2, which=which) for which in ("best", "latest"))
    assert latest.returns == evaluate(worker.actor_critic, env_fn, episodes=2).returns != best.returns
    with pytest.raises(ConfigurationError, match="which='last' is not one of 'best', 'latest'"):
        evaluate(tmp_path / "saved", env_fn, episodes=2, which="last")  # type: ignore[arg-type]


ONE = Drawing()


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"evaluate_every": 0}, "evaluate_every=0 must be a whole number of at least 1"),
        ({"evaluate_episodes": 0}, "evaluate_episodes=0 must be"),
        ({"env_fn": lambda: ONE, "evaluate_every": 16}, "evaluate_every: env_fn returns the same object"),
        (
            {
                "env_fn": partial(FaultyEnv, "nan", 3, horizon=4),
                "train_batch_size": 2,
                "evaluate_every": 2,
                "rollout_length_per_worker": 2,
            },
            "in episode 0 of an ev",
        ),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else x[:50],
)
def test_a_training_with_unfit_evaluations_is_refused(tmp_path: Path, keywords: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigurationError, TrainingError), match=text):
        train(tmp_path, **keywords)


class Asked(ScriptedEnv):
    """In its first evaluation the process is asked to stop; then each step takes its time."""

    built, seconds = 0, 0.0

    def __init__(self) -> None:
        super().__init__(horizon=4)
        Asked.built += 1
        self.evaluated = Asked.built == 4

    def step(self, action: Any) -> Any:
        if self.evaluated:
            os.kill(os.getpid(), signal.SIGTERM)
            self.evaluated = False
        if Asked.built > 3:
            time.sleep(Asked.seconds)
        return super().step(action)


@pytest.mark.parametrize(("seconds", "finished"), [(0.01, True), (0.1, False)])
def test_a_signal_in_an_evaluation_ends_the_run_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, finished: bool
) -> None:
    Asked.built, Asked.seconds = 0, seconds
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, env_fn=Asked, evaluate_every=32, evaluate_episodes=10, stop_deadline=3.0, quiet=False)
    assert ended.value.code == REQUEUE and time.monotonic() - started < 3.5
    assert [row["total_steps"] for row in rows(tmp_path)] == [16, 32], "the iteration is there"
    assert ("evaluation_return" in rows(tmp_path)[-1]) == finished
    assert ("evaluation at 32 steps skipped" in capsys.readouterr().out) != finished
    assert max((tmp_path / "saved" / "checkpoints").glob("*.json")).stem.endswith("32")
