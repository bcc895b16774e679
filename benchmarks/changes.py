# SPDX-License-Identifier: MIT
"""What changes of `presets.mujoco` do, over five seeds each: `python -m benchmarks.changes --jobs 2`.

Each is a few flags of `ppo-mpi train`, and is compared with the runs of `make results`, which are as the preset is. It
can be stopped and started again. Runs stay in `results/changes/`, with the table.
"""

import argparse

import numpy as np

from benchmarks.results import RESULTS, STUDIES, Study, train_all, write
from ppo_mpi_base.aggregates import sample_deviation
from ppo_mpi_base.comparison import Estimate, compare
from ppo_mpi_base.runs import Run, read_run

SEEDS = 5
CHANGES = {
    "lambda_0.9": "--lam 0.9",
    "lambda_0.92": "--lam 0.92",
    "rates_2e-3": "--pi-lr 2e-3 --vf-lr 2e-3",
    "updates_of_128": "--train-batch-size 128",
    "epochs_8": "--train-pi-epochs 8 --train-v-epochs 8",
    "log_std_-1": "--initial-log-std -1",
}
BASE = STUDIES["1M"]
TASKS = tuple(BASE.published)
DIRECTORY = RESULTS / "changes"


def study(change: str) -> Study:
    """Return the runs of a change, where none is compared with what others published."""
    flags = tuple(CHANGES[change].split())
    return Study(DIRECTORY / change, BASE.steps, SEEDS, (), dict.fromkeys(TASKS, ()), flags)


def runs(of: Study, task: str) -> list[Run]:
    """Return the runs of a task that are there."""
    found = (read_run(path) for path in sorted(of.place(task, 0).parent.glob("seed*.csv")))
    return [run for run in found if run is not None]


def row(change: str, task: str) -> list[str]:
    """Return a line of the table: what the change reached, and how much more that is than without it."""
    changed, base = runs(study(change), task), runs(BASE, task)
    scores = [run.score for run in changed]
    compared = compare({task: changed}, {task: base}, (change, "preset")).tasks[0]
    numbers = [np.mean(scores), sample_deviation(scores), np.mean(compared.scores_b)]
    more = compared.difference
    seconds = np.median([run.seconds[-1] for run in changed])
    listed = [f"{number:.0f}" for number in (*numbers, more.value, more.low, more.high, seconds)]
    return [change, CHANGES[change], task, str(len(scores)), *listed, probability(compared.probability)]


def probability(estimate: Estimate) -> str:
    """Return a probability of improvement with its interval."""
    return f"{estimate.value:.2f} [{estimate.low:.2f} {estimate.high:.2f}]"


def tabulate() -> None:
    """Write the table of what is there, and print it."""
    header = ["change", "flags", "task", "seeds", "mean", "std", "preset", "difference", "low", "high"]
    table = [row(change, task) for change in CHANGES for task in TASKS if runs(study(change), task)]
    table.insert(0, [*header, "median_seconds", "probability_of_improvement"])
    write(DIRECTORY / "scores.csv", table)


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
