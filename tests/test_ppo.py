# SPDX-License-Identifier: MIT
"""The losses against literal numbers and an independent computation, and what a rank makes of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import TrainingError
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.ppo import PPO, approximate_kl, clipped_value_loss, policy_loss, ppo_losses, value_loss
from ppo_mpi_base.rollout import Batch, Rollout, gae
from ppo_mpi_base.training import training
from ppo_mpi_base.worker import Worker

seeds = st.integers(0, 2**32)


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


RATIOS, ADVANTAGES = t(0.5, 0.5, 1.0, 1.5, 1.5), t(2.0, -2.0, 3.0, 1.0, -1.0)


def test_the_clipped_surrogate_on_literal_numbers() -> None:
    # min(r A, clip(r) A) with epsilon 0.2: 0.5*2, 0.8*-2, 3, 1.2*1, 1.5*-1; the sum is 2.1.
    assert policy_loss(RATIOS.log(), t(0, 0, 0, 0, 0), ADVANTAGES, t(0.2)).item() == pytest.approx(-2.1 / 5)
    assert policy_loss(RATIOS.log() - 4, t(*[-4] * 5), ADVANTAGES, t(0.2)).item() == pytest.approx(-2.1 / 5)


def test_the_surrogate_stops_pulling_only_where_the_ratio_went_too_far_the_good_way() -> None:
    log_probs = RATIOS.log().requires_grad_()
    policy_loss(log_probs, t(0, 0, 0, 0, 0), ADVANTAGES, t(0.2)).backward()
    # d(r A)/d log pi = r A where it is not clipped.
    torch.testing.assert_close(log_probs.grad, -t(1.0, 0.0, 3.0, 0.0, -1.5) / 5)


def test_the_first_step_is_the_policy_gradient() -> None:
    log_probs = t(-1.0, -2.0, -3.0).requires_grad_()
    loss = policy_loss(log_probs, log_probs.detach(), t(1.0, -2.0, 0.5), t(0.2))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 / 3)
    torch.testing.assert_close(log_probs.grad, -t(1.0, -2.0, 0.5) / 3)


def test_value_losses_on_literal_numbers() -> None:
    values, old, returns = t(1.0, 2.0, -1.0), t(0.0, 2.5, -1.0), t(2.0, 0.0, -1.0)
    assert value_loss(values, returns).item() == pytest.approx(5 / 3)
    # Clipped to within 0.2 of the old ones: 0.2, 2.3, -1. The larger errors: 1.8^2, 2.3^2, 0.
    assert clipped_value_loss(values, old, returns, t(0.2)).item() == pytest.approx((1.8**2 + 2.3**2) / 3)


def test_the_kl_estimate_on_literal_numbers() -> None:
    # r = 2 and r = 1/2: (2 - 1 - log 2 + 1/2 - 1 + log 2) / 2.
    assert approximate_kl(t(math.log(2), 0), t(0, math.log(2))).item() == pytest.approx(0.25)
    assert approximate_kl(t(-3.0, 5.0), t(-3.0, 5.0)).item() == 0


def gaussian_log_prob(mean: np.ndarray, log_std: np.ndarray, actions: np.ndarray) -> np.ndarray:
    density = np.exp(-((actions - mean) ** 2) / (2 * np.exp(2 * log_std))) / np.sqrt(2 * np.pi * np.exp(2 * log_std))
    return np.asarray(np.log(np.prod(density, axis=-1)))


class Linear(nn.Module):
    """A linear network in float64 whose weights a test knows."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("space", [Box(-1, 1, (3,)), Discrete(3)], ids=str)
