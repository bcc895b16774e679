# SPDX-License-Identifier: MIT
"""Train a MuJoCo agent: `mpiexec -n 2 python examples/mujoco/train.py --env-id Hopper-v5 --seed 1`."""

import argparse

import gymnasium
import mujoco

from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO

# MuJoCo 4 warns of an attribute in Gymnasium's own models, once for each environment.
mujoco.set_mju_user_warning(lambda message: None if "settotalmass" in message else print(message))


def env_fn(env_id: str) -> gymnasium.Env:
    return gymnasium.make(env_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", default="HalfCheetah-v5")
    parser.add_argument("--total-steps", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/mujoco")
    arguments = parser.parse_args()

    # The paper's setting, whatever the number of ranks: 2048 samples an iteration, updates of 64 samples, 10 epochs.
    environments = max(1, 16 // world().size)
    PPO(
        total_steps=arguments.total_steps,
        env_fn=env_fn,
        env_kwargs={"env_id": arguments.env_id},
        network_fn=mlp,
        value_network_fn=mlp,
        policy_kwargs={"hidden": (128, 128)},
        critic_kwargs={"hidden": (128, 128)},
        seed=arguments.seed,
        use_vectorized_envs=True,
        num_environments=environments,
        rollout_length_per_worker=2048 // (environments * world().size),
        train_batch_size=64 // world().size,
        train_pi_epochs=10,
        train_v_epochs=10,
        vf_lr=3e-4,
        pi_grad_clip=0.5,
        v_grad_clip=0.5,
        adam_epsilon=1e-5,
        anneal_lr=True,
        normalize_observations=True,
        normalize_rewards=True,
        orthogonal_init=True,
        log_directory=f"{arguments.directory}/logs",
        save_location=f"{arguments.directory}/saved_model",
    )
