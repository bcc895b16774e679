# SPDX-License-Identifier: MIT
"""Train tasks over several seeds with `ppo-mpi train`, and compare them with published scores.

`make results`, or `python -m benchmarks.results --jobs 2`, trains nine MuJoCo tasks with one set of hyperparameters for
a million steps and ten seeds each; `--study 10M` trains four of them for ten million steps and three seeds;
`--study classic` trains the classic control tasks with five seeds. The script can be stopped (Ctrl-C writes
checkpoints) and restarted: it continues where it was, and existing runs are not repeated. Each run leaves its
progress.csv, and its run.toml with versions, in `results/`. After a change of settings, delete `runs/unfinished` first.
"""

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppo_mpi_base.aggregates import bootstrap_interval, interquartile_mean, sample_deviation
from ppo_mpi_base.interruption import REQUEUE
from ppo_mpi_base.plot import plot_runs
from ppo_mpi_base.run_file import NONE
from ppo_mpi_base.runs import Run, read_columns, read_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
UNFINISHED = ROOT / "runs" / "unfinished"


@dataclass(frozen=True)
class Study:
    """Tasks trained for `steps` steps (None: the preset's), with scores published by others (None: not published).

    `flags` are given to `ppo-mpi train` besides task, seed and steps. `published` are returns of training episodes,
    from `sources`, and `tested` are returns of test episodes, from `testers`. Settings were chosen with some of the
    first `chosen_by` seeds: the mean of the others does not depend on that choice.
    """

    directory: Path
    steps: int | None
    seeds: int
    sources: tuple[str, ...]
    published: dict[str, tuple[float | None, ...]]
    flags: tuple[str, ...] = ()
    testers: tuple[str, ...] = ()
    tested: dict[str, tuple[float, ...]] = field(default_factory=dict)
    chosen_by: int = 0

    def place(self, task: str, seed: int) -> Path:
        """Return where a run's progress.csv is kept."""
        return self.directory / task / f"seed{seed}.csv"

    def runs(self, task: str) -> list[Run]:
        """Return the existing runs of a task."""
        return runs_in(self.directory / task)


# Mean returns of training episodes: P, the PPO paper (v1, last 100 episodes, read from its curves); SU, OpenAI Spinning
# Up (v3); CR, CleanRL (v4); the curves of this package's predecessor (v4).
# Mean returns of test episodes: T, Tianshou (v3, 10 seeds) and X, XuanCe (v4), at the best time; Z, rl-baselines3-zoo
# (one run, at the end: after 1M steps for Acrobot and MountainCar, 20k for MountainCarContinuous, else 100k).
CLASSIC_CONTROL: dict[str, tuple[float, ...]] = {
    "CartPole-v1": (500,),
    "Acrobot-v1": (-73.506,),
    "Pendulum-v1": (-172.225,),
    "MountainCar-v0": (-110.423,),
    "MountainCarContinuous-v0": (88.343,),
}
STUDIES = {
    "1M": Study(
        RESULTS / "mujoco",
        1_000_000,
        10,
        ("P", "SU", "CR"),
        {
            "HalfCheetah-v4": (1800, 1733, 1443),
            "Hopper-v4": (2330, 1770, 2383),
            "Walker2d-v4": (3460, 1211, 2288),
            "Ant-v4": (None, 683, None),
            "Swimmer-v4": (108, 109, None),
            "Humanoid-v4": (None, None, 716),
            "Reacher-v4": (-7, None, None),
            "InvertedPendulum-v4": (1000, None, 963),
            "InvertedDoublePendulum-v4": (8000, None, None),
        },
        flags=("--evaluate-every", "100000"),
        testers=("T", "X"),
        tested={
            "HalfCheetah-v4": (5784, 4628),
            "Hopper-v4": (2609, 3450),
            "Walker2d-v4": (3589, 4319),
            "Ant-v4": (3258, 2811),
            "Swimmer-v4": (67, 109),
            "Humanoid-v4": (787, 706),
            "Reacher-v4": (-4.1, -8.1),
            "InvertedPendulum-v4": (1000, 1000),
            "InvertedDoublePendulum-v4": (9231, 9359),
        },
        chosen_by=5,
    ),
    "10M": Study(
        RESULTS / "mujoco_10M",
        10_000_000,
        3,
        ("predecessor",),
        {"HalfCheetah-v4": (4650,), "Hopper-v4": (2300,), "Walker2d-v4": (3300,), "Ant-v4": (3900,)},
    ),
    "classic": Study(
        RESULTS / "classic_control",
        steps=None,
        seeds=5,
        sources=(),
        published=dict.fromkeys(CLASSIC_CONTROL, ()),
        flags=("--evaluate-every", "50000", "--evaluate-episodes", "100"),
        testers=("Z",),
        tested=CLASSIC_CONTROL,
    ),
}


