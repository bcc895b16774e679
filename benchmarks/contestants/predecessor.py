# SPDX-License-Identifier: MIT
"""The predecessor's design: one environment per rank, and losses, Allreduce and Adam one tensor at a time.

`mpiexec -n 2 python -m benchmarks.contestants.predecessor`: 2,048 samples per iteration, updates of 64, 10 epochs.
"""

import argparse
import json
import time

import gymnasium
import mujoco
import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

RANKS = MPI.COMM_WORLD
LENGTH, MINIBATCH, EPOCHS = 2048 // RANKS.size, 64 // RANKS.size, 10
GAMMA, LAMBDA, CLIP, LARGEST_NORM = 0.99, 0.95, 0.2, 0.5
WARM_ITERATIONS = 2


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Policy(nn.Module):
    """A Gaussian policy with state-independent standard deviations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = mlp(inputs, outputs)
        self.log_std = nn.Parameter(torch.zeros(outputs))

    def forward(self, observations: Tensor) -> torch.distributions.Normal:
        """Return the distribution of actions."""
        return torch.distributions.Normal(self.mean(observations), self.log_std.exp())


def step(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Average the gradient over ranks, one message per tensor, and update the parameters."""
    optimizer.zero_grad()
    loss.backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        RANKS.Allreduce(MPI.IN_PLACE, parameter.grad.numpy(), MPI.SUM)
        parameter.grad /= RANKS.size
    nn.utils.clip_grad_norm_(module.parameters(), LARGEST_NORM)
    optimizer.step()


class Trainer:
    """One rank."""

    def __init__(self) -> None:
        self.environment = gymnasium.make("HalfCheetah-v5")
        assert self.environment.observation_space.shape and self.environment.action_space.shape
        inputs, outputs = self.environment.observation_space.shape[0], self.environment.action_space.shape[0]
        self.policy, self.value = Policy(inputs, outputs), mlp(inputs, 1)
        for tensor in [*self.policy.parameters(), *self.value.parameters()]:
            RANKS.Bcast(tensor.detach().numpy())
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4, eps=1e-5)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4, eps=1e-5)
        self.observations = np.zeros((LENGTH + 1, inputs), np.float32)
        self.actions = np.zeros((LENGTH, outputs), np.float32)
        self.rewards, self.log_probs = np.zeros(LENGTH, np.float32), np.zeros(LENGTH, np.float32)
        self.values, self.ended = np.zeros(LENGTH + 1, np.float32), np.zeros(LENGTH, bool)
        self.observations[0], _ = self.environment.reset(seed=RANKS.rank)
        torch.manual_seed(RANKS.rank)

    @torch.no_grad()
    def rollout(self) -> None:
        """Step the environment, one observation at a time."""
        for t in range(LENGTH):
            observation = torch.as_tensor(self.observations[t])
            distribution = self.policy(observation)
            action = distribution.sample()
            self.log_probs[t] = distribution.log_prob(action).sum(-1)
            self.values[t] = self.value(observation)
            self.actions[t] = action
            following, reward, terminated, truncated, _ = self.environment.step(self.actions[t].clip(-1, 1))
            self.rewards[t], self.ended[t] = float(reward), terminated or truncated
            if truncated:
                self.rewards[t] += GAMMA * self.value(torch.as_tensor(following, dtype=torch.float32)).item()
            if self.ended[t]:
                following, _ = self.environment.reset()
            self.observations[t + 1] = following
        self.values[LENGTH] = self.value(torch.as_tensor(self.observations[LENGTH]))

    def advantages(self) -> np.ndarray:
        """Return generalized advantage estimates, (T,)."""
        advantages, last = np.zeros(LENGTH, np.float32), 0.0
        for t in reversed(range(LENGTH)):
            goes_on = 1.0 - self.ended[t]
            delta = self.rewards[t] + GAMMA * self.values[t + 1] * goes_on - self.values[t]
            advantages[t] = last = delta + GAMMA * LAMBDA * goes_on * last
        return advantages

    def update(self) -> None:
        """Run all epochs of updates, policy and value separately."""
        estimates = self.advantages()
        returns = torch.as_tensor(estimates + self.values[:-1])
        sums = np.array([LENGTH, estimates.sum(), np.square(estimates).sum()], np.float64)
        RANKS.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        mean = sums[1] / sums[0]
        advantages = torch.as_tensor((estimates - mean) / np.sqrt(sums[2] / sums[0] - mean**2 + 1e-8)).float()
        observations, actions = torch.as_tensor(self.observations[:-1]), torch.as_tensor(self.actions)
        log_probs = torch.as_tensor(self.log_probs)
        for _ in range(EPOCHS):
            for at in torch.randperm(LENGTH).split(MINIBATCH):
                ratio = (self.policy(observations[at]).log_prob(actions[at]).sum(-1) - log_probs[at]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * advantages[at], clipped * advantages[at]).mean()
                step(loss, self.policy, self.policy_optimizer)
                loss = (self.value(observations[at]).squeeze(-1) - returns[at]).square().mean()
                step(loss, self.value, self.value_optimizer)
        self.observations[0] = self.observations[LENGTH]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12)
    seconds = parser.parse_args().seconds
    mujoco.set_mju_user_warning(lambda message: None)
    trainer = Trainer()
    iterations, started, passed = -WARM_ITERATIONS, 0.0, 0.0
    while passed < seconds:
        if iterations == 0:
            started = time.perf_counter()
        trainer.rollout()
        trainer.update()
        iterations += 1
        passed = RANKS.allreduce(time.perf_counter() - started, MPI.MAX) if iterations > 0 else 0.0
    if RANKS.rank == 0:
        print(json.dumps({"steps_per_second": iterations * LENGTH * RANKS.size / passed}), flush=True)
