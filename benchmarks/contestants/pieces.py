# SPDX-License-Identifier: MIT
"""What the pieces of an iteration cost, for cost_model.py: `mpiexec -n 2 python -m benchmarks.contestants.pieces`."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count, cycle

import numpy as np
import torch

from benchmarks.contestants.ours import Setting, keywords, seconds_per_message
from ppo_mpi_base.config import Config
from ppo_mpi_base.learner import Learner
from ppo_mpi_base.mpi import world
from ppo_mpi_base.ppo import ppo_losses
from ppo_mpi_base.rollout import Batch, Rollout, gae, minibatch_order
from ppo_mpi_base.training import training
from ppo_mpi_base.worker import Worker

ITERATIONS = 20


def microseconds(piece: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, after ten warm-up calls."""
    for _ in range(10):
        piece()
    taken, end = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        piece()
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken)


def pieces(worker: Worker, seconds: float) -> dict[str, float]:
    """Return what a rank's pieces cost in microseconds, each called in its own loop."""
    config = worker.config
    rollout = worker.rollout()
    rollout.advantages, rollout.returns = gae(rollout, config.gamma, config.lam)
    update = next(worker.learner.updates(rollout))
    worker.learner.backward(update[0])
    reduced = worker.learner.allreduce()
    worker.learner.step(reduced)

    n, samples = config.environments_per_rank, config.rollout_length_per_worker * config.environments_per_rank
    observations, noise = rollout.observations[0], torch.zeros_like(rollout.actions[0])
    acted = torch.zeros_like(noise), torch.zeros_like(noise)
    actions, out = cycle(rollout.actions.clamp(-1, 1).numpy().copy()), np.empty_like(worker.storage.observations[0])
    generators = [np.random.default_rng(i) for i in range(n)]
    drawn = (minibatch_order(config.rollout_length_per_worker, generators, generators[0]) for _ in count())
    shared, (order,) = share(worker, rollout, next(drawn))
    epochs = worker.learner.shuffled.epochs(shared, (order for _ in drawn))

    inference = microseconds(lambda: worker.learner.gradients.act(observations, noise, acted), seconds)
    return {
        "inference": inference,
        "iteration": statistics.median(between_updates(worker, inference, next(drawn)) for _ in range(ITERATIONS)),
        "environments": microseconds(lambda: worker.environments.step(next(actions), out), seconds),
        "minibatch": microseconds(lambda: gradient(worker.learner, update), seconds),
        "shuffle": microseconds(lambda: next(epochs), seconds) / samples,  # per sample
        "message": 1e6 * seconds_per_message(worker, worker.learner.division.team),
        "optimizer": microseconds(lambda: worker.learner.step(reduced), seconds),  # last, because it ruins the networks
        "message_bytes": worker.flat.message.numel() * worker.flat.message.element_size(),
        "parameters": worker.flat.data.numel(),
    }


def gradient(learner: Learner, update: list[Batch]) -> None:
    """Compute the gradient of an update's first minibatch, as training does."""
    learner.begin_update(update)
    learner.backward(update[0])


def share(worker: Worker, rollout: Rollout, order: np.ndarray) -> tuple[Batch, list[np.ndarray]]:
    """Return samples and order of this rank and its partner. Collective: call on all ranks."""
    division, size, seconds = worker.learner.division, worker.config.minibatch_size, worker.reports.seconds
    samples, orders = division.share(rollout.samples(), [order], size, seconds)
    return samples, list(orders)


def between_updates(worker: Worker, inference: float, order: np.ndarray) -> float:
    """Return the microseconds of an iteration without updates, steps and acting: values, advantages, exchanges, logs.

    Collective: call on all ranks.
    """
    config, started = worker.config, time.perf_counter()
    rollout = worker.rollout()
    rollout.advantages, rollout.returns = gae(rollout, config.gamma, config.lam)
    worker.standardize(rollout.advantages)
    share(worker, rollout, order)
    stepping = worker.reports.seconds["environments"]
    worker.finish_iteration(rollout)
    return 1e6 * (time.perf_counter() - started - stepping) - config.rollout_length_per_worker * inference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--minibatch", type=int, required=True)
    parser.add_argument("--undivided", action="store_true", help="both ranks train both networks")
    parser.add_argument("--seconds", type=float, default=2, help="seconds a piece")
    arguments = parser.parse_args()
    setting = Setting(arguments.environments, arguments.length, arguments.minibatch, epochs=1)
    with tempfile.TemporaryDirectory() as directory:
        config = Config(**keywords(setting, directory, divide=not arguments.undivided))  # type: ignore[arg-type]
        with training(config, ppo_losses) as worker:
            found = pieces(worker, arguments.seconds)
    if world().is_root:
        print(json.dumps(found), flush=True)
