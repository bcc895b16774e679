# SPDX-License-Identifier: MIT
"""One rank's rollouts: environments stepped with the current policy, and the networks' outputs for the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base.config import Config
from ppo_mpi_base.envs import Environments
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.reports import Reports
from ppo_mpi_base.rollout import Rollout, intercept
from ppo_mpi_base.storage import Storage

EVALUATION_BATCH = 4096
"""Maximum number of samples per forward pass over a finished rollout."""
EVALUATION_NUMBERS = 2**23
"""Maximum number of observation elements in such a pass: with more, a CNN waits for memory instead of computing."""


class Collector:
    """Steps a rank's environments, and combines the results with the networks' outputs for them.

    Args:
        config: all keywords.
        environments: this rank's environments.
        actor_critic: the networks that act and evaluate.
        act: the policy's forward pass, possibly compiled: `Gradients.act`.
        storage: receives observations, actions, rewards and episode ends.
        reports: receives ended episodes and timings.
        first_global_index: index of this rank's first environment among those of all ranks; keys its action noise.
    """

    def __init__(
        self,
        config: Config,
        environments: Environments,
        actor_critic: ActorCritic,
        act: Callable[[Tensor, Tensor, Sequence[Tensor]], None],
        storage: Storage,
        reports: Reports,
        first_global_index: int,
    ) -> None:
        self.config, self.environments, self.actor_critic, self.act = config, environments, actor_critic, act
        self.storage, self.reports, self.first_global_index = storage, reports, first_global_index
        self.device = actor_critic.device

    def collect(self, iteration: int) -> None:
        """Fill the storage: the inner loop of all training. Collective: call on all ranks."""
        storage, environments, act, seconds = self.storage, self.environments, self.act, self.reports.seconds
        noise = storage.noise(self.config.seed, self.first_global_index, iteration).to(self.device)
        columns = [torch.as_tensor(storage.observations[:-1]), noise, storage.actions]
        if self.actor_critic.value_network is None:  # one network for both returns these with the actions
            columns += storage.log_probs, storage.values
        # All rows at once: indexing one takes a tenth of the time of the policy's forward pass.
        rows = zip(*(column.unbind() for column in columns), strict=True)
        sent = torch.zeros_like(storage.actions[0])
        sent_array = sent.numpy()
        ended = []
        storage.begin()
        clock = time.perf_counter
        for t, (seen, noise_of_step, actions, *evaluated) in enumerate(rows):
            started = clock()
            act(seen, noise_of_step, (actions, sent, *evaluated))
            decided = clock()
            step = environments.step(sent_array, storage.observations[t + 1])
            storage.put(t, step.rewards, step.terminated, step.truncated)
            storage.keep_final(t, step.final_observations)
            if step.episodes:
                ended += [(t, episode) for episode in step.episodes]
            seconds["inference"] += decided - started
            seconds["environments"] += clock() - decided
        started = clock()
        self.reports.add_episodes(ended)
        seconds["waiting"] += clock() - started

    @torch.no_grad()
    def evaluated(self, rewards: Tensor) -> Rollout:
        """Return the collected rollout with these rewards (T, N), log-probabilities and values."""
        started = time.perf_counter()
        storage, device = self.storage, self.device
        observations = torch.as_tensor(storage.observations).to(device)
        rollout = Rollout(
            observations=observations[:-1],
            next_observations=observations[1:],
            actions=storage.actions.to(device),
            rewards=rewards,
            terminated=torch.as_tensor(storage.terminated).to(device),
            truncated=torch.as_tensor(storage.truncated).to(device),
            log_probs=storage.log_probs.to(device, rewards.dtype),
            values=storage.values.to(device, rewards.dtype),
            next_values=torch.empty_like(rewards),
        )
        if self.actor_critic.value_network is not None:
            self._evaluate(rollout)
        if self.config.rollout_interception_callback is not None:
            intercept(rollout, self.config.rollout_interception_callback)
        self._bootstrap(rollout)
        self.reports.seconds["inference"] += time.perf_counter() - started
        return rollout

    def _evaluate(self, rollout: Rollout) -> None:
        """Fill `log_probs` and `values`, in few forward passes on many samples."""
        flat = [x.flatten(0, 1) for x in (rollout.observations, rollout.actions, rollout.log_probs, rollout.values)]
        batch = max(1, min(EVALUATION_BATCH, EVALUATION_NUMBERS // rollout.observations[0, 0].numel()))
        for start in range(0, rollout.rewards.numel(), batch):
            seen, actions, log_probs, values = (x[start : start + batch] for x in flat)
            policy, value = self.actor_critic.policy_and_value(seen)
            log_probs.copy_(policy.log_prob(actions))
            values.copy_(value)

    def _bootstrap(self, rollout: Rollout) -> None:
        """Fill `next_values`, in one pass over the rollout's last observations and truncated episodes' final ones."""
        storage = self.storage
        places, finals = list(storage.final_observations), list(storage.final_observations.values())
        observations = np.concatenate([storage.observations[-1], *(final[None] for final in finals)])
        values = self.actor_critic.value(torch.as_tensor(observations, device=self.device)).to(rollout.values.dtype)
        rollout.next_values[:-1] = rollout.values[1:]
        rollout.next_values[-1] = values[: storage.environments]
        for (t, i), value in zip(places, values[storage.environments :], strict=True):
            rollout.next_values[t, i] = value