@pytest.mark.parametrize("value_clip_ratio", [None, 0.1])
def test_losses_and_statistics_against_numpy(
    size: int, space: gymnasium.Space, value_clip_ratio: float | None, float64: None
) -> None:
    rng = np.random.default_rng(size)
    x, w, v = rng.normal(size=(size, 4)), rng.normal(size=(4, 3)), rng.normal(size=(4, 1))
    old, values, advantages, returns = (rng.normal(size=size) for _ in range(4))
    actor_critic = ActorCritic(Linear(w), Linear(v), Box(-9, 9, (4,), np.float64), space, initial_log_std=-0.3)
    actions: np.ndarray
    if isinstance(space, Box):
        actions = rng.normal(size=(size, 3))
        log_probs = gaussian_log_prob(x @ w, np.full(3, -0.3), actions)
        entropy = 3 * (-0.3 + 0.5 * np.log(2 * np.pi * np.e))  # summed over dimensions
    else:
        actions = rng.integers(0, 3, size)
        chances = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
        log_probs, entropy = np.log(chances[np.arange(size), actions]), -(chances * np.log(chances)).sum(1).mean()
    old = log_probs + 0.3 * old
    batch = Batch(*(torch.as_tensor(a) for a in (x, actions, old, values, advantages, returns)), extras={})
    named = {"clip_ratio": 0.2, "entropy_coef": 0.01, "value_coef": 0.5}
    if value_clip_ratio is not None:
        named["value_clip_ratio"] = value_clip_ratio
    losses, statistics = ppo_losses(actor_critic, batch, {name: t(number)[0] for name, number in named.items()})

    ratio, error = np.exp(log_probs - old), (x @ v)[:, 0] - returns
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()
    squares = error**2
    if value_clip_ratio is not None:
        clipped = values + np.clip((x @ v)[:, 0] - values, -value_clip_ratio, value_clip_ratio)
        squares = np.maximum(squares, (clipped - returns) ** 2)
    wanted = {"policy": -surrogate - 0.01 * entropy, "value": 0.5 * squares.mean()}
    wanted |= {
        "kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "entropy": entropy,
    }
    found = {**losses, **statistics}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(wanted, rel=1e-9)
    assert all(x.shape == () for x in found.values())


@given(seed=seeds, size=st.integers(1, 8), epsilon=st.floats(0.01, 0.9))
@settings(max_examples=30, deadline=None)
def test_clipping_only_ever_makes_the_objective_worse(seed: int, size: int, epsilon: float) -> None:
    random = torch.Generator().manual_seed(seed)
    new, old, advantages = (torch.randn(size, generator=random, dtype=torch.float64) for _ in range(3))
    plain = -((new - old).exp() * advantages).mean()
    assert policy_loss(new, old, advantages, t(epsilon)[0]) >= plain - 1e-12
    torch.testing.assert_close(policy_loss(new, old, advantages, t(1e9)[0]), plain)
    assert approximate_kl(new, old) >= -1e-12


def test_keywords_of_ppo_are_those_of_the_config() -> None:
    assert list(inspect.signature(PPO).parameters) == list(inspect.signature(Config).parameters)


