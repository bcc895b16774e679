# SPDX-License-Identifier: MIT
"""Test whether bfloat16 learns like float32: Pong's first million steps in both, with the same settings and seeds.

`python -m benchmarks.precision` trains the missing runs, and compares both. All runs have the settings of Pong's first
run in `results/atari/`, except for seed and precision. Ctrl-C stops it; the same command continues.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import atari_scores
from benchmarks.results import RESULTS, launcher, rounded, run_to_its_end, unfinished, write
from ppo_mpi_base import run_file, settings, tasks
from ppo_mpi_base.aggregates import Floats, difference, probability_of_improvement
from ppo_mpi_base.comparison import Estimate
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.plot import plot_runs
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.runs import read_run
from ppo_mpi_base.worker import Worker

GAME, STEPS, SEEDS = "Pong", 1_000_000, 5
PRECISIONS = "float32", "bfloat16"
SETTINGS = atari_scores.place(GAME, 0).with_suffix(".toml")
HERE = RESULTS / "precision"
POINTS = 500_000, 750_000, 1_000_000


class EndEarly(Hooks):
    """Ends a run after `steps` steps, with the schedules of a longer run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """End the run when due."""
        if worker.total_steps >= self.steps:
            worker.end()


def place(precision: str, seed: int) -> Path:
    """Return where a run's progress.csv is kept."""
    return HERE / precision / f"{GAME}-v5" / f"seed{seed}.csv"


def keywords(precision: str, seed: int, directory: Path | str) -> dict[str, Any]:
    """Return the keywords of `PPO()` for a seed's run, which keeps its files in a directory."""
    given = run_file.read(SETTINGS)
    return {
        **tasks.functions(given["env_id"], given["hidden"]),
        **{name: value for name, value in given.items() if name not in settings.OWN and name != "env_id"},
        "seed": seed,
        "precision": precision,
        "resume": "auto",
        "log_directory": f"{directory}/logs",
        "save_location": f"{directory}/saved_model",
    }


def train(precision: str, seed: int) -> None:
    """Train with `SETTINGS`. Collective: call on all ranks."""
    PPO(**keywords(precision, seed, unfinished(place(precision, seed))), hooks=[EndEarly(STEPS)])


def train_and_keep(precision: str, seed: int) -> None:
    """Train on as many ranks as the run file says, and keep the log. Ends this script if the run was stopped."""
    kept, ranks = place(precision, seed), run_file.ranks_of(SETTINGS) or 1
    print(f"{GAME}, seed {seed}, {precision}, {ranks} ranks", flush=True)
    command = [*launcher(ranks), sys.executable, "-m", "benchmarks.precision", "--run", precision, "--seeds", str(seed)]
    run_to_its_end(command, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    logs = unfinished(kept) / "logs"
    shutil.copy(logs / "progress.csv", kept)
    shutil.copy(logs / "settings.json", kept.with_suffix(".json"))
    shutil.rmtree(unfinished(kept))


def scores(path: Path) -> list[float]:
    """Return the mean return of the last 100 episodes at each of `POINTS`, and its mean over all steps."""
    run = read_run(path)
    assert run is not None, f"{path}: no episode has ended"
    at = [float(np.interp(point, run.steps, run.values)) for point in POINTS]
    return [*at, float(np.trapezoid(run.values, run.steps) / (run.steps[-1] - run.steps[0]))]


def compare() -> None:
    """Write and print the scores of all runs, and how the precisions differ; draw the means over seeds."""
    groups = {precision: place(precision, 0).parent for precision in PRECISIONS}
    plot_runs(list(groups.values()), HERE / "curves", labels=list(groups))
    runs = {precision: sorted(group.glob("*.csv")) for precision, group in groups.items()}
    found = {precision: np.array([scores(path) for path in paths]) for precision, paths in runs.items()}
    rows = [
        [precision, path.stem.removeprefix("seed"), *map(rounded, row)]
        for precision, paths in runs.items()
        for path, row in zip(paths, found[precision], strict=True)
    ]
    rows += differing("difference", difference, found)
    rows += differing("P(bfloat16 > float32)", probability_of_improvement, found)
    write(HERE / "scores.csv", [["precision", "seed", *(f"at_{p}" for p in POINTS), "mean_over_steps"], *rows])


def differing(name: str, statistic: Callable[..., Floats], found: dict[str, Floats]) -> list[list[str]]:
    """Return a statistic of bfloat16's scores and float32's, (seeds, columns) each, and its 95% interval, as rows.

    Seeds are not paired: two runs of one seed begin alike, but diverge within a few updates.
    """
    columns = zip(found["bfloat16"].T, found["float32"].T, strict=True)
    estimates = [Estimate.of(statistic, [of_bfloat16], [of_float32]) for of_bfloat16, of_float32 in columns]
    return [[name, part, *(f"{getattr(x, part):.2f}" for x in estimates)] for part in ("value", "low", "high")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--run", choices=PRECISIONS, help="train the first of them in it, as a rank: for mpiexec")
    arguments = parser.parse_args()
    if arguments.run is not None:
        train(arguments.run, arguments.seeds[0])
        return
    for seed in arguments.seeds:
        for precision in PRECISIONS:
            if not place(precision, seed).exists():
                train_and_keep(precision, seed)
    compare()


if __name__ == "__main__":
    main()
