# SPDX-License-Identifier: MIT
"""One rank of a run: its environments and networks, its rollouts, its minibatches and its optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base import builders
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.flat_parameters import Adam, FlatParameters
from ppo_mpi_base.gradients import EagerGradients, LossFunction, Objective
from ppo_mpi_base.mpi import Communicator, default_threads, fail_together, world
from ppo_mpi_base.normalize import RewardNormalizer, RunningMoments
from ppo_mpi_base.reports import Reports
from ppo_mpi_base.rollout import Batch, Rollout, explained_variance, minibatch_order
from ppo_mpi_base.saved_policy import save_policy
from ppo_mpi_base.seeding import MINIBATCHES, generator
from ppo_mpi_base.storage import Storage

KL_TOLERANCE = 1.5
"""An update is not applied where the KL estimate exceeds this many times `target_kl`."""


@dataclass(frozen=True)
class Result:
    """How a run went.

    Attributes:
        total_steps: agent steps over all ranks.
        best_return, last_return: the highest and the last mean return of 100 training episodes; NaN without an episode.
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
        learning_rates: slice name ("policy", "value") -> learning rate; hooks may change it between iterations.
        coefficients: name -> 0-d tensor, what loss functions read; hooks may `fill_` them between iterations.
        reports: the last 100 episodes and where the time goes.
    """

    def __init__(self, config: Config, ranks: Communicator, loss_fn: LossFunction) -> None:
        self.config, self.ranks = config, ranks
        self.device = torch.device(config.device or "cpu")
        together = builders.checked_together
        self.environments = together(ranks, lambda: builders.build_environments(config, ranks))
        together(ranks, lambda: builders.check_equal_spaces(self.environments, ranks))
        self.actor_critic = together(ranks, lambda: builders.build_networks(config, self.environments, self.device))
        self.coefficients = {name: torch.tensor(x, device=self.device) for name, x in config.coefficients.items()}
        self.objective = Objective(self.actor_critic, loss_fn, config.hooks)
        self.statistic_names = together(ranks, self._probe_losses)
        self.flat = FlatParameters(self.actor_critic.parameter_slices(), statistics=len(self.statistic_names))
        self.optimizer = Adam(self.flat, config.adam_epsilon)
        self.gradients = EagerGradients(self.objective, self.flat)
        self.reports = together(ranks, lambda: Reports(config, ranks))

        spaces = self.environments.observation_space, self.environments.action_space
        self.storage = Storage(config.rollout_length_per_worker, config.environments_per_rank, *spaces)
        self.observation_moments = RunningMoments(spaces[0].shape or ())
        self.reward_normalizer = RewardNormalizer(config.environments_per_rank, config.gamma)
        self.learning_rates = {"policy": config.pi_lr, "value": config.vf_lr}
        self.gradient_limits = {"policy": config.pi_grad_clip, "value": config.v_grad_clip}
        self.epochs = {"policy": config.train_pi_epochs, "value": config.train_v_epochs}
        self.idle: frozenset[str] = frozenset()
        self.stopped_by_kl = False
        self.iteration = self.total_steps = 0
        self._epoch_statistics = np.zeros(len(self.statistic_names) + 1)
        self._external_loss: float | None = None

        self.broadcast_parameters()
        self.environments.reset(self.storage.observations[0])
        for hook in config.hooks:
            hook.on_start(self)

    def _probe_losses(self) -> list[str]:
        """Evaluate the losses once on made-up samples, to learn what they are called and that they work."""
        space = self.environments.observation_space
        observations = torch.as_tensor(builders.example_observations(space), device=self.device)
        noise = torch.zeros((2, *self._noise_shape()), device=self.device)
        with torch.no_grad():
            actions, _ = self.actor_critic.act(observations, noise)
            log_probs = self.actor_critic.policy(observations).log_prob(actions)
            zeros = torch.zeros_like(log_probs)
            batch = Batch(observations, actions, log_probs, zeros, zeros, zeros, {})
            losses, statistics = self.objective.terms(batch, self.coefficients)
        for name, value in {**losses, **statistics}.items():
            if value.shape != ():
                raise ConfigurationError(f"loss_fn: {name!r} must be a scalar, but has shape {tuple(value.shape)}")
        if self.config.target_kl > 0 and "kl" not in statistics:
            raise ConfigurationError(f"target_kl={self.config.target_kl} needs a loss_fn with the statistic 'kl'")
        return list(statistics)
