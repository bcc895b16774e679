# SPDX-License-Identifier: MIT
"""Whether bfloat16 learns as float32 does: runs of `results/atari/`, which have bfloat16, once more in float32.

`python -m benchmarks.precision` starts Pong's runs there anew with the same settings, seeds and ranks, ends them after
their first million steps, and sets both beside each other. Ctrl-C stops it; the same command goes on.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.atari_scores import GAMES, place
from benchmarks.results import RESULTS, launcher, rounded, run_to_its_end, unfinished, write
from ppo_mpi_base import run_file, settings, tasks
from ppo_mpi_base.aggregates import bootstrap_interval, mean
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.plot import plot_runs
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.runs import read_run
from ppo_mpi_base.worker import Worker

GAME, STEPS = "Pong", 1_000_000
HERE = RESULTS / "precision"
POINTS = 500_000, 750_000, 1_000_000


class EndEarly(Hooks):
    """Ends a run after `STEPS`, whose schedules are those of a longer one."""

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """End it."""
        if worker.total_steps >= STEPS:
            worker.end()


def in_float32(seed: int) -> Path:
    """Return where a run's progress.csv is kept."""
    return HERE / f"{GAME}-v5" / f"seed{seed}.csv"


def in_bfloat16(seed: int) -> Path:
    """Return where the progress.csv of the run to compare with is kept."""
    return place(GAME, seed)


def train(seed: int) -> None:
    """Train in float32 by the file of the run in bfloat16. Collective: call on all ranks."""
    given = run_file.read(in_bfloat16(seed).with_suffix(".toml"))
    directory = unfinished(in_float32(seed))
    keywords = {
        **tasks.functions(given["env_id"], given["hidden"]),
        **{name: value for name, value in given.items() if name not in settings.OWN and name != "env_id"},
        "precision": "float32",
        "resume": "auto",
        "log_directory": str(directory / "logs"),
        "save_location": str(directory / "saved_model"),
    }
    PPO(**keywords, hooks=[EndEarly()])


def train_and_keep(seed: int) -> None:
    """Train on as many ranks as in bfloat16, and keep what was logged. Ends this script where the run was stopped."""
    kept, ranks = in_float32(seed), run_file.ranks_of(in_bfloat16(seed).with_suffix(".toml")) or 1
    print(f"{GAME}, seed {seed}, float32, {ranks} ranks", flush=True)
    command = [*launcher(ranks), sys.executable, "-m", "benchmarks.precision", "--run", str(seed)]
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
    precisions, rows = {"float32": in_float32, "bfloat16": in_bfloat16}, []
    with tempfile.TemporaryDirectory() as directory:
        groups = {name: Path(directory) / name / f"{GAME}-v5" for name in precisions}
        for name, path_of in precisions.items():
            for seed in seeds:
                cut(path_of(seed), groups[name] / f"seed{seed}.csv")
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
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(GAMES[GAME].seeds)))
    parser.add_argument("--run", type=int, metavar="SEED", help="train this one, as a rank of it: for mpiexec")
    arguments = parser.parse_args()
    if arguments.run is not None:
        train(arguments.run)
        return
    for seed in arguments.seeds:
        if not in_float32(seed).exists():
            train_and_keep(seed)
    compare(arguments.seeds)


if __name__ == "__main__":
    main()
