# SPDX-License-Identifier: MIT
"""Train the examples over several seeds and tabulate their scores: `python benchmarks/learning.py --jobs 2`.

Runs with an existing result are not repeated, so the script can be stopped and restarted. Each run leaves its
progress.csv and the versions that made it in `results/learning/`.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np

from ppo_mpi_base.aggregates import sample_deviation
from ppo_mpi_base.plot import compare_runs
from ppo_mpi_base.runs import read_run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "learning"
MUJOCO = {"HalfCheetah-v5": 1800.0, "Hopper-v5": 2250.0, "Walker2d-v5": 3000.0}  # task -> score to reach
CARTPOLE = "CartPole-v1"
# Of the MuJoCo example. "paper_64" is "paper" with the networks of "fast", so that both solve the same problem.
SETTINGS = {"fast": "--setting fast", "paper": "--setting paper", "paper_64": "--setting paper --width 64"}
RUNS = (
    [(CARTPOLE, "", seed) for seed in range(5)]
    + [(task, "paper", seed) for seed in range(3) for task in MUJOCO]
    + [(task, setting, seed) for seed in range(5) for setting in ("fast", "paper_64") for task in MUJOCO]
)

STYLES = (("", "#0072B2", "-"), ("fast", "#0072B2", "-"), ("paper", "#E69F00", "--"), ("paper_64", "#009E73", ":"))


def place(task: str, setting: str, seed: int) -> Path:
    """Return where a run's progress.csv is kept."""
    return RESULTS / task / setting / f"seed{seed}.csv"


def train(task: str, setting: str, seed: int) -> None:
    """Train one task with its example, on one rank, and keep its log."""
    kept = place(task, setting, seed)
    if kept.exists():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    example = "classic_control" if task == CARTPOLE else "mujoco"
    arguments = ["--seed", str(seed)] + ([] if task == CARTPOLE else ["--env-id", task, *SETTINGS[setting].split()])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, f"examples/{example}/train.py", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, "--directory", directory], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        shutil.copy(Path(directory) / "logs" / "progress.csv", kept)
    facts = {
        "command": " ".join(["python", *command[1:]]),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")},
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    kept.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{task} {setting} seed {seed}: {score(kept):.1f} in {facts['seconds']} s", flush=True)


def score(path: Path) -> float:
    """Return the mean return of the last 100 training episodes; for CartPole, the highest value of this mean."""
    run = read_run(path)
    if run is None:
        return float("nan")
    return float(run.values.max()) if CARTPOLE in path.parts else run.score


def scores(task: str, setting: str) -> list[float]:
    """Return the scores of all existing seeds."""
    return [score(path) for path in sorted(place(task, setting, 0).parent.glob("seed*.csv"))]


def tabulate() -> None:
    """Write the table and draw the curves of all existing results."""
    rows = []
    for task in (CARTPOLE, *MUJOCO):
        for setting in ("",) if task == CARTPOLE else SETTINGS:
            if found := scores(task, setting):
                reach, listed = f"{MUJOCO.get(task, 475.0):.0f}", " ".join(f"{x:.0f}" for x in found)
                rows.append([task, setting, f"{np.mean(found):.0f}", f"{sample_deviation(found):.0f}", reach, listed])
    with (RESULTS / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["task", "setting", "mean", "std", "to_reach", "seeds"], *rows])
    for row in rows:
        print("  ".join(row))
    draw()
    # The throughput setting must not learn less than the paper's, with the same networks.
    fast, paper = ([RESULTS / task / setting for task in MUJOCO] for setting in ("fast", "paper_64"))
    print(compare_runs(fast, paper, RESULTS / "fast_against_paper_64", ["fast", "paper, 64x64"]))


def draw() -> None:
    """Draw a panel for each task, with a line for each run."""
    tasks = [CARTPOLE, *MUJOCO]
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 2.6), layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        for setting, color, style in STYLES:
            for number, path in enumerate(sorted(place(task, setting, 0).parent.glob("seed*.csv"))):
                if (run := read_run(path)) is None:
                    continue
                label = setting if number == 0 and setting else None
                axis.plot(run.steps / 1e6, run.values, linewidth=1, color=color, linestyle=style, label=label)
        axis.axhline(MUJOCO.get(task, 475.0), color="0.4", linestyle=":", linewidth=1)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("million steps")
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return, last 100 episodes")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "curves.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each")
    with ThreadPoolExecutor(parser.parse_args().jobs) as pool:
        list(pool.map(lambda run: train(*run), RUNS))
    tabulate()
