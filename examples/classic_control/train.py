# SPDX-License-Identifier: MIT
"""Train CartPole: `python examples/classic_control/train.py`, or on 4 ranks with `mpiexec -n 4` in front."""

import argparse

import gymnasium
from torch import nn

from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO


def env_fn() -> gymnasium.Env:
    return gymnasium.make("CartPole-v1")


def network_fn(obs_dim: int, act_dim: int) -> nn.Module:
    return mlp(obs_dim, act_dim)


def value_network_fn(obs_dim: int) -> nn.Module:
    return mlp(obs_dim)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--total-steps", type=float, default=1e5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/cartpole")
    arguments = parser.parse_args()

    PPO(
        total_steps=arguments.total_steps,
        env_fn=env_fn,
        network_fn=network_fn,
        value_network_fn=value_network_fn,
        seed=arguments.seed,
        use_vectorized_envs=True,
        num_environments=8,
        rollout_length_per_worker=64,
        train_batch_size=128,
        train_pi_epochs=10,
        train_v_epochs=10,
        pi_lr=1e-3,
        vf_lr=1e-3,
        gamma=0.98,
        lam=0.9,
        anneal_lr=True,
        orthogonal_init=True,
        log_directory=f"{arguments.directory}/logs",
        save_location=f"{arguments.directory}/saved_model",
    )
