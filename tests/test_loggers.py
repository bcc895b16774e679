# SPDX-License-Identifier: MIT
"""Further loggers: Weights & Biases offline, and one of a user's own."""

from __future__ import annotations

import builtins
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.logger import read_progress
from ppo_mpi_base.loggers import WeightsAndBiases
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.worker import Worker
from variants.json_logger import JsonLogger


def train(directory: Path, **keywords: Any) -> list[dict[str, str]]:
    PPO(
        **{
            "total_steps": 96,
            "env_fn": lambda: gymnasium.make("CartPole-v1"),
            "network_fn": mlp,
            "value_network_fn": mlp,
            "rollout_length_per_worker": 32,
            "train_pi_epochs": 1,
            "train_v_epochs": 1,
            "log_directory": str(directory / "logs"),
            "save_location": str(directory / "saved_model"),
            "quiet": True,
            **keywords,
        }
    )
    return read_progress(directory / "logs" / "progress.csv")[1]


def test_a_logger_of_ones_own_gets_the_rows(tmp_path: Path) -> None:
    class Adds(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            statistics["norm"] = np.float32(2.5)  # type: ignore[assignment]

    rows = train(tmp_path, hooks=[Adds(), JsonLogger(tmp_path / "rows.jsonl")])
    own = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(own) == len(rows) == 3 and len(Path("variants/json_logger.py").read_text().splitlines()) < 30
    for row, line in zip(rows, own, strict=True):
        for name, text in row.items():
            assert float(text) == line[name] or (math.isnan(float(text)) and line[name] is None)


def test_the_end_is_told_once(tmp_path: Path) -> None:
    class Ends(Hooks):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_end(self, worker: Worker) -> None:
            self.seen.append(worker.total_steps)

    ends = Ends()
    train(tmp_path, hooks=[ends])
    assert ends.seen == [96]
    with pytest.raises(SystemExit):
        train(tmp_path, hooks=[ends], total_steps=1e6, max_seconds=1e-6)
    assert ends.seen == [96, 32]


@pytest.mark.timeout(180)
def test_weights_and_biases_gets_the_rows_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent: list[tuple[dict[str, float], int]] = []

    class Seen(WeightsAndBiases):
        """Looks at what the real run has after each row."""

        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            super().on_iteration(worker, statistics)
            sent.append((dict(wandb.run.summary), wandb.run.config["total_steps"]))

    rows = train(tmp_path, hooks=[Seen("test", mode="offline")])
    assert [summary["total_steps"] for summary, _ in sent] == [32, 64, 96] and {total for _, total in sent} == {96}
    assert [summary["kl"] for summary, _ in sent] == [float(row["kl"]) for row in rows]
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb")) and wandb.run is None
    first = (tmp_path / "logs" / "wandb_run_id").read_text()
    train(tmp_path, hooks=[WeightsAndBiases("test", mode="offline")], total_steps=128, resume="auto")
    assert (tmp_path / "logs" / "wandb_run_id").read_text() == first
    shutil.rmtree(tmp_path / "saved_model" / "checkpoints")
    train(tmp_path, hooks=[WeightsAndBiases("test", mode="offline")], resume="auto")
    assert (tmp_path / "logs" / "wandb_run_id").read_text() != first, "nothing to go on from: another run"


def test_without_the_package_one_line_says_so(monkeypatch: Any) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigurationError, match="pip install wandb"):
        WeightsAndBiases("test")
