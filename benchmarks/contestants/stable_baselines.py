# SPDX-License-Identifier: MIT
"""Stable-Baselines3, or SBX with the same interface: 2,048 steps per iteration, minibatches of 64, 10 epochs."""

import argparse
import importlib

import gymnasium
import mujoco

from benchmarks.contestants.rounds import measure

ITERATION = 2048
WARM_ITERATIONS = 3

mujoco.set_mju_user_warning(lambda message: None)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("library", choices=["stable_baselines3", "sbx"])
parser.add_argument("--environments", type=int, default=8)
parser.add_argument("--seconds", type=float, default=12)
arguments = parser.parse_args()

DummyVecEnv = importlib.import_module("stable_baselines3.common.vec_env").DummyVecEnv
environments = DummyVecEnv([lambda: gymnasium.make("HalfCheetah-v5")] * arguments.environments)
# By default, both use two separate networks of 64x64 tanh units.
model = importlib.import_module(arguments.library).PPO(
    "MlpPolicy",
    environments,
    n_steps=ITERATION // arguments.environments,
    batch_size=64,
    n_epochs=10,
    device="cpu" if arguments.library == "stable_baselines3" else "auto",
)

measure(lambda: model.learn(ITERATION, reset_num_timesteps=False), ITERATION, WARM_ITERATIONS, arguments.seconds)
