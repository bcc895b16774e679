# SPDX-License-Identifier: MIT
"""Advantages against naive loops and literal numbers, and the order of minibatches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.rollout import (
    Batch,
    Rollout,
    Shuffled,
    Step,
    checked_estimates,
    explained_variance,
    gae,
    intercept,
    minibatch_order,
)
from ppo_mpi_base.seeding import MINIBATCHES, generator


def rollout_of(**columns: Any) -> Rollout:
    """Return a rollout with these (T, N) columns, float64, and zeros or False elsewhere."""
    given = {name: torch.as_tensor(np.asarray(x)) for name, x in columns.items()}
    size = given["rewards"].shape
    zeros, never = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
    floats = {name: zeros.clone() for name in ("log_probs", "values", "next_values")}
    seen = {name: torch.zeros(*size, 3) for name in ("observations", "next_observations")}
    ends = {name: never.clone() for name in ("terminated", "truncated")}
    return Rollout(**{**floats, **seen, **ends, "actions": torch.zeros(*size, 2), **given})


def random_rollout(rng: np.random.Generator) -> Rollout:
    """Return a rollout with random ends, next values of which no two are equal to a value."""
    size = (int(rng.integers(1, 13)), int(rng.integers(1, 5)))
    terminated = rng.random(size) < rng.choice([0.0, 0.2, 0.7])
    truncated = (rng.random(size) < rng.choice([0.0, 0.2, 0.7])) & ~terminated
    floats = {name: rng.standard_normal(size) for name in ("rewards", "values", "next_values")}
    return rollout_of(**floats, terminated=terminated, truncated=truncated)


def naive_advantages(rollout: Rollout, gamma: float, lam: float) -> np.ndarray:
    """Return equation 16 of the paper as it stands: a sum over each episode's own TD errors, one episode at a time."""
    rewards, values, following = (x.numpy() for x in (rollout.rewards, rollout.values, rollout.next_values))
    length, environments = rewards.shape
    advantages = np.full(rewards.shape, np.nan)
    for i in range(environments):
        episodes: list[list[int]] = [[]]
        for t in range(length):
            episodes[-1].append(t)
            if rollout.terminated[t, i] or rollout.truncated[t, i]:
                episodes.append([])
        for episode in episodes:
            errors = []
            for t in episode:
                bootstrap = 0.0 if rollout.terminated[t, i] else gamma * following[t, i]
                errors.append(rewards[t, i] + bootstrap - values[t, i])
            for k, t in enumerate(episode):
                advantages[t, i] = sum((gamma * lam) ** j * error for j, error in enumerate(errors[k:]))
    return advantages


