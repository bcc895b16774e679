# SPDX-License-Identifier: MIT
"""Compare two groups of runs: means, interquartile means and probability of improvement, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppo_mpi_base import aggregates
from ppo_mpi_base.aggregates import Scores
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.runs import Run

SHORT = 0.9
"""Runs shorter than this fraction of the longest one cause a warning."""

References = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% bootstrap interval, NaN if there is a single seed."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, statistic: Any, *samples: Scores) -> Estimate:
        """Return a statistic and its interval, with arguments as for `aggregates.bootstrap_interval`."""
        return cls(float(statistic(*samples)), *aggregates.bootstrap_interval(statistic, *samples))

    def __str__(self) -> str:
        return _number(self.value) + ("" if math.isnan(self.low) else f" [{_number(self.low)}, {_number(self.high)}]")


@dataclass(frozen=True)
class TaskComparison:
    """Results of two groups on one task."""

    task: str
    scores_a: tuple[float, ...]
    scores_b: tuple[float, ...]
    mean_a: Estimate
    mean_b: Estimate
    difference: Estimate
    """Mean of A minus mean of B."""
    probability: Estimate
    """Probability that a run of A scores higher than one of B, with ties counting half."""
    reference: tuple[float, float]
    """The scores that normalize to 0 and to 1 in the interquartile means."""


@dataclass(frozen=True)
class Comparison:
    """Results of two groups of runs on the tasks that both have. `print` shows them as a table."""

    labels: tuple[str, str]
    tasks: tuple[TaskComparison, ...]
    iqm_a: Estimate
    """Interquartile mean of normalized scores over all runs."""
    iqm_b: Estimate
    probability: Estimate
    """Probability of improvement, averaged over tasks: that a run of A scores higher than one of B."""

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in a form for JSON, with None for unknown ones."""
        return _without_nan(dataclasses.asdict(self))

    def __str__(self) -> str:
        label_a, label_b = map(escape, self.labels)  # brackets in them are not markup
        table = Table(title=f"{label_a} (A) and {label_b} (B), mean ± standard deviation (seeds)", title_justify="left")
        table.add_column("task", overflow="fold")
        for name in ("A", "B", "A - B", "P(A > B)"):
            table.add_column(name, justify="right", no_wrap=True)
        for task in self.tasks:
            spreads = (spread(task.scores_a), spread(task.scores_b))
            numbers = (*spreads, str(task.difference), str(task.probability))
            table.add_row(escape(task.task) or "all runs", *map(escape, numbers))
        table.add_section()
        table.add_row("IQM, normalized", str(self.iqm_a), str(self.iqm_b), "", str(self.probability))
        text = io.StringIO()
        console = Console(file=text, width=WIDTH)
        console.print(table)
        text.write("[...]: 95% bootstrap intervals over seeds, too narrow where there are few. " + NORMALIZED + "\n")
        return text.getvalue()


WIDTH = 200
"""Characters per line, enough for numbers of ten digits; the table takes no more than it needs."""
NORMALIZED = "Normalized: 0 is the lowest initial return on the task, 1 its highest score, unless references are given."


def compare(
    a: Mapping[str, Sequence[Run]],
    b: Mapping[str, Sequence[Run]],
    labels: tuple[str, str],
    references: References | None = None,
) -> Comparison:
    """Compare the final returns of two groups of runs on the tasks that both have; warn about other tasks.

    Args:
        a: runs by task, as from `runs.read_group`.
        b: runs by task.
        labels: names of the groups.
        references: by task, the scores that normalize to 0 and to 1 in the interquartile mean. None: the lowest return
            that a run of either group started with, and the highest score of a run.

    Raises:
        ConfigurationError: the groups have no task in common, or a task has no reference scores.
    """
    tasks = [task for task in a if task in b]
    if not tasks:
        raise ConfigurationError(
            f"b: its runs are of {_listed(b)}, those of a of {_listed(a)}: they share no task (a run's task is "
            "named in its run.toml, or by a directory above it, such as CartPole-v1)"
        )
    if alone := sorted(set(a) ^ set(b)):
        warnings.warn(f"left out, as only one group has runs of it: {_listed(alone)}", stacklevel=2)
    for task in tasks:
        ends = [run.steps[-1] for run in (*a[task], *b[task])]
        if min(ends) < SHORT * max(ends):
            length = f"{min(ends):,.0f} to {max(ends):,.0f} steps"
            of = f"{task}: the" if task else "the"
            warnings.warn(f"{of} runs are {length} long, and each is scored by its last return", stacklevel=2)
    scale = {task: reference_of(task, [*a[task], *b[task]], references) for task in tasks}
    rows = tuple(_compare_task(task, _scores(a[task]), _scores(b[task]), scale[task]) for task in tasks)
    normalized = [
        aggregates.normalize([_scores(group[task]) for task in tasks], list(scale.values())) for group in (a, b)
    ]
    iqm_a, iqm_b = (Estimate.of(aggregates.interquartile_mean, scores) for scores in normalized)
    return Comparison(labels, rows, iqm_a, iqm_b, Estimate.of(aggregates.probability_of_improvement, *normalized))


def reference_of(task: str, runs: Sequence[Run], references: References | None) -> tuple[float, float]:
    """Return the scores of a task that normalize to 0 and to 1: the given ones, or else those of the runs."""
    if references is None:
        return aggregates.references_of([run.values[0] for run in runs], _scores(runs))
    given = references.get(task)
    try:
        low, high = map(float, given)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"references: task {task!r} must have its two scores, (low, high), not {given!r}"
        ) from error
    return low, high


def _compare_task(task: str, a: np.ndarray, b: np.ndarray, reference: tuple[float, float]) -> TaskComparison:
    return TaskComparison(
        task,
        tuple(a.tolist()),
        tuple(b.tolist()),
        Estimate.of(aggregates.mean, [a]),
        Estimate.of(aggregates.mean, [b]),
        Estimate.of(aggregates.difference, [a], [b]),
        Estimate.of(aggregates.probability_of_improvement, [a], [b]),
        reference,
    )


def _scores(runs: Sequence[Run]) -> np.ndarray:
    return np.array([run.score for run in runs])


def spread(scores: Sequence[float]) -> str:
    """Return the mean, standard deviation (if several) and number of scores, as text for a table."""
    deviation = aggregates.sample_deviation(scores)
    deviates = "" if math.isnan(deviation) else f" ± {_number(deviation)}"
    return f"{_number(float(np.mean(scores)))}{deviates} ({len(scores)})"


def _listed(tasks: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(task or "a task without a name" for task in tasks)


def _number(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
