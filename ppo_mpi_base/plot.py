# SPDX-License-Identifier: MIT
"""Pictures of runs, drawn from their progress.csv: a learning curve, curves over seeds and tasks, a comparison."""

from __future__ import annotations

import itertools
import json
import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ppo_mpi_base import aggregates
from ppo_mpi_base.comparison import Comparison, Estimate, References, TaskComparison, compare, reference_of
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.figures import (
    BLUE,
    COLORS,
    DARK,
    draw_legend,
    draw_note,
    label_steps,
    label_time,
    look,
    open_figure,
    plain_text,
    save_figure,
    save_png_and_svg,
    shrink_text,
    style_axes,
)
from ppo_mpi_base.files import without_ending, write_output
from ppo_mpi_base.runs import RETURN, Group, Run, on_common_grid, read_columns, read_groups

FEW = 30  # up to this many points get dots, since the line between two of them was not measured
POINTS = 101  # of a curve over seeds
COLUMNS = 4  # of panels
WRITTEN = (".png", ".svg")
COMPARED = (".json", *WRITTEN)
"""Endings of the files that `compare_runs` writes."""
RETURNS = {RETURN: "Episode return", "evaluation_return": "Evaluation return"}
"""Axis labels of columns of returns; any other column is labelled with its name."""
OF_RETURNS = "Means of the last 100 training episodes. "
LINES = "Lines: means over seeds, 95% bootstrap intervals (too narrow for few seeds), to the end of the shortest run."


def learning_curve(csv_path: str | Path, png_path: str | Path) -> Path:
    """Draw the episode return over agent steps, unsmoothed: each row of the file is a point of the curve.

    Rows without a return (NaN: no episode has ended yet) are left blank. If no row has one, the figure says so.

    Args:
        csv_path: a progress.csv with the columns total_steps and episode_return; a run may still be writing it.
        png_path: the file to write, whole or not at all. Its ending sets the format; use .pdf for papers.

    Returns:
        The path of the figure.

    Raises:
        ConfigurationError: csv_path cannot be read or lacks a column, or png_path cannot be written.
    """
    steps, returns = read_columns("csv_path", Path(csv_path), ("total_steps", "episode_return"))
    path = Path(png_path)
    with open_figure((5.0, 3.1)) as figure:
        _draw(figure.add_subplot(), steps, returns)
        save_figure(figure, path, "png_path", dpi=200)
    return path


def plot_runs(
    groups: Sequence[Group],
    output: Path | str = "curves",
    *,
    labels: Sequence[str] | None = None,
    axis: Literal["steps", "time"] = "steps",
    column: str = RETURN,
    references: References | None = None,
) -> list[Path]:
    """Draw learning curves: a panel for each task, a line for each group, the mean over its seeds.

    The band is the 95% bootstrap interval over seeds; a single seed has none. Lines and bands cover the range that all
    seeds of the group have. If all groups share more than one task, a last panel shows the interquartile mean over
    tasks and seeds of normalized returns (Agarwal et al. 2021), over the range that all those tasks have. There is
    none for columns other than returns, and none if, in a group, the shortest of these tasks is less than half as long
    as the longest.

    Args:
        groups: for each line, a path as for `runs.find_runs`, or several.
        output: path of the pictures; .png and .svg are appended to it.
        labels: a name for each group. None: the end of its path, or the directory of several.
        axis: agent steps, or the wall-clock time since each run began.
        column: the column of progress.csv to draw, such as "kl"; rows without a number in it are skipped.
        references: by task, the returns that normalize to 0 and to 1. None: the lowest return that any of these runs
            started with, and the highest that one ended with.

    Returns:
        The paths of both pictures.

    Raises:
        ConfigurationError: there is no group, one has no run or a run without the column, there are too few or too many
            labels, a task lacks reference scores, or output cannot be written.
    """
    if axis not in ("steps", "time"):
        raise ConfigurationError(f"axis={axis!r} is not one of 'steps', 'time'")
    names = _labels(groups, labels)
    read = read_groups(groups, column)
    tasks = list(dict.fromkeys(task for runs in read for task in runs))
    shared = [task for task in tasks if all(task in runs for runs in read)]
    over_tasks = len(shared) > 1 and column in RETURNS and _alike_long(read, shared, axis)
    panels = len(tasks) + over_tasks
    rows, columns = math.ceil(panels / COLUMNS), min(panels, COLUMNS)
    with open_figure((4.5, 3.2) if panels == 1 else (2.5 * columns, 0.6 + 2.2 * rows)) as figure:
        places = iter(figure.subplots(rows, columns, squeeze=False).flat)
        for task in tasks:
            axes = next(places)
            drawn = [(n, _mean_curve(runs[task], axis)) for n, runs in enumerate(read) if task in runs]
            _draw_curves(axes, drawn, axis, task)
            axes.set_ylabel(RETURNS.get(column, column) if tasks.index(task) % COLUMNS == 0 else "", color=DARK)
        if over_tasks:
            _draw_all_tasks(next(places), read, shared, axis, references)
        for axes in places:
            axes.set_axis_off()
        draw_legend(figure, names, [[len(seeds) for seeds in runs.values()] for runs in read])
        draw_note(figure, OF_RETURNS + LINES if column == RETURN else LINES, over_tasks, references)
        return save_png_and_svg(figure, without_ending(output, WRITTEN))