def test_advantages_equal_a_naive_loop_on_a_thousand_random_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rollout, gamma, lam = random_rollout(rng), rng.uniform(0, 1), rng.uniform(0, 1)
        advantages, returns = gae(rollout, gamma, lam)
        np.testing.assert_allclose(advantages.numpy(), naive_advantages(rollout, gamma, lam), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(returns.numpy(), (advantages + rollout.values).numpy(), rtol=0, atol=0)


# Reward 1, gamma = lambda = 1/2. Values 1, 2, 3, and after the episode's end 5, 6. The final observation is worth 4,
# that after the rollout's end 8. TD errors: 1 + 2/2 - 1 = 1, 1 + 3/2 - 2 = 1/2, 1 + 4/2 - 3 = 0 (or 1 - 3 = -2
# without a bootstrap); 1 + 6/2 - 5 = -1, 1 + 8/2 - 6 = -1.
VALUES, NEXT_VALUES = [1.0, 2.0, 3.0, 5.0, 6.0], [2.0, 3.0, 4.0, 6.0, 8.0]
TRUNCATED, TERMINATED = [1.125, 0.5, 0.0, -1.25, -1.0], [1.0, 0.0, -2.0, -1.25, -1.0]


def test_a_fixed_horizon_truncates_but_does_not_terminate() -> None:
    ends = np.array([[False, False, True, False, False]] * 2).T
    # Beside each other: only the truncated environment gets the bootstrap.
    rollout = rollout_of(
        rewards=np.ones((5, 2)),
        values=np.array([VALUES] * 2).T,
        next_values=np.array([NEXT_VALUES] * 2).T,
        truncated=ends & [True, False],
        terminated=ends & [False, True],
    )
    advantages, returns = gae(rollout, 0.5, 0.5)
    np.testing.assert_array_equal(advantages.T.numpy(), [TRUNCATED, TERMINATED])
    np.testing.assert_array_equal(returns.T.numpy(), np.array([TRUNCATED, TERMINATED]) + VALUES)


def test_the_rollouts_end_bootstraps_unless_the_last_step_is_terminal() -> None:
    columns = {"rewards": [[1.0, 1.0, 1.0]], "values": [[3.0, 3.0, 3.0]], "next_values": [[100.0, 100.0, 100.0]]}
    rollout = rollout_of(**columns, terminated=[[True, False, False]], truncated=[[False, True, False]])
    np.testing.assert_array_equal(gae(rollout, 0.5, 0.9)[0].numpy(), [[-2.0, 48.0, 48.0]])


def test_a_value_that_is_not_finite_after_a_terminal_step_does_no_harm() -> None:
    rollout = rollout_of(rewards=[[1.0]], values=[[3.0]], next_values=[[math.nan]], terminated=[[True]])
    np.testing.assert_array_equal(gae(rollout, 0.5, 0.9)[0].numpy(), [[-2.0]])


@given(st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_lambda_0_is_one_step_and_lambda_1_is_the_return(seed: int, gamma: float) -> None:
    rollout = random_rollout(np.random.default_rng(seed))
    one_step = rollout.rewards + gamma * rollout.next_values * ~rollout.terminated
    torch.testing.assert_close(gae(rollout, gamma, 0.0)[1], one_step)
    # With lambda = 1 the values on the way cancel where each next value is the next step's value.
    goes_on = ~rollout.done[:-1]
    rollout.next_values[:-1][goes_on] = rollout.values[1:][goes_on]
    discounted = torch.where(rollout.terminated[-1], 0.0, rollout.next_values[-1])
    returns = gae(rollout, gamma, 1.0)[1]
    for t in reversed(range(len(returns))):
        discounted = torch.where(rollout.truncated[t], rollout.next_values[t], discounted)
        discounted = rollout.rewards[t] + gamma * torch.where(rollout.terminated[t], 0.0, discounted)
        torch.testing.assert_close(returns[t], discounted)


def test_advantages_keep_the_width_of_the_values_and_change_nothing() -> None:
    rollout = random_rollout(np.random.default_rng(1))
    for name in ("rewards", "values", "next_values"):
        setattr(rollout, name, getattr(rollout, name).float())
    before = rollout.values.clone()
    advantages, returns = gae(rollout, 0.99, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32 and advantages.shape == rollout.rewards.shape
    torch.testing.assert_close(rollout.values, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "not NoneType"),
        (torch.zeros(2, 3), "not Tensor"),
        ((torch.zeros(2, 3),), "not 1 things"),
        ((torch.zeros(3, 2), torch.zeros(2, 3)), r"its advantages are torch.float32 \(3, 2\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 1)), r"its value targets are torch.float32 \(2, 1\)"),
        ((torch.zeros(2, 3, 1), torch.zeros(2, 3)), r"\(2, 3, 1\)"),
        ((torch.zeros(2, 3), np.zeros((2, 3))), "value targets are ndarray"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), "torch.int64"),
    ],
)
def test_an_estimate_of_another_form_is_told(returned: Any, text: str) -> None:
    rollout = rollout_of(rewards=torch.zeros(2, 3))
    with pytest.raises(ConfigurationError, match=r"advantage_fn must return .* \(T, N\) = \(2, 3\), .*" + text):
        checked_estimates(lambda *_: returned)(rollout, 0.99, 0.95)


def test_an_estimate_must_be_finite_and_needs_no_gradient() -> None:
    rollout, zeros = rollout_of(rewards=torch.zeros(2, 3)), torch.zeros(2, 3)
    with pytest.raises(TrainingError, match="value targets are not all finite"):
        checked_estimates(lambda *_: (zeros, zeros / 0))(rollout, 0.99, 0.95)
    advantages, targets = checked_estimates(lambda *_: (zeros.clone().requires_grad_(), zeros))(rollout, 0.99, 0.95)
    assert not advantages.requires_grad and torch.equal(targets, zeros)


def test_explained_variance_is_numpys() -> None:
    rng, ranks = np.random.default_rng(2), Communicator()
    for mean in (0.0, 1e4):
        returns = mean + rng.standard_normal((50, 3))
        values = returns + 0.5 * rng.standard_normal((50, 3)) + 3.0
        wanted = 1 - np.var(returns - values) / np.var(returns)
        found = explained_variance(torch.as_tensor(values), torch.as_tensor(returns), ranks)
        assert found == pytest.approx(wanted, rel=1e-6)
    assert explained_variance(torch.as_tensor(returns), torch.as_tensor(returns), ranks) == 1.0
    guess = torch.full((50, 3), 5.0, dtype=torch.float64)
    assert explained_variance(guess, torch.as_tensor(returns), ranks) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.7, -1234.567, 3e7])
