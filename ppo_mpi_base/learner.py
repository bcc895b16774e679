# SPDX-License-Identifier: MIT
"""One rank's optimizer steps: minibatches of a rollout, their gradients, the sum over ranks, and annealing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base import builders, health
from ppo_mpi_base.compilation import choose_compiler
from ppo_mpi_base.config import Config
from ppo_mpi_base.division import Undivided, choose_division
from ppo_mpi_base.flat_parameters import Adam, FlatParameters, clip_scale
from ppo_mpi_base.gradients import MOST_STATISTICS, Gradients, LossFunction, Objective, checked_names, origins_of_terms
from ppo_mpi_base.memory import keep_freed_memory
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.policies import ActorCritic, lacks_bfloat16
from ppo_mpi_base.reports import Reports
from ppo_mpi_base.rollout import Batch, Rollout, Shuffled, minibatch_order
from ppo_mpi_base.seeding import MINIBATCHES, generator
from ppo_mpi_base.threads import blas_code, share_cores

KL_TOLERANCE = 1.5
"""An update does not change the policy if its KL estimate exceeds this many times `target_kl`."""


class Learner:
    """A rank's share of training the networks. `ppo.PPO` shows the order in which its methods are called.

    Collective: build it on all ranks.

    Args:
        config: all keywords.
        ranks: those of the run.
        actor_critic: the networks; from here on, their parameters are views into `flat`.
        loss_fn: the losses and statistics of a minibatch.
        reports: receives timings, and messages for the user.

    Attributes:
        flat: all parameters and gradients.
        optimizer: Adam, with its moments and each slice's step count.
        learning_rates: slice name ("policy", "value") -> learning rate.
        coefficients: name -> 0-d tensor, for loss functions to read.
        division: which ranks train which network; known from the first update on.
        rollout: the rollout of the current updates.
        update: the minibatches of the current update.
        before_step: called with an update's statistics before its optimizer step: `Hooks.on_update`.
        stopped_by_kl: whether the KL stop has ended the policy's updates in this iteration.
    """

    def __init__(
        self, config: Config, ranks: Communicator, actor_critic: ActorCritic, loss_fn: LossFunction, reports: Reports
    ) -> None:
        self.config, self.ranks, self.actor_critic, self.reports = config, ranks, actor_critic, reports
        device = actor_critic.device
        self.coefficients = {name: torch.tensor(x, device=device) for name, x in config.coefficients.items()}
        self.objective = Objective(actor_critic, loss_fn, config.hooks)
        self.flat = FlatParameters(actor_critic.parameter_slices(), statistics=MOST_STATISTICS)
        share_cores(ranks, len(self.flat.data))
        self.flat.blas_is_one = len(set(ranks.gather_all(blas_code()))) == 1
        keep_freed_memory()
        if config.precision == "bfloat16" and lacks_bfloat16(device):
            reports.tell("precision: this processor has no bfloat16 instructions; float32 would be faster")
        compiler = choose_compiler(config, actor_critic.observation_space, device, ranks.size, reports.tell)
        self.gradients = Gradients(self.objective, self.flat, compiler)
        self.optimizer = Adam(self.flat, config.adam_epsilon)
        self.division = Undivided(ranks)
        self.shuffled = Shuffled(config.minibatch_size)
        self.learning_rates = {"policy": config.pi_lr, "value": config.vf_lr}
        self.gradient_limits = {"policy": config.pi_grad_clip, "value": config.v_grad_clip}
        self.epochs = {"policy": config.train_pi_epochs, "value": config.train_v_epochs}
        self.before_step: list[Callable[[dict[str, float]], None]] = []
        self.idle: frozenset[str] = frozenset()
        self.stopped_by_kl = self.not_finite = False
        self.loss_names: list[str] = []
        self.statistic_names: list[str] = []
        self._epoch_statistics: list[dict[str, float]] = []

    def broadcast_parameters(self) -> None:
        """Give all ranks rank 0's parameters and buffers. Collective: call on all ranks."""
        self._broadcast([self.flat.data, *self.not_trained()])

    def broadcast_buffers(self) -> None:
        """Give all ranks rank 0's network buffers, such as running means. Collective: call on all ranks."""
        self._broadcast(self.actor_critic.network_buffers() if self.ranks.size > 1 else ())

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            array = tensor.cpu().contiguous().numpy()
            self.ranks.broadcast_(array)
            tensor.copy_(torch.as_tensor(array))

    def not_trained(self) -> list[Tensor]:
        """Return the networks' buffers and frozen parameters, which no gradient reaches."""
        frozen = [parameter.data for parameter in self.actor_critic.parameters() if not parameter.requires_grad]
        return [*frozen, *self.actor_critic.buffers()]

    def updates(self, rollout: Rollout) -> Iterator[list[Batch]]:
        """Yield the minibatches of each update, over all epochs or until the KL stop ends them.

        An update consists of `grad_accum` minibatches; the last one of an epoch has what is left. The first `backward`
        of an update overwrites the flat gradient, later ones add to it.
        """
        config, n = self.config, self.config.environments_per_rank
        samples = rollout.samples()
        self._know_losses(samples.split(config.minibatch_size)[0])  # first: errors are raised before any delay
        epochs = range(max(self.epochs[name] for name in self.flat.slices))
        if rollout.total_steps <= config.delay_training_for_steps or not epochs:
            return
        self.rollout = rollout
        first, iteration = self.ranks.rank * n, rollout.iteration  # keys are global, over all ranks
        generators = [generator(config.seed, MINIBATCHES, first + i, iteration) for i in range(n)]
        between = generator(config.seed, MINIBATCHES, first, iteration, 1)
        self.stopped_by_kl = False
        orders = (minibatch_order(config.rollout_length_per_worker, generators, between) for _ in epochs)
        for name in self.division.idle:  # may hold old gradients of other ranks, which no update overwrites
            self.flat.gradient[self.flat.slices[name]].zero_()
        shared = self.division.share(samples, orders, config.minibatch_size, self.reports.seconds)
        for epoch, batches in zip(epochs, self.shuffled.epochs(*shared), strict=True):
            if self._over(self._idle(epoch)):
                return
            self._epoch_statistics = []
            for start in range(0, len(batches), config.grad_accum):
                idle = self._idle(epoch)
                if self._over(idle):
                    return
                self.idle = idle
                update = batches[start : start + config.grad_accum]
                self.begin_update(update)
                yield update
                if self.not_finite:  # stop now, while this update's samples are still in memory
                    return

    def _idle(self, epoch: int) -> frozenset[str]:
        """Return the slices that are done for this iteration: their epochs are over, or the KL stopped the policy."""
        over = {name for name in self.flat.slices if epoch >= self.epochs[name]}
        return frozenset(over | {"policy"} if self.stopped_by_kl else over)

    def _know_losses(self, batch: Batch) -> None:
        """On the first call, get the names of losses and statistics, check them, and divide them among ranks."""
        if self.loss_names:
            return
        terms = self.objective, batch, self.coefficients
        names = builders.checked_together(self.ranks, lambda: checked_names(*terms, self.config))
        self.loss_names, self.statistic_names = names
        self.objective.known = self.statistic_names
        self.division = choose_division(
            self.config,
            self.ranks,
            self.actor_critic,
            self.flat,
            self.loss_names,
            lambda: origins_of_terms(*terms),
            self.reports.tell,
        )
        self.gradients.leave_to_others(self.division.idle, self.division.others)
        self.shuffled = Shuffled(self.division.minibatch_size(self.config.minibatch_size))

    def _over(self, idle: frozenset[str]) -> bool:
        """Return whether nothing is left to train: all slices are idle, or the names of all losses are."""
        return idle.issuperset(self.flat.slices) or idle.issuperset(self.loss_names)

    def begin_update(self, update: list[Batch]) -> None:
        """Begin an update on these minibatches, with the next `backward`."""
        self.update, self._first = update, True
        samples = sum(batch.advantages.shape[0] for batch in update)
        self._per_sample = 1 / (samples * self.division.team.size)

    def backward(self, minibatch: Batch) -> None:
        """Add this rank's share of a minibatch's mean gradient and statistics to the update's flat message."""
        started = time.perf_counter()
        weight = minibatch.advantages.shape[0] * self._per_sample
        self.gradients.add(minibatch, self.coefficients, self.idle, weight, self._first)
        self._first = False
        self.reports.seconds["learning"] += time.perf_counter() - started

    def allreduce(self) -> dict[str, float]:
        """Sum gradient and statistics over the ranks that train the same, in one message; return their statistics.

        Collective: call on all ranks.
        """
        flat, started = self.flat, time.perf_counter()
        flat.to_host()  # a device with its own memory must first finish the gradient
        there = time.perf_counter()
        self.division.team.sum_(flat.host)
        summed = time.perf_counter()
        self.reports.messages.append(summed - there)
        if self.division.team.size > 1:
            flat.from_host()
        self.reports.seconds["learning"] += there - started + time.perf_counter() - summed
        found = zip(self.statistic_names, flat.host[len(flat.data) :].tolist(), strict=False)
        return {name: x for name, x in found if name not in self.division.others}

    def step(self, statistics: dict[str, float]) -> None:
        """Apply the reduced gradient: KL stop, clipping by norm and Adam for each slice. All ranks decide alike.

        Raises:
            TrainingError: a gradient or statistic is not finite; it has changed no parameter. If ranks divide the
                networks, all raise it at the iteration's end, after the other network's updates.
        """
        started = time.perf_counter()
        limit = KL_TOLERANCE * self.config.target_kl
        if limit > 0 and statistics["kl"] > limit:
            self.stopped_by_kl = True
        names = self.moving()
        norms = {name: self.flat.norm(name) for name in names}
        self._epoch_statistics.append({**statistics, **{f"gradient_norm_{name}": x for name, x in norms.items()}})
        if not all(map(math.isfinite, (*norms.values(), *statistics.values()))):
            self.not_finite = True
            if not self.division.idle:
                health.raise_not_finite(self)
            return  # the ranks that train the other network do not know yet
        self._call_hooks(names, statistics)
        scales = {name: clip_scale(norms[name], self.gradient_limits[name]) for name in names}
        self.optimizer.step({name: self.learning_rates[name] for name in names}, scales)
        self.reports.seconds["learning"] += time.perf_counter() - started

    def _call_hooks(self, names: list[str], statistics: dict[str, float]) -> None:
        """Let hooks change rates and coefficients before a step of these slices, if there are any."""
        if not (self.before_step and names):
            return
        for call in self.before_step:
            call(dict(statistics))
            health.check_rates_and_coefficients(self)
        self.gradients.check_again()

    def moving(self) -> list[str]:
        """Return the slices that this rank's update changes: not idle, not other ranks', not stopped by the KL."""
        resting = self.idle | self.division.idle | ({"policy"} if self.stopped_by_kl else set())
        return [name for name in self.flat.slices if name not in resting]

    def bring_together(self) -> dict[str, float]:
        """Get what other ranks have trained; return the last epoch's mean losses and statistics.

        Collective: call on all ranks.
        """
        last_epoch = self._epoch_statistics
        if not last_epoch:
            return {}
        if self.division.idle and self.ranks.max(float(self.not_finite)) > 0:
            health.raise_not_finite(self)
        names = [*self.statistic_names, *(f"gradient_norm_{name}" for name in self.flat.slices)]
        each = [[update[name] for update in last_epoch if name in update] for name in names]
        mine = np.array([sum(found) / len(found) if found else math.nan for found in each])
        means = self.division.bring_together(self.flat, self.optimizer, mine, self.reports.seconds)
        return dict(zip(names, means.tolist(), strict=True))

    def anneal(self, total_steps: int) -> None:
        """Set annealed values for the next iteration: they fall linearly to 0 with the steps over all ranks."""
        left = max(0.0, 1 - total_steps / self.config.total_steps)
        first = self.config.coefficients
        if self.config.anneal_lr:
            self.learning_rates = {"policy": self.config.pi_lr * left, "value": self.config.vf_lr * left}
        if self.config.anneal_clip_ratio:
            self.coefficients["clip_ratio"].fill_(first["clip_ratio"] * left)
        if self.config.anneal_entropy_coef:
            self.coefficients["entropy_coef"].fill_(first["entropy_coef"] * left)
