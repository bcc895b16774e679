# SPDX-License-Identifier: MIT
"""Finished or unfinished runs, found on disk and read from their progress.csv."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ppo_mpi_base.errors import ConfigurationError, did_you_mean
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.provenance import different_keywords

Floats = NDArray[np.float64]
RETURN = "episode_return"
"""The column of the mean return of the last 100 training episodes."""
Group = str | Path | Sequence[str | Path]
"""One or more paths: to a run's directory, its progress.csv, or a directory with runs beneath it."""

ENVIRONMENT_ID = re.compile(r"[A-Z].*-v\d+$")
"""By convention, ids begin with a capital; idea-v2 may be the name of anything."""


@dataclass(frozen=True)
class Run:
    """One column of a run's progress.csv, without the rows that have no number in it."""

    path: Path
    task: str
    """As in the run.toml of `ppo-mpi train`, or else the nearest parent directory that is named like an environment,
    such as Hopper-v5; "" if there is none."""
    steps: Floats
    """Agent steps, (rows,)."""
    seconds: Floats
    """Wall-clock time since the run began, (rows,); NaN where the file does not have it."""
    values: Floats
    """Values of the column, (rows,): by default, mean returns of the last 100 training episodes."""

    @property
    def score(self) -> float:
        """The last value."""
        return float(self.values[-1])


def find_runs(group: Group) -> list[Path]:
    """Return the progress files of a group, each once, in order.

    A .csv file is a run, and so is a directory with progress.csv or logs/progress.csv. In any other directory, all
    progress.csv beneath it are runs or, if there are none, all seed*.csv. progress.1.csv, ... belong to former runs.

    Raises:
        ConfigurationError: there is no path, or one of them has no run.
    """
    paths = [group] if isinstance(group, str | os.PathLike) else list(group)
    if not paths:
        raise ConfigurationError("runs: a group is empty; name the directory of a run, or one with runs beneath it")
    found = [run for path in paths for run in _beneath(Path(path))]
    return list({run.resolve(): run for run in found}.values())