def _alike_long(read: Sequence[dict[str, list[Run]]], tasks: Sequence[str], axis: Literal["steps", "time"]) -> bool:
    """Return whether, in each group, the shortest of these tasks is at least half as long as the longest."""
    ends = [[min(_positions(run, axis)[-1] for run in runs[task]) for task in tasks] for runs in read]
    return not any(2 * min(group) < max(group) for group in ends)


def _draw_all_tasks(
    axes: Axes,
    read: Sequence[dict[str, list[Run]]],
    tasks: Sequence[str],
    axis: Literal["steps", "time"],
    references: References | None,
) -> None:
    """Draw each group's interquartile mean over the tasks that all groups have."""
    every = {task: [run for runs in read for run in runs[task]] for task in tasks}
    scale = [reference_of(task, every[task], references) for task in tasks]
    drawn = [(n, _iqm_curve([runs[task] for task in tasks], scale, axis)) for n, runs in enumerate(read)]
    _draw_curves(axes, drawn, axis, f"IQM of {len(tasks)} tasks")
    axes.set_ylabel("Normalized return", color=DARK)


def compare_runs(
    a: Group,
    b: Group,
    output: Path | str = "comparison",
    labels: Sequence[str] | None = None,
    references: References | None = None,
) -> Comparison:
    """Compare the final returns of two groups of runs; write the picture as .png and .svg, and the numbers as .json.

    Args:
        a: a path as for `runs.find_runs`, or several.
        b: the group that `a` should be better than.
        output: path of the files, without the ending.
        labels: names of the two groups. None: the ends of their paths, or the directories of several.
        references: by task, the returns that normalize to 0 and to 1. None: the lowest return that any of these runs
            started with, and the highest that one ended with.

    Returns:
        All numbers; `print` shows them as a table.

    Raises:
        ConfigurationError: a group has no run, the groups share a run or have no task in common, there are not two
            labels, a task lacks reference scores, or output cannot be written.
    """
    name_a, name_b = _labels([a, b], labels)
    runs_a, runs_b = read_groups([a, b])
    paths_a, paths_b = ({run.path.resolve() for runs in group.values() for run in runs} for group in (runs_a, runs_b))
    if both := paths_a & paths_b:
        raise ConfigurationError(
            f"runs: {min(both)} is in both groups ({len(both)} runs are): put each in one group only"
        )
    comparison = compare(runs_a, runs_b, (name_a, name_b), references)
    path = without_ending(output, COMPARED)
    panels = len(comparison.tasks) + 1
    columns = min(panels, COLUMNS)
    rows = math.ceil(panels / columns)
    height = 0.9 + max(1.9 * rows, 0.3 * panels)
    with open_figure((1.7 * columns + 3.2, height)) as figure:
        grid = figure.add_gridspec(rows, columns + 1, width_ratios=[1.0] * columns + [1.7])
        for number in range(panels):
            axes = figure.add_subplot(grid[divmod(number, columns)])
            _draw_scores(axes, comparison.tasks[number] if number < panels - 1 else None, comparison)
            if number % columns == 0 and number < panels - 1:
                axes.set_ylabel("Episode return", color=DARK)
        _draw_probabilities(figure.add_subplot(grid[:, -1]), comparison)
        seeds = [[len(task.scores_a) for task in comparison.tasks], [len(task.scores_b) for task in comparison.tasks]]
        draw_legend(figure, comparison.labels, seeds, joined=False)
        note = (
            "Large: means, 95% bootstrap intervals (too narrow for few seeds). Small: single seeds, the mean of "
            "the last 100 training episodes of each."
        )
        draw_note(figure, note, True, references)
        save_png_and_svg(figure, path)
    numbers = json.dumps(comparison.to_dict(), indent=1) + "\n"
    write_output("output", path.with_name(path.name + ".json"), numbers.encode())
    return comparison


