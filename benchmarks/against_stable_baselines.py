# SPDX-License-Identifier: MIT
"""Train three tasks with this package and with Stable-Baselines3: return at equal steps, and over wall-clock time.

`python -m benchmarks.against_stable_baselines`: ours uses `ppo-mpi train` on two ranks, the other as many threads as it
likes. They take turns, one run at a time. Existing runs are not repeated; all are kept in
`results/against_stable_baselines/`.
"""

import argparse
import os
import platform
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.peers import ROOT, install, python_of
from benchmarks.results import launcher, runs_in, train_and_keep, write
from ppo_mpi_base.aggregates import sample_deviation
from ppo_mpi_base.plot import plot_runs

RESULTS = ROOT / "results" / "against_stable_baselines"
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
PEER, OURS = "stable_baselines3", "ppo_mpi_base"
LABELS = {OURS: "ppo_mpi_base, 2 ranks", PEER: "Stable-Baselines3"}
RANKS = 2


def place(library: str, task: str, seed: int) -> Path:
    """Return the path where a run's CSV file is kept."""
    return RESULTS / library / task / f"seed{seed}.csv"


def train(library: str, task: str, seed: int, steps: int) -> None:
    """Train a task and keep its log; for ours, also run.toml with versions and settings."""
    kept = place(library, task, seed)
    if library == OURS:
        train_and_keep(kept, [task, "--seed", str(seed), "--total-steps", str(steps)], launcher(RANKS))
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".unfinished")
    program = "benchmarks.contestants.stable_baselines_learning"
    subprocess.run([python_of(PEER), "-m", program, task, str(seed), str(steps), unfinished], cwd=ROOT, check=True)
    unfinished.rename(kept)


def keep_versions() -> None:
    """Write the versions in the peer's environment next to its runs."""
    installed = subprocess.run(
        [python_of(PEER), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout
    (RESULTS / PEER).mkdir(parents=True, exist_ok=True)
    (RESULTS / PEER / "versions.txt").write_text(installed)


def tabulate() -> None:
    """Write the table of the existing runs and draw their curves, over steps and over time."""
    rows = []
    for task in TASKS:
        for library in LABELS:
            if found := runs_in(place(library, task, 0).parent):
                scores, seconds = [run.score for run in found], [run.seconds[-1] for run in found]
                numbers = np.mean(scores), sample_deviation(scores), np.median(seconds)
                rows.append([task, LABELS[library], str(len(found)), *(f"{number:.0f}" for number in numbers)])
    header = ["task", "library", "seeds", "mean_return", "std", "median_seconds"]
    write(RESULTS / "scores.csv", [header, *rows])
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    groups = [RESULTS / library for library in LABELS]
    plot_runs(groups, RESULTS / "by_steps", labels=list(LABELS.values()))
    plot_runs(groups, RESULTS / "by_time", labels=list(LABELS.values()), axis="time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if not install(PEER):
        raise SystemExit(1)
    keep_versions()
    for seed in range(arguments.seeds):
        for task in TASKS:
            for library in LABELS:
                if not place(library, task, seed).exists():
                    train(library, task, seed, arguments.steps)
                    print(f"{LABELS[library]}, {task}, seed {seed} is trained", flush=True)
    tabulate()


if __name__ == "__main__":
    main()
