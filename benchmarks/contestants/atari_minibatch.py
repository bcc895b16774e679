# SPDX-License-Identifier: MIT
"""Measure what a minibatch of 256 frames costs in one thread: `python -m benchmarks.contestants.atari_minibatch`.

Prints the milliseconds of CPU time for gradient and statistics in each variant: the Nature network for policy and
value, with torch's own first layer or space-to-depth, eager or compiled, in float32 or bfloat16. Also, by precision,
how long its floating-point operations would take at the speed of a product of two 1,024 x 1,024 matrices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from ppo_mpi_base.compilation import Compiler, Eager
from ppo_mpi_base.flat_parameters import FlatParameters
from ppo_mpi_base.gradients import MOST_STATISTICS, Gradients, Objective
from ppo_mpi_base.networks import SharedTrunk, shared_nature_cnn
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.ppo import ppo_losses
from ppo_mpi_base.rollout import Batch

ACTIONS = 6


def network(first_layer: str) -> SharedTrunk:
    made = shared_nature_cnn(4, ACTIONS)
    if first_layer == "plain":
        assert isinstance(made.trunk, nn.Sequential)
        made.trunk[1] = nn.Conv2d(4, 32, 8, stride=4)
    return made


def milliseconds(first_layer: str, compiled: str, precision: str, samples: int, calls: int) -> float:
    """Return how long one variant takes."""
    images, random = Box(0, 255, (4, 84, 84), np.uint8), np.random.default_rng(0)
    actor_critic = ActorCritic(network(first_layer), None, images, Discrete(ACTIONS), precision=precision)  # type: ignore[arg-type]
    objective = Objective(actor_critic, ppo_losses, [])
    flat = FlatParameters(actor_critic.parameter_slices(), MOST_STATISTICS)
    gradients = Gradients(objective, flat, Compiler(print) if compiled == "compiled" else Eager())
    columns = [torch.as_tensor(random.normal(size=samples), dtype=torch.float32) for _ in range(4)]
    seen = torch.as_tensor(random.integers(256, size=(samples, *images.shape), dtype=np.uint8))
    batch = Batch._make([seen, torch.as_tensor(random.integers(ACTIONS, size=samples)), *columns, {}])
    coefficients = {
        name: torch.tensor(x) for name, x in (("clip_ratio", 0.1), ("entropy_coef", 0.01), ("value_coef", 0.5))
    }
    return median_milliseconds(lambda: gradients.add(batch, coefficients, frozenset(), 1.0, first=True), calls)


def median_milliseconds(call: Callable[[], object], calls: int) -> float:
    """Return the median CPU time over calls, after three warm-up calls."""
    taken = []
    for _ in range(3 + calls):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return 1e3 * statistics.median(taken[3:])


def operations(samples: int) -> float:
    """Return the number of operations of the layers, forward and backward, except the gradient of the images."""
    # Outputs x inputs of each layer, times how often it is applied to one image.
    first, *others = (20**2 * 32 * 256, 9**2 * 64 * 512, 7**2 * 64 * 576, 512 * 3136, (ACTIONS + 1) * 512)
    return samples * 2.0 * (2 * first + 3 * sum(others))


def operations_per_millisecond(precision: str, calls: int) -> float:
    """Return the median speed of a product of two square matrices."""
    size = 1024
    one, other = torch.randn((2, size, size)).to(getattr(torch, precision))
    return 2 * size**3 / median_milliseconds(lambda: one @ other, calls)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for variant in itertools.product(("plain", "space-to-depth"), ("eager", "compiled"), arguments.precisions):
        print(json.dumps({" ".join(variant): milliseconds(*variant, arguments.samples, arguments.calls)}), flush=True)
    for precision in arguments.precisions:
        least = operations(arguments.samples) / operations_per_millisecond(precision, arguments.calls)
        print(json.dumps({f"at the speed of a matrix product, {precision}": least}), flush=True)