def _labels(groups: Sequence[Group], labels: Sequence[str] | None) -> list[str]:
    """Return a name for each group: the given ones, or ends of paths, or whole paths if those are equal."""
    if isinstance(groups, str | os.PathLike) or not groups:
        raise ConfigurationError(f"groups={groups!r} must be a list of paths, such as ['runs/a', 'runs/b']")
    if labels is not None:
        if isinstance(labels, str) or len(labels) != len(groups) or not all(isinstance(x, str) for x in labels):
            raise ConfigurationError(f"labels={labels!r} must be {len(groups)} labels, one for each group of runs")
        return list(labels)
    paths = [[Path(group)] if isinstance(group, str | os.PathLike) else list(map(Path, group)) for group in groups]
    candidates = []
    for named in ([_or_parent(group) for group in paths], paths):
        candidates.append([", ".join(dict.fromkeys(path.resolve().name for path in group)) for group in named])
        candidates.append([", ".join(map(str, group)) for group in named])
    return next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])


def _or_parent(group: list[Path]) -> list[Path]:
    """Return the directory that several paths have in common, as the seeds of a setting do, or else the paths."""
    parents = list(dict.fromkeys(path.parent for path in group))
    return parents if len(parents) == 1 < len(group) else group


def _draw(axes: Axes, steps: np.ndarray, returns: np.ndarray) -> None:
    known = np.isfinite(returns)
    padded = np.pad(known, 1)
    beside_known = padded[:-2] | padded[2:]
    dots = known & (~beside_known | (known.sum() <= FEW))  # a point between gaps has no line, and would be invisible
    (curve,) = axes.plot(steps, returns, color=BLUE, linewidth=1.4, marker="o", markersize=3.5, clip_on=False)
    curve.set_markevery(np.flatnonzero(dots).tolist())
    axes.set_ylabel("Episode return (mean of last 100)", color=DARK)
    label_steps(axes, steps.max(initial=1.0), 6)
    style_axes(axes)
    if not known.any():
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no episode has ended yet", color=DARK, ha="center", va="center", transform=axes.transAxes)


Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions (points,), the value at each, and the interval (2, points), NaN where there is none."""


def _positions(run: Run, axis: str) -> np.ndarray:
    return run.steps if axis == "steps" else run.seconds


def _on_grid(runs: Sequence[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    for run in runs:
        if axis == "time" and np.isnan(run.seconds).any():
            raise ConfigurationError(f"axis='time' needs the column seconds, which {run.path} lacks: choose 'steps'")
    grid, values = on_common_grid([_positions(run, axis) for run in runs], [run.values for run in runs], POINTS)
    if not len(grid):
        paths = ", ".join(str(run.path) for run in runs)
        warnings.warn(f"no curve is drawn: no range of {axis} is covered by all of {paths}", stacklevel=2)
    return grid, values


def _mean_curve(runs: Sequence[Run], axis: str) -> Curve:
    grid, values = _on_grid(runs, axis)
    intervals = [aggregates.bootstrap_interval(aggregates.mean, [seeds]) for seeds in values.T]
    return grid, values.mean(0), np.reshape(intervals, (-1, 2)).T


def _iqm_curve(tasks: Sequence[Sequence[Run]], scale: Sequence[tuple[float, float]], axis: str) -> Curve:
    grid, returns = _on_grid([run for runs in tasks for run in runs], axis)
    ends = list(itertools.accumulate(len(runs) for runs in tasks))[:-1]
    scores = [aggregates.normalize(np.split(runs, ends), scale) for runs in returns.T]
    intervals = [aggregates.bootstrap_interval(aggregates.interquartile_mean, x) for x in scores]
    return grid, np.array([aggregates.interquartile_mean(x) for x in scores]), np.reshape(intervals, (-1, 2)).T


def _draw_curves(axes: Axes, curves: Sequence[tuple[int, Curve]], axis: str, title: str) -> None:
    largest = 0.0
    for number, (grid, values, (low, high)) in curves:
        spacing = max(1, len(grid) // 6)  # the groups' markers are offset from each other
        every = (spacing * (2 * number + 1) // (2 * len(COLORS)) % spacing, spacing)
        axes.plot(grid, values, markevery=every, clip_on=False, zorder=3, **look(number))
        color = COLORS[number % len(COLORS)]
        axes.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)
        for end in (low, high):  # thin edges tell overlapping bands apart in greyscale
            axes.plot(grid, end, color=color, alpha=0.7, linewidth=0.5, linestyle=look(number)["linestyle"])
        largest = max([largest, *grid])
    (label_steps if axis == "steps" else label_time)(axes, largest or 1.0, 4)
    axes.set_title(title, fontsize=9, color=DARK)
    style_axes(axes)
    shrink_text(axes)


def _draw_scores(axes: Axes, task: TaskComparison | None, comparison: Comparison) -> None:
    """Draw both groups' seeds and means on a task; for None, the interquartile means."""
    estimates = (comparison.iqm_a, comparison.iqm_b) if task is None else (task.mean_a, task.mean_b)
    for number, estimate in enumerate(estimates):
        if task is not None:
            scores = (task.scores_a, task.scores_b)[number]
            places = number + 0.22 + np.linspace(-0.08, 0.08, len(scores)) * (len(scores) > 1)
            dot = {**look(number), "markersize": 3, "markeredgewidth": 0, "linestyle": "none"}
            axes.plot(places, scores, alpha=0.75, **dot)
        _draw_estimate(axes, estimate, number, number)
    axes.set_xlim(-0.5, 1.6)
    axes.set_title("IQM, normalized" if task is None else task.task, fontsize=9, color=DARK)
    style_axes(axes)
    shrink_text(axes)
    axes.xaxis.set_major_locator(NullLocator())


