# SPDX-License-Identifier: MIT
"""Measure the time saved if half of the ranks train each network: `mpiexec -n 2 python -m benchmarks.dividing`.

The iterations of one training are divided and undivided in turns, so that drift of the machine affects both alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np

from benchmarks.contestants.ours import SETTINGS, keywords
from ppo_mpi_base.division import Undivided
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.rollout import Rollout, Shuffled
from ppo_mpi_base.worker import Worker

WARM_ITERATIONS = 8


class InTurns(Hooks):
    """Times updates, from the end of the rollout to that of the iteration; divides those of every other iteration."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.ways: list[tuple[Undivided, Shuffled]] = []
        self.seconds: list[list[float]] = [[], []]  # divided, undivided

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Stop the clock, and switch to the other way."""
        taken = worker.ranks.max(time.perf_counter() - self.started)
        if not self.ways:
            undivided = Undivided(worker.ranks), Shuffled(worker.config.minibatch_size)
            self.ways = [(worker.learner.division, worker.learner.shuffled), undivided]
        way = (worker.iteration - 1) % 2
        if worker.iteration > WARM_ITERATIONS:
            self.seconds[way].append(taken)
        worker.learner.division, worker.learner.shuffled = self.ways[1 - way]
        worker.learner.gradients.leave_to_others(worker.learner.division.idle, worker.learner.division.others)
        if worker.iteration == WARM_ITERATIONS + self.iterations:
            worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="measured ones, of both ways together")
    parser.add_argument("--eager", action="store_true", help="uncompiled, as short runs are")
    arguments = parser.parse_args()
    for name, setting in SETTINGS.items():
        turns = InTurns(arguments.iterations)
        with tempfile.TemporaryDirectory() as directory:
            PPO(**keywords(setting, directory, not arguments.eager), hooks=[turns])  # type: ignore[arg-type]
        if world().is_root:
            divided, undivided = (1000 * np.quantile(seconds, [0.25, 0.5, 0.75]) for seconds in turns.seconds)
            texts = [f"{middle:6.1f} ms ({low:.1f} to {high:.1f})" for low, middle, high in (divided, undivided)]
            share = divided[1] / undivided[1]
            print(f"{name:12}divided {texts[0]}   undivided {texts[1]}   {share:.2f} of the time", flush=True)


if __name__ == "__main__":
    main()
