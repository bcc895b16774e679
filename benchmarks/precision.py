# SPDX-License-Identifier: MIT
"""Whether bfloat16 learns as float32 does: Pong's first million steps in both, by the same settings and seeds.

`python -m benchmarks.precision` trains what is missing, and sets both beside each other. All runs have the settings of the
first one in `results/atari/`, but for seed and precision. Ctrl-C stops it; the same command goes on.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import atari_scores
from benchmarks.results import RESULTS, launcher, rounded, run_to_its_end, unfinished, write
from ppo_mpi_base import run_file, settings, tasks
from ppo_mpi_base.aggregates import bootstrap_interval, mean
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.logger import read_progress
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
    """Ends a run after so many steps, whose schedules are those of a longer one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """End it."""
        if worker.total_steps >= self.steps:
            worker.end()


def place(precision: str, seed: int) -> Path:
    """Return where a run's progress.csv is kept."""
    return HERE / precision / f"{GAME}-v5" / f"seed{seed}.csv"


def keywords(precision: str, seed: int, directory: Path | str) -> dict[str, Any]:
    """Return those of `PPO()` for a seed's run, which keeps its files in a directory."""
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
    """Train by the seed's run file. Collective: call on all ranks."""
    PPO(**keywords(precision, seed, unfinished(place(precision, seed))), hooks=[EndEarly(STEPS)])


def train_and_keep(precision: str, seed: int) -> None:
    """Train on as many ranks as the run file says, and keep what was logged. Ends this script where it was stopped."""
    kept, ranks = place(precision, seed), run_file.ranks_of(SETTINGS) or 1
    print(f"{GAME}, seed {seed}, {precision}, {ranks} ranks", flush=True)
    command = [*launcher(ranks), sys.executable, "-m", "benchmarks.precision", "--run", precision, "--seeds", str(seed)]
    run_to_its_end(command, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    logs = unfinished(kept) / "logs"
    shutil.copy(logs / "progress.csv", kept)
    shutil.copy(logs / "settings.json", kept.with_suffix(".json"))
    shutil.rmtree(unfinished(kept))


def cut(path: Path, kept: Path) -> None:
    """Write the first `STEPS` of a progress.csv as another."""
    header, rows = read_progress(path)
    first = [",".join(row[name] for name in header) for row in rows if float(row["total_steps"]) <= STEPS]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("\n".join([",".join(header), *first, ""]))


def scores(path: Path) -> list[float]:
    """Return the mean return of 100 episodes at each of `POINTS`, and its mean over all steps."""
    run = read_run(path)
    assert run is not None, f"{path}: no episode has ended"
    at = [float(np.interp(point, run.steps, run.returns)) for point in POINTS]
    return [*at, float(np.trapezoid(run.returns, run.steps) / (run.steps[-1] - run.steps[0]))]


def compare(seeds: Sequence[int]) -> None:
    """Write and print both precisions' scores by seed, and what the mean differs by; draw both means over seeds."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        groups = {precision: Path(directory) / precision / f"{GAME}-v5" for precision in PRECISIONS}
        for precision, group in groups.items():
            for seed in seeds:
                cut(place(precision, seed), group / f"seed{seed}.csv")
        plot_runs(list(groups.values()), HERE / "curves", labels=list(groups))
        found = {name: np.array([scores(group / f"seed{k}.csv") for k in seeds]) for name, group in groups.items()}
    for name, of_seeds in found.items():
        rows += [(name, str(seed), row) for seed, row in zip(seeds, of_seeds, strict=True)]
    differences = found["bfloat16"] - found["float32"]  # of two runs that begin with the same weights and games
    low, high = np.array([bootstrap_interval(mean, [column]) for column in differences.T]).T
    rows += [("difference", "mean", differences.mean(0)), ("difference", "from", low), ("difference", "to", high)]
    table = [[precision, seed, *map(rounded, numbers)] for precision, seed, numbers in rows]
    write(HERE / "scores.csv", [["precision", "seed", *(f"at_{p}" for p in POINTS), "mean_over_steps"], *table])


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
    compare(arguments.seeds)


if __name__ == "__main__":
    main()
