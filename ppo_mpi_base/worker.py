# SPDX-License-Identifier: MIT
"""One rank of a run: its environments and networks, its rollouts, its minibatches and its optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base import builders, health
from ppo_mpi_base.checkpoint import Checkpoints
from ppo_mpi_base.collector import Collector
from ppo_mpi_base.compilation import choose_compiler
from ppo_mpi_base.config import Config
from ppo_mpi_base.division import Undivided, choose_division
from ppo_mpi_base.flat_parameters import Adam, FlatParameters, clip_scale
from ppo_mpi_base.gradients import MOST_STATISTICS, Gradients, LossFunction, Objective, checked_names, origins_of_terms
from ppo_mpi_base.interruption import Interruption
from ppo_mpi_base.memory import keep_freed_memory
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.normalize import RewardNormalizer, RunningMoments
from ppo_mpi_base.periodic_evaluation import PeriodicEvaluation
from ppo_mpi_base.policies import lacks_bfloat16
from ppo_mpi_base.reports import Reports
from ppo_mpi_base.rollout import Batch, Rollout, Shuffled, explained_variance, minibatch_order
from ppo_mpi_base.saved_policy import save_policy
from ppo_mpi_base.seeding import MINIBATCHES, generator, seed_torch
from ppo_mpi_base.storage import Storage
from ppo_mpi_base.threads import blas_code, share_cores

KL_TOLERANCE = 1.5
"""An update is not applied where the KL estimate exceeds this many times `target_kl`."""

SAVE_EVERY = 10
"""Iterations between two writings of the latest networks."""
COMPARE_EVERY = 10
"""Iterations between two comparisons of the parameters over ranks."""
SAVE, END, INTERRUPT = 1.0, 2.0, 3.0
"""What a rank wants after an iteration: a checkpoint, the end of the run, its end as one to be continued."""


@dataclass(frozen=True)
class Result:
    """How a run went.

    Attributes:
        total_steps: agent steps over all ranks.
        best_return, last_return: the highest and the last mean return of 100 training episodes, or of all where there
            were fewer; NaN without an episode.
        save_location: the directory of the networks, for `load_policy`; None if nothing was saved.
        learning_curve: the picture that rank 0 drew.
    """

    total_steps: int
    best_return: float
    last_return: float
    save_location: str | None
    learning_curve: str


class Worker:
    """A rank's share of the work. `ppo.PPO` says in which order its methods are called.

    Attributes:
        config: all keywords.
        ranks: the collectives, and this rank's number.
        actor_critic: the networks, whose parameters are views into `flat`.
        total_steps, iteration: agent steps over all ranks, and iterations, so far.
        steps_per_iteration: agent steps over all ranks.
        over: whether no iteration follows: `total_steps` are done, or `end` was called, or the run was interrupted.
        interrupted: whether a signal or `max_seconds` ends the run before its time, so that it should be continued.
        learning_rates: slice name ("policy", "value") -> learning rate; hooks may change it between iterations.
        division: which ranks train which network; known from the first update on.
        coefficients: name -> 0-d tensor, what loss functions read; hooks may `fill_` them between iterations.
        reports: the last 100 episodes and where the time goes.
    """

    def __init__(
        self,
        config: Config,
        ranks: Communicator,
        loss_fn: LossFunction,
        interruption: Interruption,
        held: ExitStack,
    ) -> None:
        self.config, self.ranks, self.interruption = config, ranks, interruption
        self.first_global_index = ranks.rank * config.environments_per_rank
        together = builders.checked_together
        self.device = together(ranks, lambda: builders.choose_device(config, ranks))
        self.environments = together(ranks, lambda: builders.build_environments(config, ranks))
        together(ranks, lambda: builders.check_equal_spaces(self.environments, ranks))
        self.actor_critic = together(ranks, lambda: builders.build_networks(config, self.environments, self.device))
        together(ranks, lambda: builders.check_equal_networks(self.actor_critic, ranks))
        self.coefficients = {name: torch.tensor(x, device=self.device) for name, x in config.coefficients.items()}
        self.reports = together(ranks, lambda: Reports(config, ranks, held))
        self.evaluations = PeriodicEvaluation(config, self.actor_critic, ranks, interruption, self.reports.tell)
        self.checkpoints = Checkpoints(
            config.save_location, ranks, config.checkpoint_seconds, self.reports.tell_failure
        )
        self.iteration = self.total_steps = 0
        self.steps_per_iteration = config.samples_per_rank * ranks.size
        self.interrupted = False
        self._wanted = 0.0
        self._external_loss: float | None = None
        self._prepare_updates(loss_fn)
        self._prepare_rollouts()
        self._begin()

    def _prepare_updates(self, loss_fn: LossFunction) -> None:
        """Make what gradients and optimizer steps need. Collective: call on all ranks."""
        config, ranks = self.config, self.ranks
        self.objective = Objective(self.actor_critic, loss_fn, config.hooks)
        self.flat = FlatParameters(self.actor_critic.parameter_slices(), statistics=MOST_STATISTICS)
        share_cores(ranks, len(self.flat.data))
        self.flat.blas_is_one = len(set(ranks.gather_all(blas_code()))) == 1
        keep_freed_memory()
        if config.precision == "bfloat16" and lacks_bfloat16(self.device):
            self.reports.tell("precision: this processor has no bfloat16 instructions; float32 would be faster")
        space = self.environments.observation_space
        compiler = choose_compiler(config, space, self.device, ranks.size, self.reports.tell)
        self.gradients = Gradients(self.objective, self.flat, compiler)
        self.optimizer = Adam(self.flat, config.adam_epsilon)
        self.division = Undivided(ranks)
        self.shuffled = Shuffled(config.minibatch_size)
        self.learning_rates = {"policy": config.pi_lr, "value": config.vf_lr}
        self.gradient_limits = {"policy": config.pi_grad_clip, "value": config.v_grad_clip}
        self.epochs = {"policy": config.train_pi_epochs, "value": config.train_v_epochs}
        self.idle: frozenset[str] = frozenset()
        self.stopped_by_kl = self.not_finite = False
        self.loss_names: list[str] = []
        self.statistic_names: list[str] = []
        self._epoch_statistics: list[dict[str, float]] = []

    def _prepare_rollouts(self) -> None:
        """Make what stepping the environments needs."""
        config, n = self.config, self.config.environments_per_rank
        spaces = self.environments.observation_space, self.environments.action_space
        self.storage = Storage(config.rollout_length_per_worker, n, *spaces)
        self.collector = Collector(
            config,
            self.environments,
            self.actor_critic,
            self.gradients.act,
            self.storage,
            self.reports,
            self.first_global_index,
        )
        self.observation_moments = RunningMoments(spaces[0].shape or ())
        self.reward_normalizer = RewardNormalizer(n, config.gamma)

    def _begin(self) -> None:
        """Begin the run, or go on from its checkpoint. Collective: call on all ranks."""
        config, ranks, together = self.config, self.ranks, builders.checked_together
        self.broadcast_parameters()
        for hook in config.hooks:
            hook.on_start(self)
        together(ranks, lambda: health.check_states(config.hooks))
        # Networks were built from equal random numbers; from here on each rank draws its own.
        seed_torch(config.seed, self.first_global_index)
        if not (config.resume == "auto" and self.checkpoints.restore(self)):
            self.checkpoints.begin_anew()
            self.environments.reset(self.storage.observations[0])
        together(ranks, lambda: self.reports.open(self.total_steps or None))
        self.over = self.total_steps >= config.total_steps
        if self.over:
            self.reports.tell(f"nothing is left to train: total_steps={config.total_steps:,} are done")

    def broadcast_parameters(self) -> None:
        """Give all ranks rank 0's parameters and buffers. Collective: call on all ranks."""
        self._broadcast([self.flat.data, *self.not_trained()])

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            array = tensor.cpu().contiguous().numpy()
            self.ranks.broadcast_(array)
            tensor.copy_(torch.as_tensor(array))

    def not_trained(self) -> list[Tensor]:
        """Return the networks' buffers and frozen parameters, which no gradient reaches."""
        frozen = [parameter.data for parameter in self.actor_critic.parameters() if not parameter.requires_grad]
        return [*frozen, *self.actor_critic.buffers()]

    def rollout(self) -> Rollout:
        """Step the N environments T times by the current policy; return it with values and log-probabilities.

        Reward moments are updated here; those of observations at the iteration's end, so that all of it sees the same.
        Collective: call on all ranks.

        Raises:
            TrainingError: an observation or a reward is not finite, on any rank.
        """
        config, storage = self.config, self.storage
        self.gradients.begin_rollout()
        self.collector.collect(self.iteration)
        builders.checked_together(self.ranks, lambda: health.check_finite(self))
        self.total_steps += self.steps_per_iteration

        rewards = np.sign(storage.rewards) if config.clip_rewards else storage.rewards
        on_device = torch.as_tensor(rewards, dtype=torch.get_default_dtype(), device=self.device)
        rollout = self.collector.evaluated(on_device)
        if config.normalize_rewards:
            scaled = self.reward_normalizer.normalize(rollout.rewards.double().cpu().numpy(), storage.done, self.ranks)
            rollout.rewards.copy_(torch.as_tensor(scaled))
        for hook in config.hooks:
            hook.on_rollout(self, rollout)
        health.check_hooked(self, rollout)
        if self.reports.worth_saving and config.save_location is not None and self.ranks.is_root:
            # Now, not after the update: these are the networks that earned the score.
            self._save_policy("best")
        if config.external_update_callback is not None:
            self._external_loss = config.external_update_callback()
        return rollout

    def standardize(self, advantages: Tensor) -> Tensor:
        """Return advantages (T, N) shifted to mean 0 and scaled to standard deviation 1 over ALL ranks.

        Collective: call on all ranks.
        """
        values = advantages.double()
        sums = np.array([values.numel(), values.sum().item()])
        self.ranks.sum_(sums)
        mean = sums[1] / sums[0]
        squares = np.array([(values - mean).square().sum().item()])
        self.ranks.sum_(squares)
        std = math.sqrt(squares[0] / sums[0])
        return ((values - mean) / (std + 1e-8)).to(advantages.dtype)

    def updates(self, rollout: Rollout) -> Iterator[list[Batch]]:
        """Yield the minibatches of each update: all epochs, until the KL stop has ended them.

        An update is made of `grad_accum` minibatches; the last of an epoch of what is left.
        """
        config, n = self.config, self.config.environments_per_rank
        if self.total_steps <= config.delay_training_for_steps:
            return
        first = self.first_global_index
        generators = [generator(config.seed, MINIBATCHES, first + i, self.iteration) for i in range(n)]
        between = generator(config.seed, MINIBATCHES, first, self.iteration, 1)
        self.stopped_by_kl = False
        samples = rollout.samples()
        self._know_losses(samples.split(config.minibatch_size)[0])
        epochs = range(max(self.epochs[name] for name in self.flat.slices))
        orders = (minibatch_order(config.rollout_length_per_worker, generators, between) for _ in epochs)
        shared = self.division.share(samples, orders, config.minibatch_size, self.reports.seconds)
        for epoch, batches in zip(epochs, self.shuffled.epochs(*shared), strict=True):
            if self.not_finite or self._over(self._idle(epoch)):
                return
            self._epoch_statistics = []
            for start in range(0, len(batches), config.grad_accum):
                idle = self._idle(epoch)
                if self.not_finite or self._over(idle):
                    return
                self.idle = idle
                update = batches[start : start + config.grad_accum]
                self._begin_update(update)
                yield update

    def _idle(self, epoch: int) -> frozenset[str]:
        """Return the slices that are done for this iteration: their epochs are over, or the policy went far enough."""
        over = {name for name in self.flat.slices if epoch >= self.epochs[name]}
        return frozenset(over | {"policy"} if self.stopped_by_kl else over)

    def _know_losses(self, batch: Batch) -> None:
        """Learn what losses and statistics are called, check them, and share them among ranks, the first time."""
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
        """Return whether nothing is left to train: no slice, or no loss for those that are."""
        return idle.issuperset(self.flat.slices) or idle.issuperset(self.loss_names)

    def _begin_update(self, update: list[Batch]) -> None:
        self.update = update
        self.flat.message.zero_()
        samples = sum(batch.advantages.shape[0] for batch in update)
        self._per_sample = 1 / (samples * self.division.team.size)

    def backward(self, minibatch: Batch) -> None:
        """Add this rank's share of a minibatch's mean gradient and statistics to the flat message."""
        started = time.perf_counter()
        weight = minibatch.advantages.shape[0] * self._per_sample
        self.gradients.add(minibatch, self.coefficients, self.idle, weight)
        self.reports.seconds["learning"] += time.perf_counter() - started

    def allreduce(self) -> dict[str, float]:
        """Sum gradient and statistics over the ranks that train the same in one message, and return their statistics.

        Collective: call on all ranks.
        """
        flat, started = self.flat, time.perf_counter()
        flat.to_host()  # waits for a device of its own to finish the gradient
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
            TrainingError: the gradient is not finite; no parameter has changed. Where ranks divide the networks, it is
                raised at the iteration's end, on all of them.
        """
        started = time.perf_counter()
        limit = KL_TOLERANCE * self.config.target_kl
        if limit > 0 and statistics["kl"] > limit:
            self.stopped_by_kl = True
        resting = self.idle | self.division.idle
        names = [n for n in self.flat.slices if n not in resting and not (n == "policy" and self.stopped_by_kl)]
        norms = {name: self.flat.norm(name) for name in names}
        self._epoch_statistics.append({**statistics, **{f"gradient_norm_{name}": x for name, x in norms.items()}})
        if not all(map(math.isfinite, (*norms.values(), *statistics.values()))):
            self.not_finite = True
            if not self.division.idle:
                health.raise_not_finite(self)
            return  # the ranks that train the other network do not know yet
        scales = {name: clip_scale(norms[name], self.gradient_limits[name]) for name in names}
        self.optimizer.step({name: self.learning_rates[name] for name in names}, scales)
        self.reports.seconds["learning"] += time.perf_counter() - started

    def finish_iteration(self, rollout: Rollout) -> None:
        """Update normalization and schedules, evaluate, run hooks, write files. Collective: call on all ranks."""
        config = self.config
        means = self._bring_together()
        self.iteration += 1
        if config.normalize_observations:
            seen = rollout.observations.flatten(0, 1).cpu().numpy()  # as a callback or a hook has left them
            self.observation_moments.update(seen, self.ranks)
            self.actor_critic.set_observation_moments(self.observation_moments.mean, self.observation_moments.std)
        # Of what networks note in buffers, as running means do, each rank has its own: from here on it is rank 0's.
        self._broadcast(self.actor_critic.network_buffers() if self.ranks.size > 1 else ())
        before = self.total_steps - self.steps_per_iteration
        evaluation = self.evaluations.columns(before, self.total_steps)  # first: the row's times count it
        row = {**self._row(rollout, means), **evaluation}
        self.anneal()
        for hook in config.hooks:
            hook.on_iteration(self, row)
        health.check_rates_and_coefficients(self)
        health.check_attached(self)
        health.check_row(self, row)
        self.reports.write(row)
        to_save = self._agree_on_the_end()
        if config.save_location is not None and self.ranks.is_root and (self.over or self.iteration % SAVE_EVERY == 0):
            self._save_policy("latest")
        self.storage.start_next()
        if self.iteration % COMPARE_EVERY == 0:
            health.check_in_step(self)
        if to_save:
            self.checkpoints.save(self)

    def end(self) -> None:
        """End the run after this iteration, on all ranks, as if `total_steps` were done: for hooks, on any rank."""
        self._wanted = END

    def _agree_on_the_end(self) -> bool:
        """Set `over` and `interrupted` alike on all ranks, and return whether it is time for a checkpoint."""
        due = SAVE if self.ranks.is_root and self.checkpoints.due else 0.0
        wanted = self.ranks.max(INTERRUPT if self.interruption.requested else max(self._wanted, due))
        done = self.total_steps >= self.config.total_steps
        self.interrupted = wanted == INTERRUPT and not done
        self.over = done or wanted >= END
        if wanted == END and not done:
            self.reports.tell(f"ended by a hook at {self.total_steps:,} steps")
        return self.over or wanted == SAVE

    def _save_policy(self, which: Literal["best", "latest"]) -> None:
        earned = self.reports.episode_return
        try:
            save_policy(self.config, which, self.actor_critic, self.total_steps, earned)
        except OSError as error:
            self.reports.tell_failure(f"{which} networks could not be saved ({error.strerror}): training goes on")
            return
        if which == "best":
            self.reports.saved_return = earned

    def anneal(self) -> None:
        """Set what falls linearly to 0 with the steps over all ranks, for the next iteration."""
        left = max(0.0, 1 - self.total_steps / self.config.total_steps)
        first = self.config.coefficients
        if self.config.anneal_lr:
            self.learning_rates = {"policy": self.config.pi_lr * left, "value": self.config.vf_lr * left}
        if self.config.anneal_clip_ratio:
            self.coefficients["clip_ratio"].fill_(first["clip_ratio"] * left)
        if self.config.anneal_entropy_coef:
            self.coefficients["entropy_coef"].fill_(first["entropy_coef"] * left)

    def _bring_together(self) -> dict[str, float]:
        """Take what other ranks have trained; return the last epoch's mean losses and statistics. Collective."""
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

    def _row(self, rollout: Rollout, means: dict[str, float]) -> dict[str, float]:
        """Return the iteration's row of the logs, equal on all ranks; `means` are those of losses and statistics."""
        row = {
            "total_steps": self.total_steps,
            "iteration": self.iteration,
            **self.reports.episodes_row(),
            **means,
            "explained_variance": explained_variance(rollout.values, rollout.returns, self.ranks),
            **{f"learning_rate_{name}": self.learning_rates[name] for name in self.flat.slices},
            **{f"coefficient_{name}": x.item() for name, x in self.coefficients.items()},
            **self.reports.times_row(self.total_steps, self.division.team),
        }
        if self.config.external_update_callback is not None:
            returned = [float(loss) for loss in self.ranks.gather_all(self._external_loss) if loss is not None]
            if returned:
                row["external_loss"] = sum(returned) / len(returned)
        return row

    def result(self) -> Result:
        """Close what the run opened, and return how it went. Collective: call on all ranks."""
        for hook in self.config.hooks:
            hook.on_end(self)
        curve = self.reports.finish(self.config.save_location)
        reports = self.reports
        return Result(
            self.total_steps, reports.best_return, reports.episode_return, self.config.save_location, str(curve)
        )
