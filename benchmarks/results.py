# SPDX-License-Identifier: MIT
"""Train nine MuJoCo tasks over ten seeds by one set of hyperparameters, and set them beside published scores.

`make results`, or `python benchmarks/results.py --jobs 2`. Runs that are there already are not repeated, so that it can
be stopped and started again; each leaves its progress.csv, and its run.toml with versions, in `results/mujoco/`.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppo_mpi_base.aggregates import bootstrap_interval, interquartile_mean, sample_deviation
from ppo_mpi_base.plot import plot_runs
from ppo_mpi_base.run_file import NONE
from ppo_mpi_base.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "mujoco"
SEEDS = 10
# The one set of hyperparameters: the tuned setting of `ppo-mpi train`, but looking a little further ahead, and with
# environments that are at different moments of their episodes. docs/tried.md says what both do.
SETTING = ["--gamma", "0.993", "--stagger-episodes", "1000"]
# Mean returns of training episodes at 1M steps: P, the PPO paper (v1, last 100 episodes, read from its curves); SU,
# OpenAI Spinning Up (v3); CR, CleanRL (v4). None: not published.
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "HalfCheetah-v4": (1800, 1733, 1443),
    "Hopper-v4": (2330, 1770, 2383),
    "Walker2d-v4": (3460, 1211, 2288),
    "Ant-v4": (None, 683, None),
    "Swimmer-v4": (108, 109, None),
    "Humanoid-v4": (None, None, 716),
    "Reacher-v4": (-7, None, None),
    "InvertedPendulum-v4": (1000, None, 963),
    "InvertedDoublePendulum-v4": (8000, None, None),
}


def place(task: str, seed: int) -> Path:
    """Return where a run's progress.csv is kept."""
    return RESULTS / task / f"seed{seed}.csv"


def train(task: str, seed: int) -> None:
    """Train a task by `ppo-mpi train`, on one rank, and keep what it logged."""
    train_and_keep(place(task, seed), [task, "--seed", str(seed), *SETTING], OMP_NUM_THREADS="1")


def train_and_keep(kept: Path, arguments: Sequence[str], launch: Sequence[str] = (), **environment: str) -> None:
    """Run `ppo-mpi train` with such arguments, and keep its progress.csv as `kept`, its run.toml beside it."""
    with tempfile.TemporaryDirectory() as directory:
        command = [*launch, sys.executable, "-m", "ppo_mpi_base", "train", *arguments, "--directory", directory]
        variables = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
        subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.DEVNULL)
        keep(Path(directory), kept)


def keep(directory: Path, kept: Path) -> None:
    """Keep the progress.csv of a finished run as `kept`, and beside it its run.toml, which starts it elsewhere too."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    text = (directory / "run.toml").read_text(encoding="utf-8")
    text = text.replace(str(directory), NONE).replace(f"{ROOT}/", "")
    kept.with_suffix(".toml").write_text(text, encoding="utf-8")
    shutil.copy(directory / "logs" / "progress.csv", kept)


def tabulate() -> None:
    """Write the table of all results that are there, and draw their curves."""
    rows: list[list[str]] = []
    for task, published in PUBLISHED.items():
        runs = [run for path in sorted(place(task, 0).parent.glob("seed*.csv")) if (run := read_run(path)) is not None]
        if not runs:
            continue
        scores = np.array([run.score for run in runs])
        middle, (low, high) = float(interquartile_mean([scores])), bootstrap_interval(interquartile_mean, [scores])
        values = scores.mean(), sample_deviation(scores), middle, low, high
        numbers = ["" if np.isnan(value) else f"{value:.1f}" for value in values]
        known = ["" if score is None else f"{score:.0f}" for score in published]
        reached = all(score is None or scores.mean() >= score for score in published)
        seconds = np.median([run.seconds[-1] for run in runs])
        rows.append([task, *numbers, str(len(runs)), f"{seconds:.0f}", *known, "yes" if reached else "NO"])
    header = ["task", "mean", "std", "interquartile_mean", "low", "high", "seeds", "median_seconds", "P", "SU", "CR"]
    header.append("at_or_above")
    write_and_draw(RESULTS, [header, *rows])


def write_and_draw(directory: Path, table: Sequence[Sequence[str]]) -> None:
    """Write the table of a directory of runs as scores.csv, print it, and draw the runs' curves beside it."""
    with (directory / "scores.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    for row in table:
        print("  ".join(row))
    plot_runs([directory], directory / "curves", labels=["ppo_mpi_base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="TASK")
    arguments = parser.parse_args()
    runs = [
        (task, seed) for seed in range(arguments.seeds) for task in arguments.only if not place(task, seed).exists()
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        bar, lock = progress.add_task("runs", total=len(runs)), threading.Lock()

        def one(task: str, seed: int) -> None:
            train(task, seed)
            with lock:
                if (run := read_run(place(task, seed))) is not None:
                    progress.console.print(f"{task} seed {seed}: {run.score:.1f} in {run.seconds[-1]:.0f} s")
                progress.advance(bar)

        for done in [pool.submit(one, *run) for run in runs]:
            done.result()
    tabulate()


if __name__ == "__main__":
    main()
