# SPDX-License-Identifier: MIT
"""Training as a whole, on one rank: what a run returns, writes, counts, hands to callbacks and refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import time
from collections import UserList
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.flat_parameters import FlatParameters
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.interruption import REQUEUE
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic, Gaussian
from ppo_mpi_base.ppo import PPO, ppo_losses
from ppo_mpi_base.rollout import Batch, Rollout
from ppo_mpi_base.saved_policy import load_policy
from ppo_mpi_base.worker import Result, Worker
from tests.scripted import FaultyEnv, ScriptedEnv

small = partial(mlp, hidden=(8,))


def train(tmp_path: Path, **keywords: Any) -> Result:
    """Train one environment for four iterations of 16 steps, or as the keywords say."""
    given: dict[str, Any] = {
        "total_steps": 64,
        "env_fn": ScriptedEnv,
        "network_fn": small,
        "value_network_fn": small,
        "rollout_length_per_worker": 16,
        "train_pi_epochs": 2,
        "train_v_epochs": 2,
        "log_directory": tmp_path / "logs",
        "save_location": tmp_path / "saved",
        "compile": False,
        "quiet": True,
        **keywords,
    }
    return PPO(**given)


def rows(tmp_path: Path) -> list[dict[str, float]]:
    with (tmp_path / "logs" / "progress.csv").open() as file:
        return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]


def column(tmp_path: Path, name: str) -> list[float]:
    return [row[name] for row in rows(tmp_path)]


class Watch(Hooks):
    """Keeps the worker, and what each rollout was collected by and held."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rollouts: list[dict[str, Tensor]] = []

    def on_start(self, worker: Worker) -> None:
        self.worker = worker

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        self.states.append({name: tensor.clone() for name, tensor in worker.actor_critic.state_dict().items()})
        self.rollouts.append({n: x.clone() for n, x in vars(rollout).items() if isinstance(x, Tensor)})

    @property
    def parameters(self) -> Tensor:
        return self.worker.flat.data


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_saved(path: Path, state: dict[str, Tensor]) -> None:
    saved = safetensors.torch.load_file(path)
    assert saved.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor), name


def test_a_rollout_is_evaluated_alike_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Watch(), Watch()
    train(tmp_path / "whole", hooks=[whole])
    monkeypatch.setattr("ppo_mpi_base.collector.EVALUATION_NUMBERS", 12)  # 3 observations of 4 numbers
    train(tmp_path / "parts", hooks=[parts])
    for name in ("log_probs", "values", "next_values"):
        torch.testing.assert_close(parts.rollouts[0][name], whole.rollouts[0][name])


# What a run returns, counts and leaves.


def test_steps_are_counted_over_environments_until_there_are_enough(tmp_path: Path) -> None:
    watch = Watch()
    result = train(tmp_path, total_steps=100, use_vectorized_envs=True, num_environments=2, hooks=[watch])
    assert result.total_steps == 128 and watch.worker.iteration == 4
    assert column(tmp_path, "total_steps") == [32, 64, 96, 128]
    assert column(tmp_path, "iteration") == [1, 2, 3, 4]
    # 64 steps in each of 2 environments, episodes of 5 steps and reward 1 a step.
    assert column(tmp_path, "episodes") == [6, 12, 18, 24]
    assert set(column(tmp_path, "episode_return")) == set(column(tmp_path, "episode_length")) == {5}


def test_a_run_returns_where_everything_is(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert result == Result(64, 5.0, 5.0, str(tmp_path / "saved"), str(tmp_path / "logs" / "learning_curve.png"))
    assert Path(result.learning_curve).stat().st_size > 1000
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.is_file()} == {
        f"{which}.{ending}" for which in ("best", "latest") for ending in ("json", "safetensors")
    }
    assert list((tmp_path / "logs").glob("events.out*"))


def test_a_run_without_an_episode_has_no_best(tmp_path: Path) -> None:
    result = train(tmp_path, env_fn=partial(ScriptedEnv, horizon=1000))
    assert math.isnan(result.best_return) and math.isnan(result.last_return)
    assert not list((tmp_path / "saved").glob("best*")) and list((tmp_path / "saved").glob("latest*"))


def test_nothing_is_saved_if_so_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, save_location=None).save_location is None
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_the_best_networks_are_those_that_earned_the_score(tmp_path: Path) -> None:
    # Two episodes of 8 steps an iteration, whose mean return goes 8, 16, 10.7, 8: the second rollout was the best. It
    # was collected after one update, and before the second.
    earned = {0: 1.0, 1: 1.0, 2: 3.0, 3: 3.0}
    env_fn = partial(ScriptedEnv, horizon=8, reward=lambda g, episode, step: earned.get(episode, 0.0))
    watch = Watch()
    result = train(tmp_path, env_fn=env_fn, hooks=[watch], normalize_observations=True)
    assert column(tmp_path, "episode_return") == pytest.approx([8, 16, 32 / 3, 8])
    assert (result.best_return, result.last_return) == (16, 8)
    assert_saved(tmp_path / "saved" / "best.safetensors", watch.states[1])
    assert_saved(tmp_path / "saved" / "latest.safetensors", watch.worker.actor_critic.state_dict())
    differ = [
        not torch.equal(a["network.1.weight"], b["network.1.weight"]) for a, b in itertools.pairwise(watch.states)
    ]
    assert all(differ), "an update changed nothing: the test says nothing"


def test_a_few_lucky_episodes_are_not_the_best_for_ever(tmp_path: Path) -> None:
    env_fn = partial(ScriptedEnv, horizon=1, reward=lambda g, episode, step: 9.0 if episode == 0 else 1.0)
    result = train(tmp_path, env_fn=env_fn, total_steps=10 * 16)
    assert result.best_return == 1.0, "the mean of the first 16 is 1.5, that of 100 with the first one is 1.08"
    saved = json.loads((tmp_path / "saved" / "best.json").read_text())
    assert (saved["total_steps"], saved["episode_return"]) == (112, 1.0)