def test_nothing_is_explained_where_returns_do_not_vary(constant: float) -> None:
    # 7.7 has no finite binary expansion: sums of its squares round, and a variance that is not quite 0 comes out.
    returns = torch.full((37, 5), constant)
    assert math.isnan(explained_variance(returns * 0.5, returns, Communicator()))
    assert math.isnan(explained_variance(torch.arange(37 * 5.0).view(37, 5), returns, Communicator()))


sizes = {"length": st.integers(1, 20), "environments": st.integers(1, 6), "seed": st.integers(0, 2**32)}


def order_of(length: int, environments: range, seed: int) -> list[tuple[int, int]]:
    """Return the order as (time, global environment), drawn as a rank with these environments draws it."""
    n = len(environments)
    generators = [generator(seed, MINIBATCHES, g) for g in environments]
    order = minibatch_order(length, generators, generator(seed, MINIBATCHES, environments[0], 1))
    return [(k // n, environments[k % n]) for k in order.tolist()]


@given(**sizes)
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_each_sample_once(length: int, environments: int, seed: int) -> None:
    generators = [generator(seed, MINIBATCHES, i) for i in range(environments)]
    order = minibatch_order(length, generators, generator(seed, MINIBATCHES, 0, 1))
    np.testing.assert_array_equal(np.sort(order), np.arange(length * environments))


@given(**sizes)
@settings(max_examples=50, deadline=None)
def test_minibatches_draw_evenly_from_the_environments(length: int, environments: int, seed: int) -> None:
    order = order_of(length, range(environments), seed)
    for start in range(0, len(order), environments):
        assert sorted(i for _, i in order[start : start + environments]) == list(range(environments))


@given(length=st.integers(1, 20), seed=st.integers(0, 2**32), ranks=st.sampled_from([1, 2, 3]), n=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_ranks_draw_together_what_one_rank_would(length: int, seed: int, ranks: int, n: int) -> None:
    alone = order_of(length, range(ranks * n), seed)
    together = [order_of(length, range(rank * n, (rank + 1) * n), seed) for rank in range(ranks)]
    for k in range(length):
        of_ranks = [sample for order in together for sample in order[k * n : (k + 1) * n]]
        assert sorted(of_ranks) == sorted(alone[k * ranks * n : (k + 1) * ranks * n])


def test_times_and_environments_are_shuffled_anew_each_epoch() -> None:
    generators = [generator(0, MINIBATCHES, i) for i in range(4)]
    between = generator(0, MINIBATCHES, 0, 1)
    first, second = (minibatch_order(50, generators, between) for _ in range(2))
    assert not np.array_equal(first, second)
    times = np.stack([(first // 4)[first % 4 == i] for i in range(4)])
    assert len(np.unique(times, axis=0)) == 4, "environments share a permutation of times"
    groups = first.reshape(50, 4) % 4
    assert len(np.unique(groups, axis=0)) > 5, "environments always come in the same order"


def numbered(length: int = 4, environments: int = 3) -> Rollout:
    """Return a rollout in which each number says its column, time and environment."""
    where = torch.arange(length * environments, dtype=torch.float64).view(length, environments)
    rollout = rollout_of(rewards=where, values=where + 100, log_probs=where + 200, next_values=where + 300)
    rollout.observations = torch.stack([where, where + 0.25], dim=-1)
    rollout.actions = where.long() + 400
    rollout.advantages, rollout.returns = where + 500, where + 600
    rollout.extras = {"more": torch.stack([where + 700, where + 800], dim=-1)}
    return rollout


def test_all_columns_are_shuffled_alike() -> None:
    order = np.array([7, 0, 11, 3, 1, 2, 4, 5, 6, 8, 9, 10])
    (batch,) = next(Shuffled(12).epochs(numbered().samples(), [order]))
    flat = torch.as_tensor(order).double()
    torch.testing.assert_close(batch.observations, torch.stack([flat, flat + 0.25], dim=-1))
    assert torch.equal(batch.actions, torch.as_tensor(order) + 400)
    for column, offset in (("values", 100), ("log_probs", 200), ("advantages", 500), ("returns", 600)):
        torch.testing.assert_close(getattr(batch, column), flat + offset)
    torch.testing.assert_close(batch.extras["more"], torch.stack([flat + 700, flat + 800], dim=-1))


@given(size=st.integers(1, 14), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_each_epoch_has_every_sample_the_last_minibatch_what_is_left(size: int, seed: int) -> None:
    rollout = numbered()
    orders = [np.random.default_rng([seed, epoch]).permutation(12) for epoch in range(3)]
    seen = 0
    for order, minibatches in zip(orders, Shuffled(size).epochs(rollout.samples(), orders), strict=True):
        assert [len(part.advantages) for part in minibatches] == [min(size, 12 - start) for start in range(0, 12, size)]
        for name in Batch._fields[:-1]:
            joined = torch.cat([getattr(part, name) for part in minibatches])
            np.testing.assert_array_equal(joined, getattr(rollout, name).flatten(0, 1).numpy()[order])
        more = torch.cat([part.extras["more"] for part in minibatches])
        np.testing.assert_array_equal(more, rollout.extras["more"].flatten(0, 1).numpy()[order])
        seen += 1
    assert seen == 3


def test_all_iterations_share_a_memory_until_extras_change() -> None:
    order, shuffled, rollout = np.arange(12), Shuffled(5), numbered()
    first = next(shuffled.epochs(rollout.samples(), [order]))
    assert next(shuffled.epochs(numbered().samples(), [order])) is first
    rollout.extras = {"other": rollout.values.float()}
    (batch, *_) = next(shuffled.epochs(rollout.samples(), [order]))
    assert batch.extras.keys() == {"other"} and batch.extras["other"].tolist() == [100, 101, 102, 103, 104]


def test_a_callback_sees_an_episode_or_the_rollouts_end_at_a_time() -> None:
    rollout = numbered(length=4, environments=3)
    rollout.terminated = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]).bool()
    rollout.truncated = torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]).bool()
    calls: list[list[Step]] = []

    def callback(steps: list[Step]) -> list[Step]:
        calls.append(steps)
        return steps

    before = numbered()
    intercept(rollout, callback)
    # Indices t * N + i: environment 0 ends in step 1, environment 1 in the last step, environment 2 in steps 0 and 2.
    wanted = [[0, 3], [6, 9], [1, 4, 7, 10], [2], [5, 8], [11]]
    assert [[int(step[2]) for step in steps] for steps in calls] == wanted
    observation, action, reward, value, log_prob = calls[1][0]
    np.testing.assert_array_equal(observation, [6, 6.25])
    assert (action, reward, value, log_prob) == (406, 6, 106, 206)
    for name in ("observations", "actions", "rewards", "values", "log_probs"):
        assert torch.equal(getattr(rollout, name), getattr(before, name))


def test_what_a_callback_returns_is_written_back() -> None:
    rollout, before = numbered(), numbered()
    rollout.truncated[1, 2] = True

    def callback(steps: list[Step]) -> list[Step]:
        changed = [(-o, a + 1, 2 * r, v + 0.5, p - 0.5) for o, a, r, v, p in steps]
        for step in steps:
            step[0][:] = 1e9  # its own copy: this must not reach the rollout
        return changed

    intercept(rollout, callback)
    assert torch.equal(rollout.observations, -before.observations)
    assert torch.equal(rollout.actions, before.actions + 1) and rollout.actions.dtype == torch.int64
    assert torch.equal(rollout.rewards, 2 * before.rewards)
    assert torch.equal(rollout.values, before.values + 0.5)
    assert torch.equal(rollout.log_probs, before.log_probs - 0.5)


def test_a_callback_must_keep_the_number_of_steps() -> None:
    with pytest.raises(ConfigurationError, match="rollout_interception_callback returned 3 steps for 4"):
        intercept(numbered(), lambda steps: steps[1:])


def test_done_is_either_end() -> None:
    done: Tensor = rollout_of(
        rewards=[[0.0] * 3], terminated=[[True, False, False]], truncated=[[False, True, False]]
    ).done
    assert done.tolist() == [[True, True, False]]
