# SPDX-License-Identifier: MIT
"""The memory of a rollout: shapes and dtypes, noise by global index, final observations, what is not finite."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from ppo_mpi_base.storage import Storage

BOX = Box(-np.inf, np.inf, (2,), np.float32)


def storage(
    observations: gymnasium.Space = BOX, actions: gymnasium.Space = BOX, length: int = 5, n: int = 3
) -> Storage:
    return Storage(length, n, observations, actions)


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (BOX, (6, 3, 2), np.float32),
        (Box(0, 255, (1, 4, 4), np.uint8), (6, 3, 1, 4, 4), np.uint8),
        (Box(-1, 1, (), np.float64), (6, 3), np.float64),
        (Discrete(4), (6, 3), np.int64),
    ],
    ids=str,
)
def test_observations_are_kept_in_the_spaces_own_dtype(
    space: gymnasium.Space, shape: tuple[int, ...], dtype: type
) -> None:
    kept = storage(space)
    assert kept.observations.shape == shape and kept.observations.dtype == dtype
    assert kept.rewards.shape == kept.terminated.shape == kept.truncated.shape == (5, 3)
    assert kept.rewards.dtype == np.float64


def test_actions_are_kept_unclipped_in_the_default_dtype_or_counted() -> None:
    assert storage(actions=Box(-1, 1, (2, 3), np.float64)).actions.shape == (5, 3, 2, 3)
    assert storage(actions=Box(-1, 1, (2,), np.float64)).actions.dtype == torch.get_default_dtype()
    counted = storage(actions=Discrete(4, start=7)).actions
    assert counted.shape == (5, 3) and counted.dtype == torch.int64


def test_the_next_rollout_starts_where_this_one_was_cut() -> None:
    kept = storage()
    kept.observations[:] = np.arange(36, dtype=np.float32).reshape(6, 3, 2)
    kept.start_next()
    np.testing.assert_array_equal(kept.observations[0], [[30, 31], [32, 33], [34, 35]])


@pytest.mark.parametrize("space", [BOX, Discrete(4)], ids=str)
def test_noise_belongs_to_the_global_environment(space: gymnasium.Space) -> None:
    alone = Storage(5, 6, BOX, space).noise(7, 0, iteration=2)
    ranks = [Storage(5, 2, BOX, space).noise(7, first, iteration=2) for first in (0, 2, 4)]
    assert torch.equal(alone, torch.cat(ranks, dim=1))
    assert alone.shape[:2] == (5, 6) and alone.dtype == torch.get_default_dtype()
    columns = alone.flatten(2)[..., 0].T
    assert len(torch.unique(columns, dim=0)) == 6, "environments share their noise"
    for other in (Storage(5, 6, BOX, space).noise(8, 0, 2), Storage(5, 6, BOX, space).noise(7, 0, 3)):
        assert not torch.equal(alone, other)


def test_only_truncated_episodes_keep_their_last_observation() -> None:
    kept = storage()
    kept.truncated[1] = [True, False, False]
    kept.terminated[1] = [False, True, False]
    kept.keep_final(1, {0: np.array([1.0, 2.0]), 1: np.array([3.0, 4.0])})
    assert list(kept.final_observations) == [(1, 0)]
    np.testing.assert_array_equal(kept.final_observations[1, 0], [1.0, 2.0])
    np.testing.assert_array_equal(kept.done[1], [True, True, False])
    kept.begin()
    assert not kept.final_observations


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_number_that_is_not_finite_is_found(bad: float) -> None:
    kept = storage()
    assert kept.first_bad() is None
    kept.final_observations[3, 1] = np.array([0.0, bad])
    assert kept.first_bad() == ("final observation", 3, 1)
    kept.rewards[4, 2] = bad
    assert kept.first_bad() == ("reward", 4, 2)
    kept.observations[[2, 4], [1, 0]] = [[0.0, bad], [bad, 0.0]]
    assert kept.first_bad() == ("observation", 2, 1)


def test_both_infinities_do_not_hide_each_other_and_large_numbers_are_no_error() -> None:
    kept = storage()
    kept.rewards[0], kept.rewards[1] = np.inf, -np.inf
    assert kept.first_bad() == ("reward", 0, 0)
    kept.rewards[:2] = 0
    kept.observations[:] = 3e38  # their sum overflows float32
    assert kept.first_bad() is None


def test_counted_observations_are_always_finite() -> None:
    kept = storage(Box(0, 255, (4,), np.uint8))
    kept.observations[:] = 255
    kept.final_observations[0, 0] = kept.observations[0, 0]
    assert kept.first_bad() is None