def _beneath(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".csv":
        return [path]
    for own in (path / "progress.csv", path / "logs" / "progress.csv"):
        if own.is_file():
            return [own]
    found = _files(path, "progress.csv") or _files(path, "seed*.csv")
    if not found:
        why = "no progress.csv is beneath it" if path.is_dir() else "no such directory or .csv file"
        raise ConfigurationError(f"runs={str(path)!r}: {why}; name the directory of a run, or one with runs beneath it")
    return found


def _files(path: Path, pattern: str) -> list[Path]:
    """Return all such files beneath a directory, in order, also through symbolic links; each directory counts once."""
    found, seen = [], set()
    for directory, inner, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            inner.clear()
            continue
        seen.add(real)
        found += [Path(directory, name) for name in fnmatch.filter(names, pattern)]
    return sorted(found)


def read_groups(groups: Sequence[Group], column: str = RETURN) -> list[dict[str, list[Run]]]:
    """Return the runs of each group by task, see `read_group`.

    If all groups together name only one task, runs without a task's name count as runs of it, such as those of a
    user's own script next to those of `ppo-mpi train`. If no task is named, warn that all count as one.
    """
    read = [read_group(group, column) for group in groups]
    named = {task for runs in read for task in runs if task}
    if len(named) != 1:
        if sum(len(runs.get("", ())) for runs in read) > 1:
            warnings.warn(
                "the runs do not name their task and are taken to be of the same one: name a directory above each "
                "after its task, such as CartPole-v1",
                stacklevel=2,
            )
        return read
    (task,) = named
    return [{task: [run for of_task in runs.values() for run in of_task]} for runs in read]


def read_group(group: Group, column: str = RETURN) -> dict[str, list[Run]]:
    """Return the runs of a group by task, tasks in alphabetical order.

    Warn about runs without a number in the column (no episode has ended), and about those that differ in more than
    their seeds.

    Raises:
        ConfigurationError: the group has no run, none with a number, or a file that is not a progress.csv.
    """
    paths = find_runs(group)
    runs = [run for path in paths if (run := read_run(path, column)) is not None]
    if not runs:
        raise ConfigurationError(f"runs={str(paths[0])!r}: {_empty(column)} in any of {len(paths)} runs")
    by_task = {task: [run for run in runs if run.task == task] for task in sorted({run.task for run in runs})}
    for task, found in by_task.items():
        if different := different_keywords([run.path for run in found]):
            warnings.warn(
                f"{len(found)} runs {f'of {task} ' if task else ''}count as seeds of one setting, but differ in "
                f"{', '.join(different)}: give each setting's runs as a path of their own",
                stacklevel=2,
            )
    return by_task


def read_run(path: Path, column: str = RETURN) -> Run | None:
    """Return a run, or None with a warning if its column has no number: no episode has ended yet.

    Raises:
        ConfigurationError: the file is not a progress.csv, or has no such column.
    """
    if column != RETURN and (there := _columns(path)) and column not in there:
        raise ConfigurationError(f"column={column!r}: {path} has {', '.join(there)}{did_you_mean(column, there)}")
    table = read_columns("runs", path, ("total_steps", column), optional=("seconds",))
    steps, values, seconds = table[:, np.isfinite(table[1])]
    if not len(values):
        warnings.warn(f"{path} is left out: {_empty(column)}", stacklevel=2)
        return None
    return Run(path, _task(path.resolve()), steps, seconds, values)


def _empty(column: str) -> str:
    return "no episode has ended yet" if column == RETURN else f"{column} has no number yet"


def _columns(path: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # `read_columns` reports what is wrong
        return read_progress(path)[0]
    return []


def _task(path: Path) -> str:
    for directory in path.parents[:2]:  # run.toml is next to logs/
        with contextlib.suppress(OSError, ValueError, KeyError):
            env_id = str(tomllib.loads((directory / "run.toml").read_text(encoding="utf-8"))["env_id"])
            return re.split("[/:]", env_id)[-1]  # without the namespace, or the module that registers it
    return next((parent.name for parent in path.parents if ENVIRONMENT_ID.match(parent.name)), "")


def read_columns(argument: str, path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> Floats:
    """Return columns of a progress.csv, (names + optional, rows) float64, with NaN for values that are not finite.

    An optional column that the file lacks is NaN too.

    Raises:
        ConfigurationError: the file cannot be read or lacks a column; the message names the argument.
    """
    try:
        header, rows = read_progress(path)
        if header and (missing := set(names).difference(header)):  # without a header, the run has just begun
            raise KeyError(min(missing))
        cells = [[*(row[name] for name in names), *(row.get(name, "nan") for name in optional)] for row in rows]
        table = np.array(cells, dtype=np.float64).reshape(-1, len(names) + len(optional)).T
    except (OSError, KeyError, TypeError, ValueError) as error:
        wanted = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        raise ConfigurationError(
            f"{argument}={str(path)!r} is not a progress.csv with numbers under {wanted} ({error!r})"
        ) from error
    return np.where(np.isfinite(table), table, np.nan)


def on_common_grid(positions: Sequence[Floats], values: Sequence[Floats], points: int) -> tuple[Floats, Floats]:
    """Interpolate curves linearly over the range that all of them cover: nothing is extrapolated.

    Args:
        positions: for each curve, the positions of its values, ascending, (rows,).
        values: for each curve, its values there, (rows,).
        points: number of points of the grid.

    Returns:
        The grid (points,), and the values on it (curves, points). Both have no points if the curves do not overlap.
    """
    start, end = max(x[0] for x in positions), min(x[-1] for x in positions)
    grid = np.linspace(start, end, points if start < end else int(start == end))
    return grid, np.array([np.interp(grid, x, y) for x, y in zip(positions, values, strict=True)])