def test_networks_that_could_not_be_saved_are_followed_by_the_next_that_are_better(tmp_path: Path) -> None:
    returns = [8.0, 16.0, 12.0, 4.0]  # of the iterations' two episodes; their means over all: 8, 12, 12, 10
    env_fn = partial(ScriptedEnv, horizon=8, reward=lambda g, episode, step: returns[episode // 2] / 8)
    blocker = tmp_path / "saved" / ".best.safetensors.part"

    class Full(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == 1:
                blocker.mkdir()  # in the place of the file that is to be written
            elif worker.iteration == 2:
                self.left = json.loads((tmp_path / "saved" / "best.json").read_text())["episode_return"]
                blocker.rmdir()

    full = Full()
    result = train(tmp_path, env_fn=env_fn, hooks=[full])
    assert full.left == 8.0, "a description must not be that of other networks"
    saved = json.loads((tmp_path / "saved" / "best.json").read_text())
    assert (saved["total_steps"], saved["episode_return"]) == (48, 12.0) and result.best_return == 12.0


def test_a_saved_policy_acts_as_the_one_that_was_trained(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, env_fn=partial(gymnasium.make, "Pendulum-v1"), normalize_observations=True, hooks=[watch])
    trained = watch.worker.actor_critic
    assert not torch.equal(trained.observation_mean, torch.zeros(3, dtype=torch.float64))
    policy = load_policy(tmp_path / "saved", "latest")
    for observation in watch.rollouts[-1]["observations"].flatten(0, 1):
        with torch.no_grad():
            wanted = trained.to_environment(trained.policy(observation[None]).mode())[0]
        np.testing.assert_array_equal(policy(observation.numpy()), wanted.numpy())


class StateDependent(nn.Module):
    """Chooses normal distributions whose standard deviations depend on the observation."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.layers = mlp(obs_dim, 2 * act_dim, (8,))

    def forward(self, seen: Tensor) -> Tensor:
        return self.layers(seen)

    def distribution(self, outputs: Tensor) -> Gaussian:
        mean, log_std = outputs.chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-2, 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_distribution_of_ones_own_is_trained_and_saved(tmp_path: Path, capsys: Any, compiled: bool) -> None:
    watch = Watch()
    pendulum = partial(gymnasium.make, "Pendulum-v1")
    own: dict[str, Any] = {"env_fn": pendulum, "network_fn": StateDependent, "evaluate_every": 32, "quiet": False}
    train(tmp_path, **own, evaluate_episodes=1, entropy_coef=0.1, hooks=[watch], compile=compiled)
    assert "uncompiled" not in capsys.readouterr().out
    assert all(math.isfinite(x) for x in column(tmp_path, "evaluation_return")[1::2])
    trained, last = watch.worker.actor_critic, watch.rollouts[-1]
    before = ActorCritic(StateDependent(3, 1), small(3), trained.observation_space, trained.action_space)
    before.load_state_dict(watch.states[-1])
    observations, actions = (last[name].flatten(0, 1) for name in ("observations", "actions"))
    torch.testing.assert_close(before.policy(observations).log_prob(actions), last["log_probs"].flatten(0, 1))
    assert all(not torch.equal(watch.states[0][name], x) for name, x in watch.states[-1].items() if "weight" in name)
    with pytest.raises(ConfigurationError, match="a network of your own class: give network_fn"):
        load_policy(tmp_path / "saved", "latest")
    with pytest.raises(ConfigurationError, match="network_fn's module lacks the method distribution"):
        load_policy(tmp_path / "saved", "latest", network_fn=small)
    policy = load_policy(tmp_path / "saved", "latest", network_fn=StateDependent)
    with torch.no_grad():
        wanted = trained.to_environment(trained.policy(observations[:1]).mode())[0]
    np.testing.assert_array_equal(policy(observations[0].numpy()), wanted.numpy())


class BothStateDependent(StateDependent):
    """The same, as one network for policy and value."""

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        outputs = self.layers(seen)
        return outputs, outputs[:, :1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_for_both_may_choose_its_distribution(tmp_path: Path, precision: str) -> None:
    pendulum = partial(gymnasium.make, "Pendulum-v1")
    given: dict[str, Any] = {"env_fn": pendulum, "network_fn": BothStateDependent, "value_network_fn": None}
    watch = Watch()
    train(tmp_path, **given, precision=precision, hooks=[watch])
    assert all(math.isfinite(x) for x in column(tmp_path, "entropy"))
    assert not torch.equal(*(state["network.layers.1.weight"] for state in (watch.states[0], watch.states[-1])))
    load_policy(tmp_path / "saved", "latest", network_fn=BothStateDependent)(np.zeros(3, np.float32))


# Updates.


@pytest.mark.usefixtures("float64")
def test_accumulated_minibatches_are_a_larger_one(tmp_path: Path) -> None:
    # 16 samples: updates of 3 + 3, 3 + 3 and 3 + 1, or of 6, 6 and 4. A tail that is dropped, or weighed as if it were
    # whole, changes the third.
    after = []
    for size, grad_accum in ((6, 1), (3, 2)):
        watch = Watch()
        train(tmp_path / str(size), train_batch_size=size, grad_accum=grad_accum, hooks=[watch])
        assert watch.worker.learner.optimizer.steps.tolist() == [4 * 2 * 3, 4 * 2 * 3]
        after.append(watch.parameters)
    torch.testing.assert_close(after[0], after[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("pi_epochs", "v_epochs"), [(1, 3), (3, 1), (0, 2), (2, 0)])
def test_epochs_of_policy_and_value_are_counted_apart(tmp_path: Path, pi_epochs: int, v_epochs: int) -> None:
    watch = Watch()
    train(tmp_path, train_pi_epochs=pi_epochs, train_v_epochs=v_epochs, train_batch_size=8, hooks=[watch])
    assert watch.worker.learner.optimizer.steps.tolist() == [4 * 2 * pi_epochs, 4 * 2 * v_epochs]
    first, last = watch.states[0], watch.worker.actor_critic.state_dict()
    for name, epochs in (("network", pi_epochs), ("value_network", v_epochs)):
        assert torch.equal(first[f"{name}.1.weight"], last[f"{name}.1.weight"]) == (epochs == 0)


def test_the_kl_stop_ends_the_policy_before_the_step_that_is_too_far(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, target_kl=1e-6, pi_lr=0.05, train_pi_epochs=6, train_v_epochs=4, hooks=[watch])
    # Of each iteration the first update, whose KL is 0, is applied; the second, which is too far, is not.
    assert watch.worker.learner.optimizer.steps.tolist() == [4, 16]


@pytest.mark.parametrize("v_epochs", [None, 1], ids=["shared", "two networks"])
def test_a_kl_stop_that_ends_all_updates_is_logged(tmp_path: Path, v_epochs: int | None) -> None:
    networks = {"network_fn": Shared, "value_network_fn": None} if v_epochs is None else {"train_v_epochs": v_epochs}
    train(tmp_path, target_kl=1e-6, pi_lr=0.05, train_pi_epochs=6, **networks)
    for row in rows(tmp_path):
        assert row["kl"] > 1.5e-6 and math.isfinite(row["policy_loss"]) and math.isfinite(row["value_loss"])


def test_learning_rates_fall_linearly(tmp_path: Path) -> None:
    watch = Watch()
    annealed = {"anneal_lr": True, "pi_lr": 0.1, "vf_lr": 0.2}
    train(tmp_path, total_steps=80, **annealed, hooks=[watch])
    # The rates of an iteration are those that it was trained with: the first one by the full rates.
    assert column(tmp_path, "learning_rate_policy") == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    assert column(tmp_path, "learning_rate_value") == pytest.approx([0.2, 0.16, 0.12, 0.08, 0.04])
    assert watch.worker.learning_rates == {"policy": 0, "value": 0}


@pytest.mark.parametrize("name", ["clip_ratio", "entropy_coef"])
def test_coefficients_fall_linearly_where_they_are_to(tmp_path: Path, name: str) -> None:
    class Note(Hooks):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.seen.append({key: float(x) for key, x in worker.coefficients.items()})

    note, given = Note(), {"clip_ratio": 0.5, "entropy_coef": 0.25, "value_coef": 0.75}
    train(tmp_path, total_steps=80, **given, **{f"anneal_{name}": True}, hooks=[note])
    left = [0.8, 0.6, 0.4, 0.2, 0]
    assert note.seen == [{**given, name: pytest.approx(given[name] * x)} for x in left]
    # A row of the logs has those that its iteration was trained with.
    for key, value in given.items():
        logged = [value * x for x in (1, 0.8, 0.6, 0.4, 0.2)] if key == name else [value] * 5
        assert column(tmp_path, f"coefficient_{key}") == pytest.approx(logged)


def test_learning_rates_never_fall_below_0(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, total_steps=50, anneal_lr=True, hooks=[watch])  # 64 are taken
    assert watch.worker.learning_rates == {"policy": 0, "value": 0}


def test_a_learning_rate_of_0_learns_nothing(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, pi_lr=0.0, hooks=[watch])
    first, last = watch.states[0], watch.worker.actor_critic.state_dict()
    assert torch.equal(first["network.1.weight"], last["network.1.weight"])
    assert not torch.equal(first["value_network.1.weight"], last["value_network.1.weight"])


def test_a_hook_sets_rates_and_coefficients_before_each_update(tmp_path: Path) -> None:
    class Schedule(Hooks):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float, Tensor]] = []

        def on_update(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.seen.append((statistics["kl"], statistics["entropy_coef"], worker.flat.data.clone()))
            worker.learning_rates = dict.fromkeys(worker.learning_rates, 1e-3 * (len(self.seen) % 2))
            worker.coefficients["entropy_coef"].fill_(0.5 / len(self.seen))

    def losses(actor_critic: ActorCritic, batch: Batch, coefficients: dict[str, Tensor]) -> Any:
        losses, statistics = ppo_losses(actor_critic, batch, coefficients)
        return losses, {**statistics, "entropy_coef": coefficients["entropy_coef"] + 0.0}

    schedule = Schedule()
    train(tmp_path, hooks=[schedule], loss_fn=losses, entropy_coef=0.5, train_batch_size=4)
    kls, coefficients, parameters = zip(*schedule.seen, strict=True)
    assert len(kls) == 4 * 2 * 4 and kls[0] == 0 and kls[2] > 0
    assert coefficients == pytest.approx([0.5, *(0.5 / k for k in range(1, len(kls)))])
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(parameters)]
    assert moved == [k % 2 == 0 for k in range(len(moved))], "each second rate is 0"


def test_compiled_losses_see_what_a_hook_has_changed_before_an_update(tmp_path: Path, capsys: Any) -> None:
    class Scale(Hooks):
        scale = 0.0

        def on_update(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.seen.append(statistics["value_loss"])
            self.scale = float(len(self.seen))

        def on_start(self, worker: Worker) -> None:
            self.seen: list[float] = []

        def on_losses(self, actor_critic: ActorCritic, batch: Batch, losses: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**losses, "value": self.scale * losses["value"] / losses["value"].detach()}

    scale = Scale()
    train(tmp_path, hooks=[scale], total_steps=32, compile=True, quiet=False)
    assert "uncompiled" not in capsys.readouterr().out
    assert scale.seen == pytest.approx(list(range(len(scale.seen)))) and len(scale.seen) == 4


def test_no_hook_is_called_before_a_step_that_is_not_made(tmp_path: Path) -> None:
    class Count(Hooks):
        calls = 0

        def on_update(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.calls += 1
            assert "policy" in worker.learner.moving()

    count = Count()
    shared: dict[str, Any] = {"network_fn": Shared, "value_network_fn": None}
    train(tmp_path, **shared, target_kl=1e-9, pi_lr=0.1, train_pi_epochs=4, hooks=[count])
    assert count.calls == 4  # the first update of each iteration; the second would go too far


def test_training_begins_after_the_delay(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, delay_training_for_steps=32, total_steps=80, hooks=[watch])
    weights = [state["network.1.weight"] for state in watch.states]
    # 32 steps are collected before the first update, which the third rollout makes.
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert [math.isfinite(row["policy_loss"]) for row in rows(tmp_path)] == [False, False, True, True, True]


def test_a_wrong_loss_is_told_before_the_delay(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="loss_fn must return two dicts"):
        train(tmp_path, delay_training_for_steps=32, loss_fn=lambda actor_critic, batch, coefficients: None)
    assert not rows(tmp_path)


# Callbacks.


def test_the_interception_gets_an_episode_at_a_time_and_its_changes_are_learned_from(tmp_path: Path) -> None:
    lengths: list[int] = []

    def doubled(steps: list) -> list:
        lengths.append(len(steps))
        observation, action, reward, value, logp = steps[0]
        assert observation.tolist() == [0, len(lengths) - 1, 0, 0], "the first step of the next episode"
        assert action.shape == (2,) and np.ndim(reward) == np.ndim(value) == np.ndim(logp) == 0 and reward == 1
        return [(o, a, 2 * r, v, p) for o, a, r, v, p in steps]

    watch = Watch()
    train(tmp_path, total_steps=16, rollout_interception_callback=doubled, hooks=[watch])
    assert lengths == [5, 5, 5, 1]
    assert (watch.rollouts[0]["rewards"] == 2).all()
    assert column(tmp_path, "episode_return") == [5], "reports stay in true rewards"


def test_the_normalization_is_of_what_was_learned_from(tmp_path: Path) -> None:
    def tenfold(steps: list) -> list:
        return [(10 * o, a, r, v, p) for o, a, r, v, p in steps]

    watch = Watch()
    train(tmp_path, total_steps=16, rollout_interception_callback=tenfold, normalize_observations=True, hooks=[watch])
    learned_from = watch.rollouts[0]["observations"].double().numpy().reshape(16, 4)
    np.testing.assert_allclose(watch.worker.observation_moments.mean, learned_from.mean(0), rtol=1e-12)
    assert learned_from[:, 2].max() == 40


def test_an_interception_keeps_the_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rollout_interception_callback returned 4 steps for 5"):
        train(tmp_path, rollout_interception_callback=lambda steps: steps[1:])
    with pytest.raises(ConfigurationError, match="rollout_interception_callback must return a list of steps, not None"):
        train(tmp_path, rollout_interception_callback=lambda steps: None)


def test_the_external_update_comes_between_rollout_and_update(tmp_path: Path) -> None:
    watch = Watch()
    losses = iter([0.5, None, 0.25, 0.125])
    seen: list[tuple[int, int]] = []

    def update() -> float | None:
        seen.append((len(watch.rollouts), watch.worker.learner.optimizer.steps[0]))
        return next(losses)

    train(tmp_path, external_update_callback=update, hooks=[watch])
    assert seen == [(1, 0), (2, 2), (3, 4), (4, 6)]
    np.testing.assert_equal(column(tmp_path, "external_loss"), [0.5, math.nan, 0.25, 0.125])


def test_observations_are_processed_before_they_are_stored(tmp_path: Path) -> None:
    def where(observation: np.ndarray) -> np.ndarray:
        return observation[1:3] / 10  # (episode, step)

    built: list[int] = []

    def network_fn(obs_dim: int, act_dim: int) -> nn.Module:
        built.append(obs_dim)
        return small(obs_dim, act_dim)

    space, watch = Box(0, 100, (2,), np.float32), Watch()
    processed = {"state_processing_hook": where, "obs_space_override": space}
    train(tmp_path, total_steps=16, network_fn=network_fn, hooks=[watch], **processed)
    assert built == [2]
    found = watch.rollouts[0]["observations"][:, 0]
    torch.testing.assert_close(found, torch.tensor([[t // 5, t % 5] for t in range(16)]) / 10)
    assert load_policy(tmp_path / "saved", "latest")(np.zeros(2, np.float32)).shape == (2,)


def test_reports_stay_in_true_rewards_where_signs_are_learned_from(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, env_fn=partial(ScriptedEnv, reward=-3.0), clip_rewards=True, hooks=[watch])
    assert (watch.rollouts[0]["rewards"] == -1).all()
    assert set(column(tmp_path, "episode_return")) == {-15}


# Environments and networks of all kinds.


def counted(**keywords: Any) -> Callable[[], ScriptedEnv]:
    """Return a builder of scripted environments with g = 0, 1, 2, ..."""
    numbers = itertools.count()
    return lambda: ScriptedEnv(g=next(numbers), **keywords)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
def test_a_vector_environment_trains_as_a_list_does(tmp_path: Path, mode: AutoresetMode) -> None:
    script: dict[str, Any] = {
        "horizon": lambda g, episode: 3 + (g + episode) % 3,
        "end": lambda g, episode: ("terminated", "truncated", "both")[(g + episode) % 3],
        "reward": lambda g, episode, step: float(g + step),
    }

    def make_vec_env_fn(env_fn: Callable[[], gymnasium.Env], n: int) -> SyncVectorEnv:
        return SyncVectorEnv([env_fn] * n, autoreset_mode=mode)

    vectorized = {"use_vectorized_envs": True, "num_environments": 3, "max_ep_len": 4}
    found = []
    for name, make in (("list", None), ("vector", make_vec_env_fn)):
        watch = Watch()
        train(tmp_path / name, env_fn=counted(**script), make_vec_env_fn=make, hooks=[watch], **vectorized)
        assert watch.rollouts[0]["truncated"].any() and watch.rollouts[0]["terminated"].any()
        found.append((watch, column(tmp_path / name, "episode_return"), column(tmp_path / name, "episodes")))
    (listed, *told), (vector, *told_by_vector) = found
    assert told == told_by_vector
    for one, other in zip(listed.rollouts, vector.rollouts, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert torch.equal(listed.parameters, vector.parameters)


class Strict(gymnasium.Env):
    """Takes only actions of its space, and gives observations of its space."""

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self) -> Any:
        space = self.observation_space
        if isinstance(space, Discrete):
            return int(space.start + self.np_random.integers(space.n))
        return self.np_random.standard_normal(space.shape).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observe(), float(np.sum(action)), self.steps == 6, False, {}


OBSERVED = Box(-np.inf, np.inf, (3,), np.float32)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (OBSERVED, Discrete(3, start=5)),
        (OBSERVED, Discrete(2, start=-1)),
        (OBSERVED, Box(-0.1, 0.2, (2, 3), np.float32)),
        (OBSERVED, Box(-np.inf, np.inf, (1,), np.float32)),
        (Box(-np.inf, np.inf, (3, 4), np.float32), Discrete(2)),
        (Discrete(4), Discrete(2)),
        (Discrete(4, start=7), Box(-1, 1, (2,), np.float32)),
    ],
    ids=str,
)
def test_spaces(tmp_path: Path, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
    def flat(obs_dim: int, out_dim: int = 1) -> nn.Module:
        return small(math.prod(observations.shape) if observations.shape else obs_dim, out_dim)

    watch = Watch()
    networks = {"network_fn": flat, "value_network_fn": flat}
    vectorized = {"use_vectorized_envs": True, "num_environments": 2}
    result = train(tmp_path, env_fn=lambda: Strict(observations, actions), hooks=[watch], **networks, **vectorized)
    assert result.total_steps == 64 and math.isfinite(result.best_return)
    first, last = watch.states[0], watch.worker.actor_critic.state_dict()
    assert not torch.equal(first["network.1.weight"], last["network.1.weight"]) and watch.parameters.isfinite().all()
    seen = watch.rollouts[0]["observations"][0, 0].numpy()
    assert actions.contains(load_policy(tmp_path / "saved")(seen))


class Shared(nn.Module):
    """A trunk with two heads."""

    def __init__(self, obs_dim: int, act_dim: int, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, width), nn.Tanh())
        self.policy, self.value = nn.Linear(width, act_dim), nn.Linear(width, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(observations)
        return self.policy(features), self.value(features)


def test_one_network_may_give_both(tmp_path: Path) -> None:
    watch = Watch()
    shared = {"network_fn": Shared, "policy_kwargs": {"width": 6}, "value_network_fn": None}
    train(tmp_path, **shared, value_coef=0.5, train_batch_size=8, hooks=[watch])
    assert watch.worker.learner.optimizer.steps.tolist() == [16]
    first, last = watch.states[0], watch.worker.actor_critic.state_dict()
    for name in ("trunk.0.weight", "policy.weight", "value.weight"):
        assert not torch.equal(first[f"network.{name}"], last[f"network.{name}"]), name
    assert last["network.trunk.0.weight"].shape == (6, 4)
    policy = load_policy(tmp_path / "saved", "latest", network_fn=Shared, policy_kwargs={"width": 6})
    seen = watch.rollouts[-1]["observations"][3]
    wanted = watch.worker.actor_critic.policy(seen).mode().detach().clamp(-1, 1)
    np.testing.assert_array_equal(policy(seen[0].numpy()), wanted[0].numpy())


# Bad input: refused before the first step, in one line that names the argument.


def wide(obs_dim: int, out_dim: int = 1) -> nn.Module:
    return small(obs_dim, out_dim + 1)


class Turned(nn.Linear):
    """Gives rows for columns."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).T


@pytest.mark.parametrize(
    ("keywords", "texts"),
    [
        ({"env_fn": None}, ["env_fn is missing"]),
        ({"network_fn": None}, ["network_fn is missing"]),
        ({"total_steps": None}, ["total_steps is missing"]),
        ({"env_fn": "CartPole-v1"}, ["env_fn='CartPole-v1'", "function"]),
        ({"network_fn": 3}, ["network_fn=3", "function"]),
        ({"value_network_fn": "mlp"}, ["value_network_fn='mlp'", "function"]),
        ({"env_fn": lambda: "CartPole-v1"}, ["env_fn must return a gymnasium.Env", "str"]),
        ({"network_fn": lambda o, a: None}, ["network_fn must return a torch.nn.Module", "NoneType"]),
        ({"network_fn": wide}, ["network_fn", "(3, 3)", "(3, 2)"]),
        ({"value_network_fn": wide}, ["value_network_fn", "(3, 2)", "(3, 1)"]),
        ({"value_network_fn": None}, ["value_network_fn is missing", "(means or logits, values)"]),
        ({"network_fn": lambda o, a: nn.Linear(o + 1, a)}, ["network_fn", "fails on observations (3, 4)"]),
        ({"network_fn": lambda o, a: Turned(o, a)}, ["network_fn", "(2, 3)", "(3, 2)"]),
        (
            {
                "env_fn": lambda: ScriptedEnv(action_space=Discrete(2)),
                "network_fn": lambda o, a: small(o, a).requires_grad_(False),
                "value_network_fn": lambda o: small(o).requires_grad_(False),
            },
            ["no parameter of the networks is trainable"],
        ),
        ({"network_fn": nn.Linear(4, 2)}, ["network_fn is already a network", "builds one"]),
        (
            {"network_fn": lambda o: nn.Linear(o, 2)},
            ["network_fn must accept the arguments (obs_dim, act_dim)", "too many positional arguments"],
        ),
        (
            {"value_network_fn": wide, "critic_kwargs": {"width": 3}},
            ["value_network_fn must accept the arguments (obs_dim, width=...)"],
        ),
        ({"resume": "auto", "save_location": None}, ['resume="auto" needs save_location']),
        ({"train_batch_size": 17}, ["train_batch_size=17", "16"]),
        ({"num_environments": 2}, ["num_environments=2", "use_vectorized_envs=True"]),
        ({"use_vectorized_envs": True}, ["use_vectorized_envs", "num_environments"]),
        ({"rollout_length_per_worker": 0}, ["rollout_length_per_worker=0", "at least 1"]),
        ({"total_steps": -1}, ["total_steps=-1"]),
        ({"total_steps": math.inf}, ["total_steps=inf"]),
        ({"total_steps": 10.5}, ["total_steps=10.5", "whole number"]),
        ({"pi_lr": math.nan}, ["pi_lr=nan"]),
        ({"vf_lr": -0.1}, ["vf_lr=-0.1"]),
        ({"gamma": 1.01}, ["gamma=1.01", "from 0 to 1"]),
        ({"clip_ratio": 0}, ["clip_ratio=0", "above 0"]),
        ({"grad_accum": 0}, ["grad_accum=0"]),
        ({"max_ep_len": 0}, ["max_ep_len=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"learning_rate": 1}, ["unknown keyword 'learning_rate'"]),
        ({"train_batchsize": 8}, ["unknown keyword 'train_batchsize'", "'train_batch_size'"]),
        ({"obs_space_override": OBSERVED}, ["obs_space_override", "state_processing_hook"]),
        ({"env_fn": lambda: Strict(MultiBinary(3), Discrete(2))}, ["observation space", "MultiBinary(3)"]),
        ({"env_fn": lambda: Strict(OBSERVED, MultiBinary(3))}, ["action space", "MultiBinary(3)"]),
        ({"env_fn": lambda: Strict(Discrete(4), Discrete(2)), "normalize_observations": True}, ["Discrete(4)"]),
        (
            {"make_vec_env_fn": lambda f, n: f(), "use_vectorized_envs": True, "num_environments": 2},
            ["make_vec_env_fn must return", "ScriptedEnv"],
        ),
        (
            {"make_vec_env_fn": lambda f, n: SyncVectorEnv([f]), "use_vectorized_envs": True, "num_environments": 2},
            ["make_vec_env_fn returned 1", "num_environments=2"],
        ),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else x[0][:50],
)
def test_bad_input_is_one_line(tmp_path: Path, keywords: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        train(tmp_path, **keywords)
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("learning_rates", ("actor", 1e-3), r"learning_rates\['actor'\]=0.001: the names are 'policy' and 'value'"),
        ("learning_rates", ("policy", "fast"), "'fast'.*numbers of at least 0"),
        ("learning_rates", ("value", math.nan), "=nan"),
        ("row", ("sum", torch.ones(2)), r"on_iteration: statistics\['sum'\]=tensor.* must be one number"),
        ("row", ("sum", "many"), r"statistics\['sum'\]='many' must be one number"),
        ("row", ("total_steps", 1), r"statistics\['total_steps'\] must stay \d+, not 1"),
        ("coefficients", ("clip_ratio", 0.1), r"worker.coefficients\['clip_ratio'\]=0.1 must stay a 0-d tensor"),
        ("coefficients", ("clip_ratio", torch.tensor(-1.0)), "=-1: .*PPO's own at least 0"),
        ("coefficients", ("entropy_coef", torch.tensor(math.nan)), "=nan: .*finite"),
        ("coefficients", ("ent_coef", torch.tensor(0.5)), "=0.5: .* clip_ratio, entropy_coef, value_coef; values"),
    ],
)
def test_a_hook_that_sets_what_nobody_reads_is_told(tmp_path: Path, name: str, value: Any, text: str) -> None:
    class Setting(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            place: dict[str, Any] = statistics if name == "row" else getattr(worker, name)
            place[value[0]] = value[1]

    with pytest.raises(ConfigurationError, match=text):
        train(tmp_path, hooks=[Setting()])


def test_hooks_may_be_any_sequence(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, hooks=UserList([watch]))
    assert len(watch.states) == 4


def test_a_hook_can_end_the_run(tmp_path: Path) -> None:
    class Ending(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            if worker.iteration == 2:
                worker.end()

    result = train(tmp_path, total_steps=1e9, hooks=[Ending()])
    assert column(tmp_path, "total_steps") == [16, 32] and result.total_steps == 32
    assert json.loads((tmp_path / "saved" / "latest.json").read_text())["total_steps"] == 32
    assert Path(result.learning_curve).exists()


def test_a_hook_whose_moment_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"Late.on_iter would never run: .*did you mean 'on_iteration'\?$"):
        type("Late", (Hooks,), {"on_iter": lambda self: None})
    with pytest.raises(
        ConfigurationError, match=r"Camel.onIteration would never run: .*did you mean 'on_iteration'\?$"
    ):
        type("Camel", (Hooks,), {"onIteration": lambda self, worker, statistics: None})
    with pytest.raises(
        ConfigurationError, match=r"^Few.on_rollout must accept the arguments \(self, worker, rollout\), but does not"
    ):
        type("Few", (Hooks,), {"on_rollout": lambda self, worker: None})
    type("Fine", (Hooks,), {"on_end": lambda self, *anything: None, "end": lambda self: None})


def test_an_env_fn_that_takes_no_such_keyword_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^env_fn must accept the arguments \(size=\.\.\.\), but does not"):
        train(tmp_path, env_fn=lambda: ScriptedEnv(), env_kwargs={"size": 3})


@pytest.mark.parametrize(
    ("moment", "mistake", "text"),
    [
        (
            "on_rollout",
            lambda w, r: r.extras.update(bonus=torch.ones(16)),
            r"extras\['bonus'\] .* \(16, 1\), not \(16,\)",
        ),
        ("on_rollout", lambda w, r: r.extras.update(bonus=[1.0]), r"extras\['bonus'\] must be a tensor .*, not list"),
        (
            "on_rollout",
            lambda w, r: r.rewards.add_(w.actor_critic.log_std.sum()),
            r"on_rollout: rollout.rewards depend on parameters now: detach\(\)",
        ),
        (
            "on_update",
            lambda w, row: w.learning_rates.update(policy=math.nan),
            r"worker.learning_rates\['policy'\]=nan: .* numbers of at least 0",
        ),
        ("on_iteration", lambda w, row: row.update({1: 2.0}), r"statistics\[1\]: the name must be a str"),
        ("on_iteration", lambda w, row: w.actor_critic.zero_grad(), r"never call zero_grad\(\)"),
    ],
)
def test_what_a_hook_does_wrong_is_told(tmp_path: Path, moment: str, mistake: Any, text: str) -> None:
    hook = type("Wrong", (Hooks,), {moment: lambda self, worker, given: mistake(worker, given)})()
    with pytest.raises(ConfigurationError, match=text):
        train(tmp_path, hooks=[hook])


def test_a_hook_that_forgets_to_return_the_losses_is_told(tmp_path: Path) -> None:
    hook = type("Forgets", (Hooks,), {"on_losses": lambda self, actor_critic, batch, losses: None})()
    with pytest.raises(ConfigurationError, match="Forgets.on_losses must return the dict of losses, not NoneType"):
        train(tmp_path, hooks=[hook])


@pytest.mark.parametrize("argument", ["log_directory", "save_location"])
def test_a_directory_that_cannot_be_written_is_told_before_training(tmp_path: Path, argument: str) -> None:
    (tmp_path / "file").write_text("in the way")
    watch = Watch()
    with pytest.raises(ConfigurationError, match=f"^{argument}=.*file/below.*cannot be written"):
        train(tmp_path, hooks=[watch], **{argument: tmp_path / "file" / "below"})
    assert not watch.rollouts


# What goes wrong during a run.


@pytest.mark.parametrize(
    ("fault", "at", "text"),
    [
        ("nan", 0, "observation is not finite: rank 0, environment 1, step 16 of iteration 0"),
        ("nan", 3, "observation is not finite: rank 0, environment 1, step 3 of iteration 1"),
        ("nan reward", 3, "reward is not finite: rank 0, environment 1, step 2 of iteration 1"),
    ],
)
def test_what_is_not_finite_is_told_before_a_parameter_changes(tmp_path: Path, fault: str, at: int, text: str) -> None:
    # Episodes of 16 steps: the second one, which has the fault, begins with the second iteration.
    numbers = itertools.count()

    def env_fn() -> ScriptedEnv:
        return FaultyEnv(fault, at, in_episode=1, horizon=16) if next(numbers) == 1 else ScriptedEnv(horizon=16)

    watch = Watch()
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, env_fn=env_fn, use_vectorized_envs=True, num_environments=2, hooks=[watch])
    assert str(caught.value).startswith(text) and "nothing was learned" in str(caught.value)
    iterations = 0 if at == 0 else 1
    assert watch.worker.learner.optimizer.steps.tolist() == [2 * iterations, 2 * iterations]
    assert watch.parameters.isfinite().all() and len(watch.rollouts) == iterations


def test_a_reward_that_a_hook_has_spoiled_is_told(tmp_path: Path) -> None:
    class Spoil(Hooks):
        def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
            rollout.rewards[3] += math.nan if worker.iteration == 1 else 0

    with pytest.raises(TrainingError, match=r"on_rollout: a hook has made .*rewards .* NaN: rank 0, iteration 1"):
        train(tmp_path, hooks=[Spoil()])


@pytest.mark.parametrize("at", [0, 3])
def test_an_observation_of_another_shape_is_told(tmp_path: Path, at: int) -> None:
    with pytest.raises(TrainingError, match=r"environment 0: env_fn gave an observation of shape \(3,\)"):
        train(tmp_path, env_fn=partial(FaultyEnv, "shape", at))


def test_an_error_of_the_environment_passes_untouched_and_closes_what_is_open(tmp_path: Path) -> None:
    closed: list[bool] = []

    class Closing(FaultyEnv):
        def close(self) -> None:
            closed.append(True)

    watch = Watch()
    with pytest.raises(RuntimeError, match=r"^scripted$"):
        train(tmp_path, env_fn=partial(Closing, "raise", 2, in_episode=4), hooks=[watch])
    assert closed == [True] and len(watch.rollouts) == 1
    assert len(rows(tmp_path)) == 1, "what was finished is logged"


def test_one_process_trains_twice_alike(tmp_path: Path) -> None:
    after = []
    for name in ("first", "second"):
        watch = Watch()
        train(tmp_path / name, env_fn=partial(gymnasium.make, "CartPole-v1"), hooks=[watch], seed=3)
        torch.rand(3)  # which must not matter
        np.random.rand(3)
        after.append(watch.parameters)
    assert torch.equal(*after)


def test_where_no_loss_is_left_the_iteration_is_over(tmp_path: Path) -> None:
    def one_loss(*given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, statistics = ppo_losses(*given)
        return {"policy": losses["policy"] + losses["value"]}, statistics

    watch = Watch()
    train(tmp_path, loss_fn=one_loss, train_pi_epochs=1, train_v_epochs=3, hooks=[watch])
    assert watch.worker.learner.optimizer.steps.tolist() == [watch.worker.iteration] * 2
    train(tmp_path, loss_fn=one_loss, train_pi_epochs=5, train_v_epochs=5, target_kl=1e-9, pi_lr=0.1, hooks=[watch])
    assert watch.worker.learner.optimizer.steps[0] < 5 * watch.worker.iteration


def test_a_picture_that_cannot_be_drawn_takes_no_result_away(tmp_path: Path, capsys: Any) -> None:
    class InItsPlace(Hooks):
        def on_end(self, worker: Worker) -> None:
            (tmp_path / "logs" / "learning_curve.png").mkdir()

    assert train(tmp_path, hooks=[InItsPlace()]).total_steps == 64
    assert "the learning curve could not be drawn" in capsys.readouterr().err


def test_an_interrupted_run_that_kept_nothing_asks_for_no_requeue(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        train(tmp_path, total_steps=10**9, max_seconds=0.1, save_location=None, quiet=False)
    assert left.value.code == 1
    assert "save_location=None saved nothing to continue from" in capsys.readouterr().out


def test_heads_of_an_unknown_kind_are_not_initialized_by_guess(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self, obs_dim: int, act_dim: int) -> None:
            super().__init__()
            self.policy, self.value = nn.Linear(obs_dim, act_dim), nn.Linear(obs_dim, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.policy(x), self.value(x)

    with pytest.raises(ConfigurationError, match=r"^orthogonal_init=True: .* networks.SharedTrunk"):
        train(tmp_path, network_fn=Both, value_network_fn=None, orthogonal_init=True)


class Ended(ScriptedEnv):
    """An environment that fails, and then does not close, as an AsyncVectorEnv of which one process has died."""

    def step(self, action: Any) -> Any:
        raise EOFError("a process died")

    def close(self) -> None:
        time.sleep(10)


def test_an_error_is_told_though_environments_do_not_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_mpi_base.training.CLOSING", 0.2)
    began = time.monotonic()
    with pytest.raises(EOFError, match="a process died"):
        train(tmp_path, env_fn=Ended)
    assert time.monotonic() - began < 5


def test_environments_that_do_not_close_take_no_result_away(tmp_path: Path, capsys: Any) -> None:
    class Stuck(ScriptedEnv):
        def close(self) -> None:
            raise BrokenPipeError("its process has gone")

    assert train(tmp_path, env_fn=Stuck).total_steps == 64
    assert "environments did not close (BrokenPipeError: its process has gone)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        train(tmp_path, env_fn=Stuck, total_steps=10**9, max_seconds=0.1, save_location=str(tmp_path))
    assert left.value.code == REQUEUE


class Auxiliary(nn.Module):
    """A network that notes a loss of its own in training."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.layer, self.noted = nn.Linear(obs_dim, act_dim), torch.zeros(())

    def forward(self, observations: Tensor) -> Tensor:
        out: Tensor = self.layer(observations)
        if self.training:
            self.noted = out.square().mean()
        return out


def test_losses_are_looked_at_as_they_are_in_training(tmp_path: Path) -> None:
    def with_noted(actor_critic: Any, batch: Any, coefficients: dict[str, Tensor]) -> Any:
        losses, statistics = ppo_losses(actor_critic, batch, coefficients)
        return {**losses, "noted": actor_critic.network.noted}, statistics

    train(tmp_path, network_fn=Auxiliary, loss_fn=with_noted)
    assert "noted_loss" in rows(tmp_path)[0]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ([], "Mine.state must return a dict of tensors"),
        ({"x": 3}, "Mine.state: 'x' must be a tensor, not int"),
        ({"x": torch.zeros(2, dtype=torch.bfloat16)}, "Mine.state: 'x' must be of a dtype that NumPy and safetensors"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "Mine.state: 'x' must be of a dtype that NumPy and safetensors"),
        (None, "Mine.state: 'x' is a different tensor in each call"),
    ],
    ids=["list", "number", "bfloat16", "complex", "new"],
)
def test_a_state_that_no_checkpoint_could_keep_is_told_at_once(tmp_path: Path, state: Any, text: str) -> None:
    class Mine(Hooks):
        kept = torch.zeros(3)

        def state(self) -> Any:
            return {"x": self.kept.clone()} if state is None else state

    with pytest.raises(ConfigurationError, match=text):
        train(tmp_path, hooks=[Mine()])


@pytest.mark.parametrize(
    ("grown", "text"),
    [
        ({"x": torch.zeros(1)}, r"'x' was torch.float32 \(0,\) at the start and is torch.float32 \(1,\) in iteration"),
        ({"x": torch.zeros(0), "y": torch.zeros(1)}, r"'y' was missing at the start and is torch.float32 \(1,\)"),
        ({}, r"'x' was torch.float32 \(0,\) at the start and is missing"),
    ],
)
def test_a_state_that_could_not_be_filled_again_is_told(tmp_path: Path, grown: dict[str, Tensor], text: str) -> None:
    class Mine(Hooks):
        kept: dict[str, Tensor] = {"x": torch.zeros(0)}

        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.kept = grown

        def state(self) -> dict[str, Tensor]:
            return self.kept

    with pytest.raises(ConfigurationError, match="Mine.state: " + text):
        train(tmp_path, hooks=[Mine()])


def test_an_attribute_in_the_place_of_the_state_is_told_before_step_0(tmp_path: Path) -> None:
    mine = type("Mine", (Hooks,), {"on_end": lambda self, worker: None})()
    mine.state = []
    with pytest.raises(ConfigurationError, match="Mine.state is a method of Hooks: give the attribute another name"):
        train(tmp_path, hooks=[mine])
    assert not (tmp_path / "logs" / "progress.csv").exists()


def test_an_attribute_in_the_place_of_the_state_is_told_unless_nothing_is_saved(tmp_path: Path) -> None:
    class Mine(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            self.state = [worker.total_steps]  # type: ignore[assignment, method-assign]

    train(tmp_path, hooks=[Mine()], save_location=None)
    with pytest.raises(ConfigurationError, match="Mine.state is a method of Hooks: give the attribute another name"):
        train(tmp_path, hooks=[Mine()], save_location=str(tmp_path / "saved"))


# Devices: what needs no GPU to be seen.


@pytest.mark.parametrize("shared", [False, True])
def test_no_tensor_becomes_an_array_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """On a CPU torch converts in silence what it refuses to convert on a GPU."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a tensor was converted without .cpu()")

    monkeypatch.setattr(Tensor, "__array__", refuse)
    networks = {"network_fn": Shared, "value_network_fn": None} if shared else {}
    train(tmp_path, normalize_observations=True, normalize_rewards=True, evaluate_every=32, **networks)
    train(tmp_path, total_steps=128, resume="auto", normalize_observations=True, normalize_rewards=True, **networks)


def test_the_wait_for_a_device_is_learning_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatParameters, "to_host", lambda self: time.sleep(0.02))
    train(tmp_path, total_steps=16, train_batch_size=8)
    (row,) = rows(tmp_path)
    assert row["time_learning"] > 0.3 and row["time_communication"] < 0.1


def test_what_is_on_another_device_is_told(tmp_path: Path) -> None:
    def elsewhere(rollout: Rollout, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        return rollout.rewards, rollout.rewards.to("meta")

    class Extra(Hooks):
        def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
            rollout.extras["mine"] = rollout.rewards.to("meta")

    with pytest.raises(ConfigurationError, match=r"advantage_fn must .* on cpu, but its value targets are on meta"):
        train(tmp_path, advantage_fn=elsewhere)
    with pytest.raises(ConfigurationError, match=r"rollout.extras\['mine'\] must be on cpu.*, not meta"):
        train(tmp_path, hooks=[Extra()])


def test_coefficients_given_by_table_fall_from_there(tmp_path: Path) -> None:
    given = {"entropy_coef": 0.02, "clip_ratio": 0.4}
    train(tmp_path, loss_coefficients=given, anneal_entropy_coef=True, anneal_clip_ratio=True)
    for name, first in given.items():
        found = [row[f"coefficient_{name}"] for row in rows(tmp_path)]
        assert found == pytest.approx([first * left for left in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("removed", ["learning_rates['value']", "coefficients['clip_ratio']"])
def test_what_a_hook_has_removed_is_told(tmp_path: Path, removed: str) -> None:
    class Remove(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            worker.learning_rates.pop("value") if "value" in removed else worker.coefficients.pop("clip_ratio")

    with pytest.raises(ConfigurationError, match=rf"^worker.{re.escape(removed)} is missing"):
        train(tmp_path, hooks=[Remove()])
