# SPDX-License-Identifier: MIT
"""How close gradients in bfloat16 are to those in float32: `mpiexec -n 2 python -m benchmarks.gradient_precision`.

Pong is trained in bfloat16 as in `benchmarks.precision`. At the end of some iterations, rank 0 computes the gradients
of its minibatches in both precisions, uncompiled. Their cosine is shown next to that of two minibatches' gradients in
float32: if it is much closer to 1, training cannot tell the difference from chance.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.precision import HERE, PRECISIONS, EndEarly, keywords
from benchmarks.results import write
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.ppo import PPO, ppo_losses
from ppo_mpi_base.rollout import Batch, Rollout
from ppo_mpi_base.worker import Worker


def gradient(actor_critic: ActorCritic, batch: Batch, coefficients: dict[str, Tensor], precision: str) -> Tensor:
    """Return the gradient of PPO's losses in a given precision, (P,) float32."""
    parameters = [parameter for parameter in actor_critic.parameters() if parameter.requires_grad]
    trained_in = actor_critic.precision
    actor_critic.precision = precision  # type: ignore[assignment]
    try:
        losses, _ = ppo_losses(actor_critic, batch, coefficients)
    finally:
        actor_critic.precision = trained_in
    parts = torch.autograd.grad(torch.stack(list(losses.values())).sum(), parameters)
    return torch.cat([part.reshape(-1) for part in parts])


class CompareGradients(Hooks):
    """Records on rank 0, every `every` steps, the gradients' cosines and the ratio of their norms."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[tuple[float, ...]] = []

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Keep the rollout: its advantages come later."""
        self.rollout = rollout

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Compare the gradients when due."""
        if worker.ranks.is_root and worker.total_steps >= self.every * (len(self.rows) + 1):
            self.rows.append((worker.total_steps, *self._compare(worker)))

    def _compare(self, worker: Worker) -> tuple[float, float, float]:
        batches = self.rollout.samples().split(worker.config.minibatch_size)
        exact, rounded = (
            [gradient(worker.actor_critic, batch, worker.coefficients, precision) for batch in batches]
            for precision in PRECISIONS
        )
        same = [cosine_similarity(a, b, 0).item() for a, b in zip(exact, rounded, strict=True)]
        others = [cosine_similarity(a, b, 0).item() for a, b in itertools.combinations(exact, 2)]
        lengths = [(b.norm() / a.norm()).item() for a, b in zip(exact, rounded, strict=True)]
        return float(np.mean(same)), float(np.mean(others)), float(np.mean(lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--every", type=int, default=50_000)
    arguments = parser.parse_args()
    compared = CompareGradients(arguments.every)
    with tempfile.TemporaryDirectory() as directory:
        PPO(**{**keywords("bfloat16", 0, directory), "resume": False}, hooks=[compared, EndEarly(arguments.steps)])
    if world().is_root:
        table = [[str(int(steps)), *(f"{x:.3f}" for x in numbers)] for steps, *numbers in compared.rows]
        write(HERE / "gradients.csv", [["steps", "cosine", "cosine_of_two_minibatches", "ratio_of_norms"], *table])


if __name__ == "__main__":
    main()
