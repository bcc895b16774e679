# SPDX-License-Identifier: MIT
"""Running moments against numpy's on the pooled data, and normalized rewards against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.normalize import EPSILON, RewardNormalizer, RunningMoments

RANKS = Communicator()


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shape=st.sampled_from([(), (1,), (3,), (2, 3)]),
    mean=st.sampled_from([0.0, -5.0, 1e6]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_moments_equal_numpys_on_the_pooled_data(
    counts: list[int], shape: tuple[int, ...], mean: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Uneven counts, and another mean and spread in each part.
    parts = [mean + rng.uniform(0.1, 3) * rng.standard_normal((n, *shape)) + rng.normal() for n in counts]
    moments = RunningMoments(shape)
    for part in parts:
        moments.update(part, RANKS)
    pooled = np.concatenate(parts)
    assert moments.count[0] == len(pooled)
    np.testing.assert_allclose(moments.mean, pooled.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(moments.std, np.sqrt(pooled.var(0) + EPSILON), rtol=1e-7)
    assert moments.mean.shape == moments.std.shape == shape and moments.std.dtype == np.float64


def test_moments_of_float32_are_summed_in_float64() -> None:
    samples = (1e4 + np.random.default_rng(0).standard_normal((20_000, 1))).astype(np.float32)
    moments = RunningMoments((1,))
    for part in np.split(samples, 10):
        moments.update(part, RANKS)
    np.testing.assert_allclose(moments.std, samples.astype(np.float64).std(0), rtol=1e-6)


def test_nothing_seen_scales_by_1_and_constants_divide_by_no_zero() -> None:
    moments = RunningMoments((2,))
    np.testing.assert_array_equal(moments.std, [1, 1])
    moments.update(np.full((5, 2), 3.0), RANKS)
    np.testing.assert_allclose(moments.std, np.sqrt(EPSILON))
    assert (moments.std > 0).all()


def test_state_restores_the_moments_and_goes_on_from_there() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((7, 2)), 5 + rng.standard_normal((4, 2))
    moments, resumed = RunningMoments((2,)), RunningMoments((2,))
    moments.update(first, RANKS)
    saved = {name: tensor.clone() for name, tensor in moments.state().items()}
    for name, array in resumed.state().items():
        array[...] = saved[name]
    resumed.update(second, RANKS)
    np.testing.assert_allclose(resumed.mean, np.concatenate([first, second]).mean(0))
    np.testing.assert_allclose(resumed.std, np.concatenate([first, second]).std(0), rtol=1e-6)


def brute_force(rewards: np.ndarray, done: np.ndarray, gamma: float, before: int) -> np.ndarray:
    """Return the rewards after `before` steps over the spread of all discounted returns so far, each summed anew."""
    returns = []
    for i in range(rewards.shape[1]):
        start = 0
        for t in range(len(rewards)):
            returns.append(sum(gamma ** (t - k) * rewards[k, i] for k in range(start, t + 1)))
            if done[t, i]:
                start = t + 1
    return np.clip(rewards[before:] / np.sqrt(np.var(returns) + EPSILON), -10, 10)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_are_scaled_by_the_spread_of_the_discounted_return(gamma: float) -> None:
    rng = np.random.default_rng(2)
    rewards, done = 3 + rng.standard_normal((30, 4)), rng.random((30, 4)) < 0.15
    normalizer = RewardNormalizer(4, gamma)
    for start, end in ((0, 12), (12, 13), (13, 30)):  # episodes go on over the ends of rollouts
        found = normalizer.normalize(rewards[start:end], done[start:end], RANKS)
        np.testing.assert_allclose(found, brute_force(rewards[:end], done[:end], gamma, start), rtol=1e-10)


def test_the_return_starts_anew_after_the_step_that_ended_an_episode() -> None:
    normalizer = RewardNormalizer(2, gamma=0.5)
    normalizer.normalize(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[False, False], [True, False]]), RANKS)
    np.testing.assert_array_equal(normalizer.returns, [0.0, 1.5])


def test_large_rewards_are_clipped_and_signs_are_kept() -> None:
    rewards = np.zeros((1000, 1))
    rewards[[300, 600]] = [[100.0], [-100.0]]
    found = RewardNormalizer(1, gamma=0.0).normalize(rewards, np.zeros((1000, 1), bool), RANKS)
    np.testing.assert_array_equal(found[[300, 600, 0]], [[10.0], [-10.0], [0.0]])
