# SPDX-License-Identifier: MIT
"""Statistics of scores over seeds and tasks, with bootstrap intervals: Agarwal et al. 2021, arxiv.org/abs/2108.13264.

`Scores` are an array (seeds, tasks), or a list with an array (seeds,) for each task, which may differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppo_mpi_base.checks import Count, Fraction, checked
from ppo_mpi_base.errors import ConfigurationError

Floats = NDArray[np.float64]
Scores = Floats | Sequence[ArrayLike]

DRAWS = 2000
LEVEL = 0.95


def by_task(scores: Scores) -> list[Floats]:
    """Return an array (..., seeds) float64 for each task.

    Raises:
        ConfigurationError: there is no task, a task without a seed, or a score that is NaN.
    """
    columns = scores.T if isinstance(scores, np.ndarray) else scores
    tasks = [np.asarray(task, dtype=np.float64) for task in columns]
    if not tasks or any(task.ndim == 0 or task.shape[-1] == 0 for task in tasks):
        raise ConfigurationError(f"scores={scores!r} must be an array (seeds, tasks) or a list of arrays (seeds,)")
    if any(np.isnan(task).any() for task in tasks):
        raise ConfigurationError("scores: one is NaN, which is neither high nor low: leave it out, or give it a number")
    return tasks


def mean(scores: Scores) -> Floats:
    """Return the mean over tasks of each task's mean over seeds."""
    return np.mean([task.mean(-1) for task in by_task(scores)], axis=0)


def difference(a: Scores, b: Scores) -> Floats:
    """Return `mean(a)` minus `mean(b)`."""
    return mean(a) - mean(b)


def sample_deviation(scores: ArrayLike) -> float:
    """Return the sample standard deviation of scores (seeds,), with Bessel's correction; NaN for a single score."""
    values = np.asarray(scores, dtype=np.float64)
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def interquartile_mean(scores: Scores) -> Floats:
    """Return the mean of the middle half of all runs, pooled over tasks (Agarwal et al. 2021, section 4.3).

    A quarter of the runs, rounded down, is dropped at each end. Tasks need a common scale: see `normalize`.
    """
    runs = np.sort(np.concatenate(by_task(scores), axis=-1), axis=-1)
    dropped = runs.shape[-1] // 4
    return runs[..., dropped : runs.shape[-1] - dropped].mean(-1)


def probability_of_improvement(a: Scores, b: Scores) -> Floats:
    """Return P(X > Y) + P(X = Y) / 2 for a run X of `a` and a run Y of `b`, averaged over tasks (section 4.3).

    For each task, it is the Mann-Whitney statistic U / (seeds of a x seeds of b).

    Raises:
        ConfigurationError: the two have different numbers of tasks.
    """
    tasks_a, tasks_b = by_task(a), by_task(b)
    if len(tasks_a) != len(tasks_b):
        raise ConfigurationError(f"a has {len(tasks_a)} tasks and b has {len(tasks_b)}: give scores of the same tasks")
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(tasks_a, tasks_b, strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], axis=0)


def bootstrap_interval(
    statistic: Callable[..., Floats], *samples: Scores, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return the stratified percentile bootstrap interval of a statistic of one or more scores.

    Seeds are resampled with replacement, within each task and each of `samples`. With few seeds the interval is too
    narrow: with 3, it covers the true value less often than `level`.

    Args:
        statistic: takes one argument for each of `samples`, a list of arrays (draws, seeds), and returns (draws,).
        samples: scores, with any number of seeds per task.
        draws: number of resamplings.
        level: fraction of the resampled statistics inside the interval, from 0 to 1.
        seed: seed of the resampling; the same seed gives the same interval.

    Returns:
        Both ends; NaN if a task has a single seed, which says nothing about the spread.

    Raises:
        ConfigurationError: draws or level is out of range.
    """
    draws = checked("draws", draws, Count)
    checked("level", level, Fraction)
    strata = [by_task(scores) for scores in samples]
    if min(len(task) for tasks in strata for task in tasks) < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    drawn = [[task[random.integers(len(task), size=(draws, len(task)))] for task in tasks] for tasks in strata]
    low, high = np.quantile(statistic(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def normalize(scores: Scores, references: Sequence[tuple[float, float]]) -> list[Floats]:
    """Return (score - low) / (high - low) with each task's reference scores (low, high).

    Raises:
        ConfigurationError: there are not as many references as tasks, or a high one is not above the low one.
    """
    tasks = by_task(scores)
    if len(tasks) != len(references):
        raise ConfigurationError(f"references: there are {len(references)} for {len(tasks)} tasks; give one for each")
    for low, high in references:
        if not high > low:
            raise ConfigurationError(f"references: high={high!r} must be above low={low!r}")
    return [(task - low) / (high - low) for task, (low, high) in zip(tasks, references, strict=True)]


def references_of(starts: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return a task's reference scores from its runs: the lowest return that one started with, and the highest score.

    If no score is above that start, the high reference is as far above it as the lowest score is below it.
    """
    low, worst, best = float(np.min(starts)), float(np.min(scores)), float(np.max(scores))
    return low, best if best > low else low + ((low - worst) or 1.0)
