# SPDX-License-Identifier: MIT
"""Find the number of minibatches from which compiling pays: `python benchmarks/compiling.py`, or with `--task pong`.

Runs of two lengths, compiled and not, each in its own process, give the cost of starting and the cost of a minibatch.
`compilation.WORTHWHILE_MINIBATCHES` and `..._OF_IMAGES` are about the numbers for an empty cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys, tempfile
from ppo_mpi_base.ppo import PPO
{imports}
with tempfile.TemporaryDirectory() as directory:
    PPO(**{{**{keywords}, "total_steps": int(sys.argv[1])}})
"""


@dataclass(frozen=True)
class Task:
    """One rank's samples per iteration, minibatch size, epochs and keywords; and two run lengths in iterations."""

    samples: int
    minibatch: int
    epochs: int
    lengths: tuple[int, int]
    imports: str
    keywords: str


TASKS = {
    "halfcheetah": Task(
        *(1024, 32, 10, (4, 40)),
        "from benchmarks.contestants.ours import SETTINGS, keywords",
        'keywords(SETTINGS["paper"], directory, sys.argv[2] == "compiled")',
    ),
    "pong": Task(
        *(1024, 256, 4, (3, 15)),
        "from benchmarks.contestants.atari import keywords",
        'keywords(directory, sys.argv[2] == "compiled")',
    ),
}


def seconds(task: Task, iterations: int, how: str, cache: str) -> float:
    """Return how long a whole run takes, including its start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    started = time.perf_counter()
    program = RUN.format(imports=task.imports, keywords=task.keywords)
    command = [sys.executable, "-c", program, str(iterations * task.samples), how]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="halfcheetah")
    task = TASKS[parser.parse_args().task]
    minibatches = task.samples // task.minibatch * task.epochs  # per iteration
    few, many = task.lengths
    with tempfile.TemporaryDirectory() as cache:
        empty = seconds(task, few, "compiled", cache)
        short, long = ({how: seconds(task, n, how, cache) for how in ("eager", "compiled")} for n in (few, many))
    each = {how: (long[how] - short[how]) / (many - few) / minibatches for how in short}
    start = {how: short[how] - few * minibatches * each[how] for how in short}
    for how in short:
        print(f"{how:10}{start[how]:6.1f} s to start, {1e6 * each[how]:6.0f} us a minibatch with its share of the rest")
    print(f"{'compiled':10}{start['compiled'] + empty - short['compiled']:6.1f} s to start with an empty cache")
    gain = each["eager"] - each["compiled"]
    for name, more in (("a full", 0.0), ("an empty", empty - short["compiled"])):
        worthwhile = (start["compiled"] + more - start["eager"]) / gain
        print(f"compiling pays from {worthwhile:,.0f} minibatches on, with {name} cache")


if __name__ == "__main__":
    main()
