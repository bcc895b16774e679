# SPDX-License-Identifier: MIT
"""Predict training speed from the cost of its pieces, next to the measured speed: `python benchmarks/cost_model.py`.

The pieces are measured at two sizes, which separates the overhead of a call from the work on a sample. docs/speed.md
explains the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (8, 64, 32), (32, 128, 512)  # environments, steps and minibatch per rank, at which pieces are measured
SETTINGS = {  # environments and steps per rank, minibatch per rank, epochs: those of contestants/ours.py
    "paper": (16, 64, 32, 10),
    "throughput": (16, 128, 128, 4),
    "large": (32, 128, 512, 2),
}
CLUSTER = (16, 128, 1024)  # ranks
LATENCY_US = 2.0
BYTES_PER_US = 12_500.0  # 100 Gbit/s


@dataclass(frozen=True)
class Line:
    """A cost in microseconds that grows with the size: `call + each * size`."""

    call: float
    each: float

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Return the line through two points (size, cost); with slope 0 if the larger size cost less."""
        each = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        return cls(max(0.0, small[1] - each * small[0]), each)

    def __call__(self, size: float) -> float:
        """Return the cost of a call of this size."""
        return self.call + self.each * size


@dataclass(frozen=True)
class Model:
    """What the pieces cost one rank, in microseconds; `message` is one Allreduce among ranks that train one network.

    If a rank trains one network on the minibatches of two ranks, "a sample" is one that a single rank contributes.
    """

    environments: Line
    inference: Line
    minibatch: Line
    iteration: Line
    optimizer: float
    shuffle: float
    message: float
    message_bytes: float
    parameters: float

    @classmethod
    def fit(cls, small: dict[str, float], large: dict[str, float]) -> Model:
        """Return the model of pieces measured at the two `SIZES`."""

        def line(name: str, sizes: tuple[int, int]) -> Line:
            return Line.through((sizes[0], small[name]), (sizes[1], large[name]))

        (n, length, minibatch), (more, longer, larger) = SIZES
        environments, minibatches, samples = (n, more), (minibatch, larger), (n * length, more * longer)
        alike = {name: (small[name] + large[name]) / 2 for name in ("optimizer", "message")}
        return cls(
            line("environments", environments),
            line("inference", environments),
            line("minibatch", minibatches),
            line("iteration", samples),
            shuffle=large["shuffle"],
            message_bytes=small["message_bytes"],
            parameters=small["parameters"],
            **alike,
        )

    def per_step(self, setting: tuple[int, int, int, int], message: float | None = None) -> dict[str, float]:
        """Return one rank's microseconds per environment step, phase by phase.

        Args:
            setting: environments, steps, minibatch and epochs of a rank.
            message: the cost of one Allreduce; None: as measured.
        """
        n, length, minibatch, epochs = setting
        updates, samples = epochs / minibatch, n * length  # updates per step, samples per iteration
        return {
            "environments": self.environments(n) / n,
            "inference": self.inference(n) / n,
            "work on samples": updates * minibatch * self.minibatch.each + epochs * self.shuffle,
            "overhead of calls": updates * (self.minibatch.call + self.optimizer),
            "communication": updates * (self.message if message is None else message),
            "iteration": self.iteration(samples) / samples,
        }


def allreduce(ranks: int, size: float, latency: float = LATENCY_US, bandwidth: float = BYTES_PER_US) -> float:
    """Return an Allreduce's microseconds for `size` bytes: 2 log2(R) latencies, and 2 (R - 1) / R times `size` to send.

    Source: Rabenseifner's algorithm, recursive halving and doubling; Thakur, Rabenseifner and Gropp (2005),
    "Optimization of Collective Communication Operations in MPICH", section 4.
    """
    return 2 * math.ceil(math.log2(ranks)) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def speed(ranks: int, per_step: dict[str, float]) -> float:
    """Return the steps per second of all ranks."""
    return ranks * 1e6 / sum(per_step.values())


def run(program: str, *arguments: str) -> dict[str, float]:
    """Run a program of `contestants/` on two ranks, and return the JSON that it prints."""
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    command = [mpiexec, "-n", "2", sys.executable, "-m", f"benchmarks.contestants.{program}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def show_pieces(model: Model) -> None:
    lines = {"environments": "environment", "inference": "environment", "minibatch": "sample", "iteration": "sample"}
    for name, of in lines.items():
        line: Line = getattr(model, name)
        print(f"{name:14}{line.call:8.1f} us a call + {line.each:6.2f} us a {of}")
    print(f"{'optimizer':14}{model.optimizer:8.1f} us a call (norms, clipping, Adam)")
    print(f"{'shuffle':14}{'':22}{model.shuffle:6.2f} us a sample")
    print(f"{'message':14}{model.message:8.1f} us a call, {model.message_bytes / 1000:.0f} kB")
    # 2 operations per parameter forward, 4 backward.
    print(f"gradient      {6 * model.parameters / max(model.minibatch.each, 1e-9) / 1000:8.1f} GFLOP/s, calls aside")


def show_settings(model: Model, seconds: float, flags: Sequence[str]) -> None:
    phases = list(model.per_step(SETTINGS["paper"]))
    print(f"\n{'us a step':12}" + "".join(f"{phase:>19}" for phase in phases) + f"{'predicted':>11}{'measured':>10}")
    for name, setting in SETTINGS.items():
        costs = model.per_step(setting)
        measured = run("ours", "--setting", name, "--seconds", str(seconds), *flags)["steps_per_second"]
        shown = "".join(f"{cost:19.1f}" for cost in costs.values())
        print(f"{name:12}{shown}{speed(2, costs):11.0f}{measured:10.0f}", flush=True)


def show_cluster(model: Model, divided: bool) -> None:
    print(f"\n{'':12}{'ranks':>6}{'Allreduce':>14}{'predicted':>12}{'of linear':>11}")
    for name, setting in SETTINGS.items():
        alone = speed(1, model.per_step(setting, 0.0))
        for ranks in CLUSTER:
            message = allreduce(ranks // 2 if divided else ranks, model.message_bytes)
            predicted = speed(ranks, model.per_step(setting, message))
            print(f"{name:12}{ranks:6}{message:11.1f} us{predicted:12.0f}{predicted / (ranks * alone):11.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="seconds to measure each setting")
    parser.add_argument("--undivided", action="store_true", help="all ranks train both networks")
    arguments = parser.parse_args()
    flags = ["--undivided"] if arguments.undivided else []
    small, large = (
        run("pieces", "--environments", str(n), "--length", str(length), "--minibatch", str(minibatch), *flags)
        for n, length, minibatch in SIZES
    )
    model = Model.fit(small, large)
    show_pieces(model)
    show_settings(model, arguments.seconds, flags)
    show_cluster(model, not arguments.undivided)


if __name__ == "__main__":
    main()