class Recorder(gymnasium.Env):
    """An environment that keeps the actions it gets; its reward is their sum's sign, episodes take 4 steps."""

    def __init__(self, action_space: gymnasium.Space) -> None:
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (3,), np.float32), action_space
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.standard_normal(3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(np.array(action))
        self.steps += 1
        observation = self.np_random.standard_normal(3).astype(np.float32)
        return observation, float(np.tanh(np.sum(action))), False, self.steps == 4, {}


BOX = Box(-0.5, 0.5, (2,), np.float32)


@contextmanager
def working(tmp_path: Path, action_space: gymnasium.Space = BOX, **keywords: Any) -> Iterator[Worker]:
    """Build the one rank of a small run."""
    given: dict[str, Any] = {
        "total_steps": 1000,
        "env_fn": lambda: Recorder(action_space),
        "network_fn": mlp,
        "value_network_fn": mlp,
        "rollout_length_per_worker": 5,
        "log_directory": str(tmp_path),
        "save_location": None,
        "compile": False,
        "quiet": True,
        "train_pi_epochs": 1,
        "train_v_epochs": 1,
        **keywords,
    }
    config = Config(**given)
    with training(config, config.loss_fn or ppo_losses) as worker:
        yield worker


def collected(worker: Worker) -> Rollout:
    rollout = worker.rollout()
    rollout.advantages, rollout.returns = gae(rollout, 0.99, 0.95)
    rollout.advantages = worker.standardize(rollout.advantages)
    return rollout


def trained(worker: Worker, rollout: Rollout) -> list[dict[str, float]]:
    """Take all updates of an iteration, and return the statistics of each."""
    found = []
    for update in worker.learner.updates(rollout):
        for minibatch in update:
            worker.learner.backward(minibatch)
        found.append(worker.learner.allreduce())
        worker.learner.step(found[-1])
    return found


@pytest.mark.parametrize(
    "space",
    [BOX, Box(-np.inf, np.inf, (1,)), Box(-1, 1, (2, 2)), Discrete(3), Discrete(3, start=7)],
    ids=str,
)
def test_the_first_update_starts_at_ratio_1(tmp_path: Path, space: gymnasium.Space) -> None:
    with working(tmp_path, space, train_pi_epochs=2, pi_lr=0.05) as worker:
        first, second = trained(worker, collected(worker))
        assert first["kl"] == pytest.approx(0, abs=1e-6) and first["clip_fraction"] == 0
        assert first["policy_loss"] == pytest.approx(0, abs=1e-6)  # the mean of standardized advantages
        assert second["kl"] > 1e-5


def test_the_first_update_starts_at_ratio_1_in_bfloat16(tmp_path: Path) -> None:
    with working(tmp_path, Discrete(3), precision="bfloat16", train_pi_epochs=2, pi_lr=0.05) as worker:
        first, second = trained(worker, collected(worker))
        assert worker.actor_critic.precision == "bfloat16"
        assert first["kl"] == pytest.approx(0, abs=1e-6) and first["clip_fraction"] == 0
        assert second["kl"] > 1e-5


def test_the_loss_sees_the_action_before_it_was_clipped(tmp_path: Path) -> None:
    made: list[Recorder] = []
    build: Callable[[], Recorder] = lambda: made.append(Recorder(BOX)) or made[-1]  # type: ignore[func-returns-value]  # noqa: E731
    with working(tmp_path, env_fn=build, initial_log_std=1.0) as worker:
        rollout = collected(worker)
        actions, sent = rollout.actions[:, 0].numpy(), np.stack(made[0].actions)
        assert np.abs(actions).max() > 0.5, "nothing was clipped: the test says nothing"
        np.testing.assert_allclose(sent, np.clip(actions, -0.5, 0.5))
        mean = worker.actor_critic.policy(rollout.observations[:, 0]).mode().detach().numpy()
        wanted = gaussian_log_prob(mean, np.ones(2), actions)
        np.testing.assert_allclose(rollout.log_probs[:, 0].numpy(), wanted, rtol=1e-5)


def test_a_last_minibatch_of_one_sample(tmp_path: Path) -> None:
    with working(tmp_path, train_batch_size=2, train_pi_epochs=2, train_v_epochs=2) as worker:
        rollout = collected(worker)
        sizes = [[len(minibatch.advantages) for minibatch in update] for update in worker.learner.updates(rollout)]
        assert sizes == [[2], [2], [1]] * 2
        before = worker.flat.data.clone()
        statistics = trained(worker, rollout)
        assert len(statistics) == 6 and all(math.isfinite(x) for s in statistics for x in s.values())
        assert worker.flat.data.isfinite().all() and not torch.equal(worker.flat.data, before)


def test_a_rollout_of_one_sample_and_equal_rewards(tmp_path: Path) -> None:
    with working(tmp_path, rollout_length_per_worker=1) as worker:
        trained(worker, collected(worker))
        assert worker.flat.data.isfinite().all()
        assert worker.standardize(torch.full((4, 2), 3.0)).abs().max() < 1e-6


def test_accumulated_minibatches_make_the_update_of_their_samples_together(tmp_path: Path) -> None:
    # 5 samples: minibatches of 2, 2 and 1. All 3 together are one update of the 5, however uneven they are.
    gradients, counts = [], []
    for keywords in ({}, {"train_batch_size": 2, "grad_accum": 3}, {"train_batch_size": 2, "grad_accum": 10}):
        with working(tmp_path / str(len(counts)), **keywords) as worker:
            statistics = trained(worker, collected(worker))
            counts.append(len(statistics))
            gradients.append((worker.flat.gradient.clone(), statistics[0]["value_loss"]))
    assert counts == [1, 1, 1]
    for gradient, loss in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0][0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(gradients[0][1], rel=1e-5)


def test_the_tail_of_an_epoch_is_an_update_of_its_own(tmp_path: Path) -> None:
    with working(tmp_path, train_batch_size=2, grad_accum=2) as worker:
        rollout = collected(worker)
        sizes = [[len(minibatch.advantages) for minibatch in update] for update in worker.learner.updates(rollout)]
        assert sizes == [[2, 2], [1]]
        trained(worker, rollout)
        assert worker.learner.optimizer.steps.tolist() == [2, 2]


def test_an_update_that_would_go_too_far_is_not_applied(tmp_path: Path) -> None:
    with working(tmp_path, target_kl=1e-6, pi_lr=0.1, train_pi_epochs=5, train_v_epochs=5) as worker:
        trained(worker, collected(worker))
        # The first update starts at a KL of 0 and is applied; the second would start too far away, and is not.
        assert worker.learner.optimizer.steps.tolist() == [1, 5] and worker.learner.stopped_by_kl
        # The next iteration begins anew.
        trained(worker, collected(worker))
        assert worker.learner.optimizer.steps.tolist() == [2, 10]


def test_epochs_of_policy_and_value_end_apart(tmp_path: Path) -> None:
    with working(tmp_path, train_pi_epochs=1, train_v_epochs=3) as worker:
        rollout, n = collected(worker), worker.flat.slices["policy"].stop
        policies = [worker.flat.data[:n].clone()]
        for update in worker.learner.updates(rollout):
            for minibatch in update:
                worker.learner.backward(minibatch)
            worker.learner.step(worker.learner.allreduce())
            policies.append(worker.flat.data[:n].clone())
        assert not torch.equal(policies[0], policies[1])
        assert torch.equal(policies[1], policies[2]) and torch.equal(policies[2], policies[3])
        assert worker.learner.optimizer.steps.tolist() == [1, 3]


def test_one_rank_has_no_half_for_each_network(tmp_path: Path, capsys: Any) -> None:
    with working(tmp_path, divide_networks=True, quiet=False) as worker:
        trained(worker, collected(worker))
        assert worker.learner.optimizer.steps.tolist() == [1, 1]
    assert "divide_networks: all ranks train both networks (the number of ranks is odd)" in capsys.readouterr().out


def test_training_is_delayed(tmp_path: Path) -> None:
    with working(tmp_path, delay_training_for_steps=10) as worker:
        counts = [len(trained(worker, collected(worker))) for _ in range(3)]
        assert counts == [0, 0, 1]


def collapsing(actor_critic: ActorCritic, batch: Batch, _: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Push the standard deviation down as hard as it goes."""
    policy, values = actor_critic.policy_and_value(batch.observations)
    return {"policy": 1e6 * policy.entropy().mean(), "value": values.mean()}, {}


def test_adversarial_gradients_leave_a_standard_deviation_above_0(tmp_path: Path) -> None:
    with working(tmp_path, loss_fn=collapsing, train_pi_epochs=50, pi_lr=1.0, pi_grad_clip=None) as worker:
        trained(worker, collected(worker))
        std = worker.actor_critic.log_std.exp()  # type: ignore[operator]
        assert (std > 0).all() and (std < 1e-10).all()
        actions = worker.actor_critic.act(torch.zeros(2, 3), torch.ones(2, 2))[0]
        assert actions.isfinite().all()


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, name: str) -> None:
    def poisoned(actor_critic: ActorCritic, batch: Batch, named: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, statistics = ppo_losses(actor_critic, batch, named)
        return {**losses, name: losses[name] * math.nan}, statistics

    with working(tmp_path, loss_fn=poisoned) as worker:
        rollout, before = collected(worker), worker.flat.data.clone()
        with pytest.raises(TrainingError, match="no parameter was changed"):
            trained(worker, rollout)
        assert torch.equal(worker.flat.data, before)


def test_an_entropy_bonus_widens_the_policy_by_its_weight(tmp_path: Path) -> None:
    # The entropy's derivative by each log-standard-deviation is 1: averaged over dimensions it would be 1/2.
    found = []
    for weight in (0.0, 0.25):
        with working(tmp_path / str(weight), entropy_coef=weight, pi_grad_clip=None) as worker:
            trained(worker, collected(worker))
            found.append(worker.actor_critic.log_std.grad.clone())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(found[0] - found[1], torch.full((2,), 0.25), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    after = []
    for seed in (3, 3, 4):
        with working(tmp_path / str(len(after)), seed=seed) as worker:
            trained(worker, collected(worker))
            after.append(worker.flat.data.clone())
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])
