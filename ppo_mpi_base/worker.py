# SPDX-License-Identifier: MIT
"""One rank of a run: its environments and networks, its rollouts, and the end of each iteration."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base import builders, health
from ppo_mpi_base.checkpoint import Checkpoints
from ppo_mpi_base.collector import Collector
from ppo_mpi_base.config import Config
from ppo_mpi_base.gradients import LossFunction
from ppo_mpi_base.interruption import Interruption
from ppo_mpi_base.learner import Learner
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.normalize import RewardNormalizer, RunningMoments
from ppo_mpi_base.periodic_evaluation import PeriodicEvaluation
from ppo_mpi_base.reports import Reports
from ppo_mpi_base.rollout import Rollout, explained_variance
from ppo_mpi_base.saved_policy import save_policy
from ppo_mpi_base.seeding import seed_torch
from ppo_mpi_base.storage import Storage

SAVE_EVERY = 10
"""Iterations between saves of the latest networks."""
COMPARE_EVERY = 10
"""Iterations between checks that parameters agree over ranks, and that hooks' states keep their shapes and dtypes."""
SAVE, END, INTERRUPT = 1.0, 2.0, 3.0
"""What a rank requests after an iteration: a checkpoint, the run's end, or its interruption, to continue later."""


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        total_steps: agent steps over all ranks.
        best_return, last_return: the highest and the last mean return over 100 training episodes, or over all if there
            were fewer; NaN without an episode.
        save_location: the directory of the networks, for `load_policy`; None if nothing was saved.
        learning_curve: path of the picture that rank 0 drew.
    """

    total_steps: int
    best_return: float
    last_return: float
    save_location: str | None
    learning_curve: str


class Worker:
    """A rank's share of the work. `ppo.PPO` shows the order in which its methods are called.

    Attributes:
        config: all keywords.
        ranks: the collective operations, and this rank's number.
        actor_critic: the networks.
        learner: trains them.
        flat: their parameters and gradients.
        total_steps, iteration: agent steps over all ranks, and iterations, so far.
        steps_per_iteration: agent steps over all ranks.
        hook_states: shapes and dtypes of the hooks' states.
        over: whether no iteration follows: `total_steps` are done, `end` was called, or the run was interrupted.
        interrupted: whether a signal or `max_seconds` ends the run early, so that it should be continued.
        reports: the last 100 episodes, and how the time is spent.
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
        self.learner = Learner(config, ranks, self.actor_critic, loss_fn, self.reports)
        self.learner.before_step = [partial(hook.on_update, self) for hook in config.hooks if hook.has("on_update")]
        self.flat = self.learner.flat
        self._prepare_rollouts()
        self._begin()

    def _prepare_rollouts(self) -> None:
        """Build what is needed to step the environments."""
        config, n = self.config, self.config.environments_per_rank
        spaces = self.environments.observation_space, self.environments.action_space
        self.storage = Storage(config.rollout_length_per_worker, n, *spaces)
        self.collector = Collector(
            config,
            self.environments,
            self.actor_critic,
            self.learner.gradients.act,
            self.storage,
            self.reports,
            self.first_global_index,
        )
        self.observation_moments = RunningMoments(spaces[0].shape or ())
        self.reward_normalizer = RewardNormalizer(n, config.gamma)

    def _begin(self) -> None:
        """Begin the run, or continue from its checkpoint. Collective: call on all ranks."""
        config, ranks, together = self.config, self.ranks, builders.checked_together
        self.learner.broadcast_parameters()
        for hook in config.hooks:
            hook.on_start(self)
        self.hook_states = together(ranks, lambda: health.checked_states(config.hooks))
        # Networks were built from equal random numbers. From here on, each rank draws its own.
        seed_torch(config.seed, self.first_global_index)
        if not (config.resume == "auto" and self.checkpoints.restore(self)):
            self.checkpoints.begin_anew()
            self.environments.reset(self.storage.observations[0])
        together(ranks, lambda: self.reports.open(self.total_steps or None))
        self.over = self.total_steps >= config.total_steps
        if self.over:
            self.reports.tell(f"nothing is left to train: total_steps={config.total_steps:,} is already reached")

    def rollout(self) -> Rollout:
        """Collect T steps of the N environments with the current policy; return them with values and log-probabilities.

        Reward moments are updated here; observation moments at the iteration's end, to stay fixed during it.
        Collective: call on all ranks.

        Raises:
            TrainingError: an observation or a reward is not finite, on any rank.
        """
        config, storage = self.config, self.storage
        self.learner.gradients.begin_rollout()
        self.collector.collect(self.iteration)
        builders.checked_together(self.ranks, lambda: health.check_finite(self))
        self.total_steps += self.steps_per_iteration

        rewards = np.sign(storage.rewards) if config.clip_rewards else storage.rewards
        on_device = torch.as_tensor(rewards, dtype=torch.get_default_dtype(), device=self.device)
        rollout = self.collector.evaluated(on_device)
        rollout.iteration, rollout.total_steps = self.iteration, self.total_steps
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

    @property
    def learning_rates(self) -> dict[str, float]:
        """Slice name ("policy", "value") -> learning rate; hooks may change it between updates."""
        return self.learner.learning_rates

    @learning_rates.setter
    def learning_rates(self, rates: dict[str, float]) -> None:
        self.learner.learning_rates = rates

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """Name -> 0-d tensor, for loss functions to read; hooks may `fill_` them between updates."""
        return self.learner.coefficients

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

    def finish_iteration(self, rollout: Rollout) -> None:
        """Update normalization and schedules, evaluate, run hooks, write files. Collective: call on all ranks."""
        config = self.config
        means = self.learner.bring_together()
        self.iteration += 1
        if config.normalize_observations:
            seen = rollout.observations.flatten(0, 1).cpu().numpy()  # with changes by callbacks and hooks
            self.observation_moments.update(seen, self.ranks)
            self.actor_critic.set_observation_moments(self.observation_moments.mean, self.observation_moments.std)
        # Each rank has its own network buffers, such as running means. From here on, all have rank 0's.
        self.learner.broadcast_buffers()
        before = self.total_steps - self.steps_per_iteration
        evaluation = self.evaluations.columns(before, self.total_steps)  # first: the row's times include it
        row = {**self._row(rollout, means), **evaluation}
        self.learner.anneal(self.total_steps)
        for hook in config.hooks:
            hook.on_iteration(self, row)
        health.check_rates_and_coefficients(self.learner)
        health.check_attached(self)
        health.check_row(self, row)
        self.reports.write(row)
        to_save = self._agree_on_the_end()
        if config.save_location is not None and self.ranks.is_root and (self.over or self.iteration % SAVE_EVERY == 0):
            self._save_policy("latest")
        self.storage.start_next()
        if self.iteration % COMPARE_EVERY == 0 or self.over:
            health.check_in_step(self)
            if config.save_location is not None:
                health.check_states_kept(self)
        if to_save:
            self.reports.sync()  # first: a checkpoint that survives a power failure must have its rows
            self.checkpoints.save(self)

    def end(self) -> None:
        """End the run on all ranks after this iteration, from any rank's hook; `resume="auto"` would continue it."""
        self._wanted = END

    def _agree_on_the_end(self) -> bool:
        """Set `over` and `interrupted` equally on all ranks, and return whether to write a checkpoint."""
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

    def _row(self, rollout: Rollout, means: dict[str, float]) -> dict[str, float]:
        """Return the log row, equal on all ranks but for `fps` and `seconds`; `means` are of losses and statistics."""
        row = {
            "total_steps": self.total_steps,
            "iteration": self.iteration,
            **self.reports.episodes_row(),
            **means,
            "explained_variance": explained_variance(rollout.values, rollout.returns, self.ranks),
            **{f"learning_rate_{name}": self.learning_rates[name] for name in self.flat.slices},
            **{f"coefficient_{name}": x.item() for name, x in self.coefficients.items()},
            **self.reports.times_row(self.total_steps, self.learner.division.team),
        }
        if self.config.external_update_callback is not None:
            returned = [float(loss) for loss in self.ranks.gather_all(self._external_loss) if loss is not None]
            if returned:
                row["external_loss"] = sum(returned) / len(returned)
        return row

    def result(self) -> Result:
        """Finish hooks and reports, and return the run's result. Collective: call on all ranks."""
        for hook in self.config.hooks:
            hook.on_end(self)
        curve = self.reports.finish(self.config.save_location)
        reports = self.reports
        return Result(
            self.total_steps, reports.best_return, reports.episode_return, self.config.save_location, str(curve)
        )
