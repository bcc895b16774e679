# SPDX-License-Identifier: MIT
"""This package on Pong: `mpiexec -n 2 python -m benchmarks.contestants.atari`, or one rank with all 8 games."""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from benchmarks.contestants.ours import Stopwatch
from ppo_mpi_base import presets
from ppo_mpi_base.atari import atari_env, atari_vector_env
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import shared_nature_cnn
from ppo_mpi_base.ppo import PPO


def keywords(directory: str, compiled: bool, precision: str = "float32") -> dict[str, Any]:
    """Return the keywords of `PPO()`: as in other codes, minibatches of 256 over all ranks."""
    return {
        **presets.atari(world().size),
        "train_batch_size": 256 // world().size,
        "total_steps": 10**9,
        "env_fn": atari_env,
        "make_vec_env_fn": atari_vector_env,
        "env_kwargs": {"env_id": "ALE/Pong-v5"},
        "network_fn": shared_nature_cnn,
        "precision": precision,
        "compile": compiled,
        "log_directory": directory,
        "save_location": None,
        "quiet": True,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    stopwatch = Stopwatch(arguments.seconds)
    with tempfile.TemporaryDirectory() as directory:
        PPO(**keywords(directory, not arguments.eager, arguments.precision), hooks=[stopwatch])
    if world().is_root:
        figures = {
            "steps_per_second": stopwatch.steps_per_second,
            "message_us": 1e6 * stopwatch.message_seconds,
            **{name: stopwatch.mean(name) for name in stopwatch.rows[0] if name.startswith("time_")},
        }
        print(json.dumps(figures), flush=True)
