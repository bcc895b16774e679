# SPDX-License-Identifier: MIT
"""Train a MuJoCo agent: `mpiexec -n 2 python examples/mujoco/train.py --env-id Hopper-v5 --seed 1`."""

import argparse

import gymnasium
import mujoco

from ppo_mpi_base import presets
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO

# MuJoCo 4 warns about an attribute in Gymnasium's own models, once per environment.
mujoco.set_mju_user_warning(lambda message: None if "settotalmass" in message else print(message))

SETTINGS = {"fast": (presets.mujoco, 64), "paper": (presets.mujoco_paper, 128)}  # preset, and width of the networks


def env_fn(env_id: str) -> gymnasium.Env:
    return gymnasium.make(env_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", default="HalfCheetah-v5")
    parser.add_argument("--total-steps", type=float, default=1e6)
    parser.add_argument("--setting", choices=SETTINGS, default="fast", help="fast, or the paper's")
    parser.add_argument("--width", type=int, help="units of each of the two hidden layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/mujoco")
    arguments = parser.parse_args()

    preset, usual_width = SETTINGS[arguments.setting]
    width = arguments.width or usual_width
    PPO(
        total_steps=arguments.total_steps,
        env_fn=env_fn,
        env_kwargs={"env_id": arguments.env_id},
        network_fn=mlp,
        value_network_fn=mlp,
        policy_kwargs={"hidden": (width, width)},
        critic_kwargs={"hidden": (width, width)},
        seed=arguments.seed,
        log_directory=f"{arguments.directory}/logs",
        save_location=f"{arguments.directory}/saved_model",
        **preset(world().size),
    )
