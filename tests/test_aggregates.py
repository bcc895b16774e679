# SPDX-License-Identifier: MIT
"""Tests of the statistics over seeds and tasks, against scipy and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from ppo_mpi_base import aggregates
from ppo_mpi_base.aggregates import (
    bootstrap_interval,
    interquartile_mean,
    normalize,
    probability_of_improvement,
    references_of,
)
from ppo_mpi_base.errors import ConfigurationError

RANDOM = np.random.default_rng(0)
SCORES = st.lists(arrays(float, st.integers(1, 5), elements=st.integers(-3, 3).map(float)), min_size=2, max_size=2)


@pytest.mark.parametrize("shape", [(3, 3), (5, 1), (1, 7), (10, 4), (1, 1)])
def test_the_interquartile_mean_is_scipys_trimmed_mean(shape):
    scores = RANDOM.normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def test_tasks_may_have_different_numbers_of_seeds():
    assert interquartile_mean([[9.0, 1.0, 2.0], [3.0, 4.0, 5.0, 6.0, -99.0]]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert aggregates.mean([[1.0, 3.0], [10.0]]) == pytest.approx((2 + 10) / 2)


def test_the_probability_of_improvement_is_the_mann_whitney_statistic():
    a, b = RANDOM.integers(0, 6, (7, 4)).astype(float), RANDOM.integers(0, 6, (5, 4)).astype(float)  # with ties
    expected = stats.mannwhitneyu(a, b, axis=0).statistic / (7 * 5)
    assert probability_of_improvement(a, b) == pytest.approx(expected.mean())


def test_the_probability_of_improvement_by_hand():
    assert probability_of_improvement([[1.0, 2.0], [5.0]], [[1.0], [4.0, 5.0, 6.0]]) == pytest.approx((0.75 + 0.5) / 2)


@given(SCORES, SCORES)
def test_one_of_two_is_better(a, b):
    assert probability_of_improvement(a, b) + probability_of_improvement(b, a) == pytest.approx(1)


@given(SCORES, st.randoms())
def test_the_order_of_seeds_and_tasks_does_not_matter(scores, random):
    mixed = [np.array(random.sample(task.tolist(), len(task))) for task in scores][::-1]
    for statistic in (interquartile_mean, aggregates.mean):
        assert statistic(mixed) == pytest.approx(statistic(scores))


@settings(max_examples=20)
@given(st.floats(-1e6, 1e6), st.integers(2, 5), st.integers(1, 4))
def test_equal_scores_leave_nothing_uncertain(value, seeds, tasks):
    scores = np.full((seeds, tasks), value)
    for statistic in (interquartile_mean, aggregates.mean):
        assert bootstrap_interval(statistic, scores, draws=50) == pytest.approx((value, value))
    assert bootstrap_interval(probability_of_improvement, scores, scores, draws=50) == (0.5, 0.5)


def test_the_interval_of_a_mean_is_scipys():
    scores = RANDOM.normal(size=12)
    expected = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert bootstrap_interval(aggregates.mean, [scores], draws=20_000) == pytest.approx(tuple(expected), abs=0.02)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_interval_of_a_probability_is_scipys(level):
    a, b = RANDOM.normal(0.5, 1, 8), RANDOM.normal(size=10)

    def statistic(x, y, axis):
        return (x[..., :, None] > y[..., None, :]).mean((-2, -1))

    expected = stats.bootstrap(
        (a, b), statistic, n_resamples=20_000, confidence_level=level, method="percentile", vectorized=True, rng=1
    ).confidence_interval
    found = bootstrap_interval(probability_of_improvement, [a], [b], draws=20_000, level=level)
    assert found == pytest.approx(tuple(expected), abs=0.02)


def test_seeds_are_drawn_within_their_task():
    scores = [np.array([0.0, 1.0]), np.array([100.0, 101.0, 102.0])]
    random = np.random.default_rng(1)
    drawn = [np.mean([random.choice(task, len(task)).mean() for task in scores]) for _ in range(5000)]
    assert bootstrap_interval(aggregates.mean, scores) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.1)


def test_of_a_single_seed_no_interval_is_known():
    assert np.isnan(bootstrap_interval(aggregates.mean, [[1.0, 2.0], [3.0]])).all()
    assert np.isnan(bootstrap_interval(probability_of_improvement, [[1.0, 2.0]], [[3.0]])).all()


def test_normalized_scores_by_hand():
    first, second = normalize([[0.0, 50.0], [-300.0]], [(0, 100), (-400, 0)])
    np.testing.assert_allclose(first, [0, 0.5])
    np.testing.assert_allclose(second, [0.25])


@pytest.mark.parametrize(
    "starts, scores, expected",
    [([20, 10], [90, 100], (10, 100)), ([10, 12], [-30, 5], (10, 50)), ([7, 7], [7, 7], (7, 8))],
)
def test_reference_scores_are_of_the_runs(starts, scores, expected):
    assert references_of(starts, scores) == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: interquartile_mean([]), "scores="),
        (lambda: aggregates.mean([[1.0], []]), "scores="),
        (
            lambda: probability_of_improvement(np.array([1.0, 2.0]), np.array([0.0, 5.0])),
            r"must be an array \(seeds, t",
        ),
        (lambda: probability_of_improvement([[1.0]], [[1.0], [2.0]]), "a has 1 tasks and b has 2"),
        (lambda: normalize([[1.0]], [(2.0, 2.0)]), "high=2.0 must be above low=2.0"),
        (lambda: normalize([[1.0]], [(0.0, 1.0), (0.0, 1.0)]), "references: there are 2 for 1 tasks"),
        (lambda: interquartile_mean([[1.0, 2.0, float("nan")]]), "scores: one is NaN"),
        (lambda: probability_of_improvement([[1.0, float("nan")]], [[0.0, 0.0]]), "scores: one is NaN"),
        (lambda: bootstrap_interval(aggregates.mean, [[1.0, 2.0]], draws=10.5), "draws=10.5 must be a whole number"),
        (lambda: bootstrap_interval(aggregates.mean, [[1.0, 2.0]], draws=0), "draws=0 must be a whole number"),
        (lambda: bootstrap_interval(aggregates.mean, [[1.0, 2.0]], level=95), "level=95 must be a number from 0 to 1"),
    ],
)
def test_bad_scores_get_a_clear_line(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()