def _draw_estimate(axes: Axes, estimate: Estimate, number: int, place: float, sideways: bool = False) -> None:
    ends, places = [estimate.low, estimate.high], [place, place]
    color = COLORS[number]
    axes.plot(*((ends, places) if sideways else (places, ends)), color=color, linewidth=1.8, solid_capstyle="butt")
    point = (estimate.value, place) if sideways else (place, estimate.value)
    axes.plot(*point, **{**look(number), "markersize": 7, "linestyle": "none"}, zorder=4)


def _draw_probabilities(axes: Axes, comparison: Comparison) -> None:
    rows = [(task.task or "all runs", task.probability) for task in comparison.tasks]
    rows += [(f"mean of {len(rows)} tasks", comparison.probability)] if len(rows) > 1 else []
    axes.axvline(0.5, color=DARK, linewidth=0.8, linestyle=(0, (4, 3)))
    for place, (_, estimate) in enumerate(rows):
        _draw_estimate(axes, estimate, 2, place, sideways=True)
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    label_a, label_b = (plain_text(label) for label in comparison.labels)
    axes.set_xlabel(textwrap.fill(f"P({label_a} > {label_b})", 32), color=DARK)
    axes.set_title("Probability of improvement", fontsize=9, color=DARK)
    style_axes(axes)
    shrink_text(axes)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
