# SPDX-License-Identifier: MIT
"""Train an Atari agent: `mpiexec -n 2 python examples/atari/train.py --env-id ALE/Breakout-v5`."""

import argparse

import ale_py  # noqa: F401 (registers the games)
import gymnasium
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from torch.nn import Module

from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import nature_cnn
from ppo_mpi_base.ppo import PPO


def env_fn(env_id: str) -> gymnasium.Env:
    game = gymnasium.make(env_id, frameskip=1, repeat_action_probability=0.0)
    return FrameStackObservation(AtariPreprocessing(game), 4)  # (4, 84, 84) bytes


def network_fn(obs_dim: int, act_dim: int) -> Module:
    return nature_cnn(obs_dim, act_dim)


def value_network_fn(obs_dim: int) -> Module:
    return nature_cnn(obs_dim)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", default="ALE/Pong-v5")
    parser.add_argument("--total-steps", type=float, default=1e7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/atari")
    arguments = parser.parse_args()

    PPO(
        total_steps=arguments.total_steps,
        env_fn=env_fn,
        env_kwargs={"env_id": arguments.env_id},
        network_fn=network_fn,
        value_network_fn=value_network_fn,
        seed=arguments.seed,
        use_vectorized_envs=True,
        num_environments=max(1, 8 // world().size),
        rollout_length_per_worker=128,
        train_batch_size=max(1, 256 // world().size),
        train_pi_epochs=4,
        train_v_epochs=4,
        pi_lr=2.5e-4,
        vf_lr=2.5e-4,
        clip_ratio=0.1,
        entropy_coef=0.01,
        clip_rewards=True,
        anneal_lr=True,
        orthogonal_init=True,
        log_directory=f"{arguments.directory}/logs",
        save_location=f"{arguments.directory}/saved_model",
    )