def train(study: Study, task: str, seed: int) -> None:
    """Train a task with `ppo-mpi train`, and thus its preset, on one rank, and keep its log."""
    steps = () if study.steps is None else ("--total-steps", str(study.steps))
    arguments = [task, "--seed", str(seed), *steps, "--quiet", *study.flags]
    train_and_keep(study.place(task, seed), arguments, OMP_NUM_THREADS="1")


def train_and_keep(kept: Path, arguments: Sequence[str], launch: Sequence[str] = (), **environment: str) -> None:
    """Run `ppo-mpi train` with these arguments, or resume it, and keep its log as `kept`.

    Raises:
        SystemExit: the run was stopped, or failed.
    """
    directory = unfinished(kept)
    command = [*launch, sys.executable, "-m", "ppo_mpi_base", "train", *arguments]
    run_to_its_end([*command, "--resume", "auto", "--directory", str(directory)], kept, **environment)
    keep(directory, kept)
    shutil.rmtree(directory)


def launcher(ranks: int) -> list[str]:
    """Return the beginning of a command that runs on this many ranks; nothing for one."""
    return [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []


def unfinished(kept: Path) -> Path:
    """Return the directory of a run whose progress.csv will be kept as `kept`."""
    return UNFINISHED / kept.relative_to(RESULTS).with_suffix("")


def run_to_its_end(command: Sequence[str], kept: Path, **environment: str) -> None:
    """Run a training command; if Ctrl-C stops both, wait for it to write a checkpoint.

    Raises:
        SystemExit: the run was stopped, or failed.
    """
    variables = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    status = None
    with subprocess.Popen(command, cwd=ROOT, env=variables) as process:
        while status is None:
            with contextlib.suppress(KeyboardInterrupt):  # the run gets it too, and writes a checkpoint
                status = process.wait()
    if status == REQUEUE:
        raise SystemExit(f"{kept.relative_to(ROOT)} was stopped: the same command goes on")
    if status != 0:
        raise SystemExit(status)


def keep(directory: Path, kept: Path) -> None:
    """Keep a finished run's progress.csv as `kept`, and next to it its run.toml, which can also start it elsewhere."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    text = (directory / "run.toml").read_text(encoding="utf-8")
    text = text.replace(str(directory), NONE).replace(f"{ROOT}/", "")
    kept.with_suffix(".toml").write_text(text, encoding="utf-8")
    shutil.copy(directory / "logs" / "progress.csv", kept)


def runs_in(directory: Path) -> list[Run]:
    """Return the runs of all seeds in a directory; none if it does not exist."""
    found = (read_run(path) for path in sorted(directory.glob("seed*.csv")))
    return [run for run in found if run is not None]


def tabulate(study: Study) -> None:
    """Write the table of all existing results, and draw their curves."""
    rows: list[list[str]] = []
    for task, published in study.published.items():
        runs = study.runs(task)
        if not runs:
            continue
        scores = np.array([run.score for run in runs])
        middle, (low, high) = float(interquartile_mean([scores])), bootstrap_interval(interquartile_mean, [scores])
        values = [scores.mean(), sample_deviation(scores), middle, low, high]
        if study.chosen_by:
            old = {study.place(task, seed) for seed in range(study.chosen_by)}
            new_ones = [run.score for run in runs if run.path not in old]
            values.append(float(np.mean(new_ones)) if new_ones else np.nan)
        numbers = [rounded(value) for value in values]
        known = ["" if score is None else f"{score:.0f}" for score in published]
        reached = all(score is None or scores.mean() >= score for score in published)
        verdict = ["yes" if reached else "NO"] if published else []
        seconds = np.median([run.seconds[-1] for run in runs])
        rows.append([task, *numbers, str(len(runs)), f"{seconds:.0f}", *known, *verdict])
    new = ["mean_of_new_seeds"] if study.chosen_by else []
    header = ["task", "mean", "std", "interquartile_mean", "low", "high", *new, "seeds", "median_seconds"]
    header += study.sources
    write_and_draw(study.directory, [[*header, *(["at_or_above"] if study.sources else [])], *rows])


def tabulate_tests(study: Study) -> None:
    """Write the table of the runs' test episodes: the highest mean over seeds at any one time, and the last."""
    header = ["task", "highest_mean", "std", "last_mean", "at_steps", "seeds", *study.testers, "not_below"]
    rows = []
    for task, published in study.tested.items():
        paths = sorted(study.place(task, 0).parent.glob("seed*.csv"))  # also runs in which no episode has ended
        read = [read_columns("runs", path, ("total_steps",), optional=("evaluation_return",)) for path in paths]
        tests = [dict(zip(*run[:, np.isfinite(run[1])], strict=True)) for run in read if np.isfinite(run[1]).any()]
        if len(tests) < len(read):
            print(f"{task}: {len(read) - len(tests)} of {len(read)} runs have no test episodes, and are left out")
        if not tests:
            continue
        steps = sorted(set.intersection(*map(set, tests)))  # a run that was stopped may lack one
        returns = np.array([[test[step] for step in steps] for test in tests])
        best = int(returns.mean(0).argmax())
        highest = returns[:, best]
        means = [rounded(x) for x in (highest.mean(), sample_deviation(highest), returns[:, -1].mean())]
        known = (f"{score:g}" for score in published)
        not_below = " ".join(name for name, x in zip(study.testers, published, strict=True) if highest.mean() >= x)
        rows.append([task, *means, f"{steps[best]:.0f}", str(len(tests)), *known, not_below])
    if rows:
        write(study.directory / "tests.csv", [header, *rows])


def rounded(value: float) -> str:
    """Return a number for a table; nothing for NaN, such as the deviation of a single seed."""
    return "" if np.isnan(value) else f"{value:.1f}"


def write(path: Path, table: Sequence[Sequence[str]]) -> None:
    """Write a table as CSV, and print it."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    for row in table:
        print("  ".join(row))


def write_and_draw(directory: Path, table: Sequence[Sequence[str]]) -> None:
    """Write the table of a directory of runs as scores.csv, print it, and draw the runs' curves next to it."""
    write(directory / "scores.csv", table)
    plot_runs([directory], directory / "curves", labels=["ppo_mpi_base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=STUDIES, default="1M", help="which tasks, and how many steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--seeds", type=int, help="of each task; the study's own number where it is not said")
    parser.add_argument("--only", nargs="+", metavar="TASK")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    if unknown := set(arguments.only or ()) - set(study.published):
        parser.error(f"--only {' '.join(sorted(unknown))}: the tasks are {', '.join(study.published)}")
    tasks = [task for task in study.published if task in (arguments.only or study.published)]
    seeds = range(arguments.seeds or study.seeds)
    train_all([(study, task, seed) for seed in seeds for task in tasks], arguments.jobs)
    tabulate(study)
    tabulate_tests(study)


def train_all(runs: Sequence[tuple[Study, str, int]], jobs: int) -> None:
    """Train tasks and seeds, several at a time, and show their scores and how long the rest will take.

    Existing runs are not repeated.
    """
    runs = [(study, task, seed) for study, task, seed in runs if not study.place(task, seed).exists()]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        bar, lock = progress.add_task("runs", total=len(runs)), threading.Lock()

        def one(study: Study, task: str, seed: int) -> None:
            train(study, task, seed)
            with lock:
                if (run := read_run(study.place(task, seed))) is not None:
                    what = f"{study.directory.name}: {task} seed {seed}"
                    progress.console.print(f"{what}: {run.score:.1f} in {run.seconds[-1]:.0f} s")
                progress.advance(bar)

        started = [pool.submit(one, *run) for run in runs]
        try:
            for done in started:
                done.result()
        except KeyboardInterrupt:
            raise SystemExit("stopped: the same command goes on") from None
        finally:  # Ctrl-C has stopped the runs in progress; no other may begin
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
