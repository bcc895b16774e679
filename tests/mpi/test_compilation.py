# SPDX-License-Identifier: MIT
"""What one run has compiled, its ranks and later runs find in the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mpi.launch import launch

SCRIPT = """
import sys

import gymnasium

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO


class Check(Hooks):
    def on_iteration(self, worker, statistics):
        assert type(worker.learner.division).__name__ == "Divided"  # as by default


PPO(total_steps=1, env_fn=lambda: gymnasium.make("CartPole-v1"), network_fn=mlp, value_network_fn=mlp, compile=True,
    rollout_length_per_worker=32, train_batch_size=16, train_pi_epochs=2, train_v_epochs=2, log_directory=sys.argv[1],
    save_location=None, hooks=[Check()])
"""


def libraries(cache: Path) -> dict[str, int]:
    """Return the compiled libraries in a cache, with the time of their last change."""
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.so")}


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.timeout(300)
def test_ranks_and_later_runs_share_what_was_compiled(tmp_path: Path) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    first = launch(SCRIPT, 2, str(tmp_path / "logs"), env=environment, timeout=280)
    assert first.code == 0 and "uncompiled" not in first.stdout + first.stderr, first.stdout + first.stderr
    made = libraries(tmp_path / "cache")
    assert made
    second = launch(SCRIPT, 2, str(tmp_path / "logs"), env=environment, timeout=280)
    assert second.code == 0, second.stderr
    assert libraries(tmp_path / "cache") == made
