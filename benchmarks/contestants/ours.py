# SPDX-License-Identifier: MIT
"""This package: `mpiexec -n 2 python -m benchmarks.contestants.ours --setting paper`."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np

from ppo_mpi_base import presets
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import Communicator, world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.worker import Worker

WARM_ITERATIONS = 3
MESSAGES = 500
RANKS = 2


@dataclass(frozen=True)
class Setting:
    """What one of two ranks does in an iteration: N environments, T steps, minibatches of B samples, and epochs."""

    environments: int
    length: int
    minibatch: int
    epochs: int

    @classmethod
    def of(cls, preset: dict[str, Any]) -> Setting:
        """Return what a preset asks of a rank."""
        names = ("num_environments", "rollout_length_per_worker", "train_batch_size", "train_pi_epochs")
        return cls(*(preset[name] for name in names))


SETTINGS = {
    "paper": Setting(environments=16, length=64, minibatch=32, epochs=10),
    "throughput": Setting.of(presets.mujoco(RANKS)),
    "large": Setting(environments=32, length=128, minibatch=512, epochs=2),
}

mujoco.set_mju_user_warning(lambda message: None)


class Stopwatch(Hooks):
    """Measures whole iterations for `seconds` seconds after the warm-up, then ends the run."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.rows: list[dict[str, float]] = []

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Start the clock once everything is compiled; end training once the time is over."""
        if worker.iteration == WARM_ITERATIONS:
            self.message_seconds = seconds_per_message(worker, worker.ranks)
            worker.reports.times_row(worker.total_steps)  # the next row must not count these messages
            self.first_step, self.started = worker.total_steps, time.perf_counter()
        elif worker.iteration > WARM_ITERATIONS:
            self.rows.append(statistics)
            passed = worker.ranks.max(time.perf_counter() - self.started)
            if passed > self.seconds:
                self.steps_per_second = (worker.total_steps - self.first_step) / passed
                worker.end()

    def mean(self, name: str) -> float:
        """Return the mean of a statistic over the measured iterations."""
        return float(np.mean([row[name] for row in self.rows]))


def seconds_per_message(worker: Worker, ranks: Communicator) -> float:
    """Return the cost of one Allreduce if ranks need not wait for each other. Collective: call on all these ranks."""
    message = np.zeros(worker.flat.message.numel(), np.float32)
    taken = []
    for _ in range(MESSAGES):
        started = time.perf_counter()
        ranks.sum_(message)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def env_fn() -> gymnasium.Env:
    return gymnasium.make("HalfCheetah-v5")


def keywords(setting: Setting, directory: str, compiled: bool = True, divide: bool = True) -> dict[str, object]:
    """Return the keywords of `PPO`, including the presets' normalization, which no peer does here."""
    return {
        **presets.mujoco(RANKS),
        "total_steps": 1e9,
        "env_fn": env_fn,
        "network_fn": mlp,
        "value_network_fn": mlp,
        "num_environments": setting.environments,
        "rollout_length_per_worker": setting.length,
        "train_batch_size": setting.minibatch,
        "train_pi_epochs": setting.epochs,
        "train_v_epochs": setting.epochs,
        "compile": compiled,
        "divide_networks": "auto" if divide else False,
        "log_directory": directory,
        "save_location": None,
        "quiet": True,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="paper")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--undivided", action="store_true", help="both ranks train both networks")
    parser.add_argument("--seconds", type=float, default=12)
    arguments = parser.parse_args()
    setting, stopwatch = SETTINGS[arguments.setting], Stopwatch(arguments.seconds)
    with tempfile.TemporaryDirectory() as directory:
        chosen = keywords(setting, directory, not arguments.eager, not arguments.undivided)
        PPO(**chosen, hooks=[stopwatch])  # type: ignore[arg-type]
    if world().is_root:
        messages = stopwatch.mean("time_communication")  # waiting for the slower rank is in time_waiting
        figures = {
            "steps_per_second": stopwatch.steps_per_second,
            "message_us": 1e6 * stopwatch.message_seconds,
            "communication_of_update": messages / (messages + stopwatch.mean("time_learning")),
            **{name: stopwatch.mean(name) for name in stopwatch.rows[0] if name.startswith("time_")},
        }
        print(json.dumps(figures), flush=True)
