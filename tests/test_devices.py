# SPDX-License-Identifier: MIT
"""Training on each device: the same as on the CPU but for rounding. What needs a GPU is skipped where there is none."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import SharedTrunk, mlp
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.saved_policy import load_policy
from ppo_mpi_base.worker import Result, Worker
from tests.mpi.launch import launch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def shared(obs_dim: int, act_dim: int) -> nn.Module:
    trunk = nn.Sequential(nn.Linear(obs_dim, 16), nn.Tanh())
    return SharedTrunk(trunk, nn.Linear(16, act_dim), nn.Linear(16, 1))


def dropping(obs_dim: int, out_dim: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(obs_dim, 16), nn.Dropout(0.5), nn.Linear(16, out_dim))


NETWORKS: dict[str, dict[str, Any]] = {
    "two networks": {"network_fn": partial(mlp, hidden=(16,)), "value_network_fn": partial(mlp, hidden=(16,))},
    "one network": {"network_fn": shared},
    "random networks": {"network_fn": dropping, "value_network_fn": dropping},
}


class Keep(Hooks):
    """Keeps the parameters after each iteration."""

    def __init__(self) -> None:
        self.parameters: list[np.ndarray] = []

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        self.parameters.append(worker.flat.data.cpu().numpy().copy())


def train(directory: Path, networks: str = "two networks", **keywords: Any) -> tuple[Result, list[np.ndarray]]:
    """Train three iterations of 4 x 16 steps of Pendulum; return what came of it, and the parameters after each."""
    keep = Keep()
    given: dict[str, Any] = {
        "total_steps": 192,
        "env_fn": partial(gymnasium.make, "Pendulum-v1"),
        "use_vectorized_envs": True,
        "num_environments": 4,
        "max_ep_len": 11,
        "rollout_length_per_worker": 16,
        "train_batch_size": 16,
        "train_pi_epochs": 2,
        "train_v_epochs": 2,
        "normalize_observations": True,
        "normalize_rewards": True,
        "log_directory": directory / "logs",
        "save_location": directory / "saved",
        "compile": False,
        "quiet": True,
        "hooks": [keep],
        **NETWORKS[networks],
        **keywords,
    }
    return PPO(**given), keep.parameters


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_gpu)])
@every_device
@pytest.mark.parametrize("networks", ["two networks", "one network"])
def test_a_device_learns_what_the_cpu_does(tmp_path: Path, device: str, networks: str, compiled: bool) -> None:
    _, wanted = train(tmp_path / "cpu", networks)
    result, found = train(tmp_path / device, networks, device=device, compile=compiled)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)
    assert result.total_steps == 192 and np.isfinite(found).all()
    action = load_policy(tmp_path / device / "saved")(np.zeros(3, np.float32))
    assert action.shape == (1,) and (abs(action) <= 2).all()


@every_device
def test_doubles_stay_doubles(tmp_path: Path, device: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        _, wanted = train(tmp_path / "cpu")
        _, found = train(tmp_path / device, device=device)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


@every_device
@pytest.mark.parametrize("networks", NETWORKS)
def test_a_run_goes_on_where_it_was(tmp_path: Path, device: str, networks: str) -> None:
    _, whole = train(tmp_path / "whole", networks, device=device)
    given: dict[str, Any] = {"device": device, "resume": "auto", "checkpoint_seconds": 0}
    train(tmp_path / "parts", networks, total_steps=64, **given)
    _, rest = train(tmp_path / "parts", networks, **given)
    np.testing.assert_allclose(rest, whole[1:], atol=0 if device == "cpu" else 1e-5)


@every_device
@pytest.mark.parametrize("networks", NETWORKS)
def test_evaluations_leave_no_trace(tmp_path: Path, device: str, networks: str) -> None:
    _, wanted = train(tmp_path / "without", networks, device=device)
    _, found = train(tmp_path / "with", networks, device=device, evaluate_every=64, evaluate_episodes=2)
    np.testing.assert_allclose(found, wanted, atol=0 if device == "cpu" else 1e-5)


RANKS = """
import sys
from pathlib import Path

from ppo_mpi_base.mpi import world
from tests.test_devices import train

result, parameters = train(Path(sys.argv[1]), device=sys.argv[2])
others = world().gather_all(parameters[-1].tobytes())
print(f"{len(set(others))} {result.total_steps}\\n", end="", flush=True)
"""


@every_device
def test_ranks_share_a_device(tmp_path: Path, device: str) -> None:
    done = launch(RANKS, 2, str(tmp_path), device, timeout=110)
    assert done.stdout.splitlines() == ["1 256"] * 2, done.stderr


KINDS = """
import torch

from ppo_mpi_base.builders import check_equal_devices, checked_together
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.mpi import world

ranks = world()
device = torch.device("cpu" if ranks.rank == 0 else "meta")
try:
    checked_together(ranks, lambda: check_equal_devices(device, ranks))
except ConfigurationError as error:
    print(f"{error}\\n", end="", flush=True)
"""


def test_ranks_on_devices_of_different_kinds_are_refused() -> None:
    done = launch(KINDS, 2)
    told = "device: rank 1 computes on meta, but rank 0 on cpu: all ranks need the same kind"
    assert done.stdout.splitlines() == [told] * 2, done.stderr


def test_a_device_that_computes_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"device='meta' cannot be used .* choose \"cpu\""):
        train(Path("unused"), device="meta")
