# SPDX-License-Identifier: MIT
"""Stable-Baselines3 on Pong: its own wrappers and Nature network, 8 games of 128 steps, minibatches of 256, 4 epochs.

It computes with one thread per core, like two of our ranks together.
"""

import argparse
import importlib
import os

import ale_py
import gymnasium
import torch

from benchmarks.contestants.rounds import measure

ITERATION = 8 * 128
WARM_ITERATIONS = 1

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seconds", type=float, default=20)
arguments = parser.parse_args()

torch.set_num_threads(os.cpu_count() or 1)
gymnasium.register_envs(ale_py)
make_atari_env = importlib.import_module("stable_baselines3.common.env_util").make_atari_env
games = make_atari_env("ALE/Pong-v5", 8, env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0})
model = importlib.import_module("stable_baselines3").PPO(
    "CnnPolicy",
    importlib.import_module("stable_baselines3.common.vec_env").VecFrameStack(games, 4),
    n_steps=128,
    batch_size=256,
    n_epochs=4,
    learning_rate=2.5e-4,
    clip_range=0.1,
    ent_coef=0.01,
    vf_coef=0.5,
    device="cpu",
)

measure(lambda: model.learn(ITERATION, reset_num_timesteps=False), ITERATION, WARM_ITERATIONS, arguments.seconds)
