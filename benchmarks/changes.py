# SPDX-License-Identifier: MIT
"""Measure what changes to `presets.mujoco` do, over five seeds each: `python -m benchmarks.changes --jobs 2`.

Each change is a few flags of `ppo-mpi train`, and is compared with runs of the unchanged preset: those of `make
results`, and ten more for some tasks, with the same seeds but on another processor, in `results/changes/preset/`. The
script can be stopped and restarted. Runs and table are kept in `results/changes/`.
"""

import argparse
from collections.abc import Sequence

from benchmarks.results import RESULTS, STUDIES, Study, runs_in, train_all, write
from ppo_mpi_base.comparison import compare, spread
from ppo_mpi_base.runs import Run

SEEDS = 5
CHANGES = {
    "lambda_0.9": "--lam 0.9",
    "lambda_0.92": "--lam 0.92",
    "gamma_0.995_lambda_0.9": "--gamma 0.995 --lam 0.9",
    "rates_2e-3": "--pi-lr 2e-3 --vf-lr 2e-3",
}
BASE = STUDIES["1M"]
TASKS = tuple(BASE.published)
DIRECTORY = RESULTS / "changes"


def study(change: str) -> Study:
    """Return the study of a change, without published scores to compare with."""
    flags = tuple(CHANGES[change].split())
    return Study(DIRECTORY / change, BASE.steps, SEEDS, (), dict.fromkeys(TASKS, ()), flags)


def preset_runs(task: str) -> list[Run]:
    """Return the runs of the unchanged preset."""
    return [*BASE.runs(task), *runs_in(DIRECTORY / "preset" / task)]


def row(change: str, task: str, changed: Sequence[Run], base: Sequence[Run]) -> list[str]:
    """Return a row of the table: scores with the change and without it, and how they differ."""
    compared = compare({task: changed}, {task: base}, (change, "preset")).tasks[0]
    numbers = spread(compared.scores_a), spread(compared.scores_b), str(compared.difference), str(compared.probability)
    return [change, task, *numbers]


def tabulate() -> None:
    """Write the table of the existing runs, and print it."""
    rows = [
        row(change, task, changed, preset_runs(task))
        for change in CHANGES
        for task in TASKS
        if (changed := study(change).runs(task))
    ]
    write(DIRECTORY / "scores.csv", [["change", "task", "with_it", "preset", "difference", "probability"], *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    arguments = parser.parse_args()
    every = [(study(change), task) for change in arguments.only for task in arguments.tasks]
    train_all([(of, task, seed) for of, task in every for seed in range(SEEDS)], arguments.jobs)
    tabulate()


if __name__ == "__main__":
    main()
