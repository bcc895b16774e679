# SPDX-License-Identifier: MIT
"""Tiny runs of real tasks, ways to end them early, and what tells two runs apart to the last bit."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import ale_py  # noqa: F401 (registers Pong)
import gymnasium
import numpy as np
import safetensors.numpy
from gymnasium.wrappers import AtariPreprocessing
from torch import nn

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.rollout import Rollout
from ppo_mpi_base.worker import Worker

T, N = 16, 2
HALF, WHOLE = 3, 6  # iterations
TASKS = ("HalfCheetah", "CartPole", "Pong")

small = partial(mlp, hidden=(8,))


def env_fn(task: str) -> gymnasium.Env:
    if task == "Pong":
        game = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
        return AtariPreprocessing(game, noop_max=5, screen_size=42)
    return gymnasium.make({"HalfCheetah": "HalfCheetah-v5", "CartPole": "CartPole-v1"}[task])


def tiny_network(obs_dim: int, act_dim: int = 1) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(42 * 42, 8), nn.Tanh(), nn.Linear(8, act_dim))


def keywords(task: str, directory: Path, ranks: int = 1, **changed: Any) -> dict[str, Any]:
    """Return what `PPO()` gets for `WHOLE` iterations; episodes end within rollouts and reach over their ends."""
    network = tiny_network if task == "Pong" else small
    return {
        "total_steps": WHOLE * T * N * ranks,
        "env_fn": env_fn,
        "env_kwargs": {"task": task},
        "network_fn": network,
        "value_network_fn": network,
        "use_vectorized_envs": True,
        "num_environments": N,
        "rollout_length_per_worker": T,
        "max_ep_len": 13,
        "stagger_episodes": 12,
        "train_batch_size": 12,
        "train_pi_epochs": 2,
        "train_v_epochs": 3,
        "anneal_lr": True,
        "anneal_clip_ratio": True,
        "normalize_observations": task != "Pong",
        "normalize_rewards": True,
        "log_directory": directory / "logs",
        "save_location": directory / "saved",
        "checkpoint_seconds": 0,
        "resume": "auto",
        "compile": False,
        "quiet": True,
        **changed,
    }


class Signal(Hooks):
    """Sends this process a signal in the iteration after `HALF`, on one rank."""

    def __init__(self, number: int = signal.SIGKILL, rank: int = 0) -> None:
        self.number, self.rank = number, rank

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        if worker.iteration == HALF and worker.ranks.rank == self.rank:
            os.kill(os.getpid(), self.number)


def newest(directory: Path) -> Path:
    """Return the description of the newest checkpoint of the run in a directory."""
    return max((directory / "saved" / "checkpoints").glob("*.json"))


def checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the newest checkpoint of the run in a directory, without the package."""
    path = newest(directory)
    return json.loads(path.read_text()), safetensors.numpy.load_file(path.with_suffix(".safetensors"))


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the runs in two directories: last checkpoints and logs, but for times."""
    (facts, arrays), (other_facts, other_arrays) = checkpoint(one), checkpoint(other)
    for each in (facts, other_facts):
        each["reports"].pop("seconds")
        for name in ("sha256", "self"):
            each.pop(name)
    found = [name for name in {*facts, *other_facts} if facts.get(name) != other_facts.get(name)]
    if arrays.keys() != other_arrays.keys():
        return [*found, *(arrays.keys() ^ other_arrays.keys())]
    found += [name for name, array in arrays.items() if array.tobytes() != other_arrays[name].tobytes()]
    rows, other_rows = (_rows(directory) for directory in (one, other))
    if len(rows) != len(other_rows):
        return [*found, f"{len(rows)} and {len(other_rows)} rows"]
    return found + [f"row {k}" for k, (row, other) in enumerate(zip(rows, other_rows, strict=True)) if row != other]


def _rows(directory: Path) -> list[dict[str, str]]:
    rows = read_progress(directory / "logs" / "progress.csv")[1]
    timed = ("fps", "seconds", "slowest_rank")
    return [{k: text for k, text in row.items() if k not in timed and not k.startswith("time_")} for row in rows]
