# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (Schulman et al. 2017, arxiv.org/abs/1707.06347): the algorithm and its losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_mpi_base.config import Config
from ppo_mpi_base.keywords import keywords_of
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.rollout import Batch, checked_estimates, gae
from ppo_mpi_base.training import training
from ppo_mpi_base.worker import Result


@keywords_of(Config)
def PPO(config: Config) -> Result:
    """Train a policy with PPO on all ranks, and return the run's result. Collective: call on all ranks.

    The keywords are the fields of `config.Config`, which gives the meaning and range of each. Launch the same script
    with `python train.py` for one rank, or `mpiexec -n 8 python train.py` for eight.
    """
    loss_fn, advantage_fn = config.loss_fn or ppo_losses, checked_estimates(config.advantage_fn or gae)

    with training(config, loss_fn) as worker:
        learner = worker.learner
        while not worker.over:  # total_steps are done, or a hook or a signal ended the run
            rollout = worker.rollout()  # T steps of N environments, with pi(a|s) and V(s)
            rollout.advantages, rollout.returns = advantage_fn(rollout, config.gamma, config.lam)
            if config.standardize_advantages:
                rollout.advantages = worker.standardize(rollout.advantages)

            for update in learner.updates(rollout):  # epochs x minibatches
                for minibatch in update:
                    learner.backward(minibatch)  # adds the gradient of loss_fn to the flat gradient
                statistics = learner.allreduce()  # one message: the mean gradient and statistics over ranks
                learner.step(statistics)  # KL stop, clipping by norm, Adam

            worker.finish_iteration(rollout)  # schedules, hooks, logs, files
        return worker.result()


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_ratio: Tensor) -> Tensor:
    r"""Return the clipped surrogate objective, negated: equation 7 of the paper, a scalar.

    L = -mean( min( r A, clip(r, 1 - \epsilon, 1 + \epsilon) A ) ),   r = \pi(a|s) / \pi_old(a|s)

    Args:
        log_probs: log pi(a|s) under the current parameters, (B,).
        old_log_probs: log pi_old(a|s), of the policy that acted, (B,).
        advantages: A, (B,).
        clip_ratio: epsilon.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Return the mean squared error of V(s) against value targets, each (B,): L^VF of equation 9, a scalar."""
    return (values - returns).square().mean()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_ratio: Tensor) -> Tensor:
    """Return the mean of the larger squared error, of V(s) or V_old(s) + clip(V(s) - V_old(s)); inputs are (B,).

    Source: openai/baselines, ppo2; not in the paper, see Engstrom et al. (2020), arxiv.org/abs/2005.12729.
    """
    clipped = old_values + (values - old_values).clamp(-clip_ratio, clip_ratio)
    return torch.max((values - returns).square(), (clipped - returns).square()).mean()


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return the estimate mean(r - 1 - log r) of KL(pi_old | pi), a scalar, from log-probabilities (B,).

    Source: Schulman (2020), joschu.net/blog/kl-approx.html, the estimator k3.
    """
    log_ratio = log_probs - old_log_probs
    return (log_ratio.exp() - 1 - log_ratio).mean()


def ppo_losses(
    actor_critic: ActorCritic, batch: Batch, coefficients: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return PPO's losses, whose sum is minimised, and statistics: all scalars, means over a minibatch.

    To use your own, write it with this signature and pass it as `PPO(loss_fn=...)`. A loss trains the parameters that
    it depends on. The losses named "policy" and "value" end after `train_pi_epochs` and `train_v_epochs`. `target_kl`
    limits the statistic "kl". Numbers that change during training belong in `coefficients`.
    """
    policy, values = actor_critic.policy_and_value(batch.observations)
    log_probs, entropy = policy.log_prob(batch.actions), policy.entropy().mean()

    surrogate = policy_loss(log_probs, batch.log_probs, batch.advantages, coefficients["clip_ratio"])
    if "value_clip_ratio" in coefficients:
        value = clipped_value_loss(values, batch.values, batch.returns, coefficients["value_clip_ratio"])
    else:
        value = value_loss(values, batch.returns)

    losses = {"policy": surrogate - coefficients["entropy_coef"] * entropy, "value": coefficients["value_coef"] * value}
    ratio = (log_probs - batch.log_probs).exp()
    statistics = {
        "kl": approximate_kl(log_probs, batch.log_probs),
        "clip_fraction": ((ratio - 1).abs() > coefficients["clip_ratio"]).to(ratio.dtype).mean(),
        "entropy": entropy,
    }
    return losses, statistics
