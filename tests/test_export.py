# SPDX-License-Identifier: MIT
"""Exported policies act as the saved ones do, in onnxruntime and in torch, for any number of observations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.export import export_policy
from ppo_mpi_base.networks import Scaled, mlp
from ppo_mpi_base.policies import ActorCritic, action_dim, observation_dim
from ppo_mpi_base.saved_policy import load_policy, save_policy

ACTIONS = Box(np.array([-0.5, -0.25], np.float32), np.array([0.5, 0.125], np.float32))
FLOATS = Box(-np.inf, np.inf, (3,), np.float64)


class Both(nn.Module):
    """One network of the user's own class for logits and values."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(obs_dim, 8), nn.Linear(8, act_dim), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        trunk = torch.tanh(self.trunk(x))
        return self.policy(trunk), self.value(trunk)


class OnlyTwo(nn.Module):
    """A network whose graph holds for the number of observations that it was drawn with."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(obs_dim, act_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).reshape(2, -1)


def small_cnn(obs_dim: int, act_dim: int) -> nn.Module:
    return nn.Sequential(
        Scaled(1 / 255), nn.Conv2d(obs_dim, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 5, act_dim)
    )


def save(
    directory: Path,
    network_fn: Callable[..., nn.Module],
    observations: gymnasium.Space,
    actions: gymnasium.Space,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Save a policy with random weights, large enough for actions that differ and reach their bounds."""
    normalize = moments is not None
    config = Config(
        total_steps=1,
        env_fn=mlp,
        network_fn=network_fn,
        save_location=str(directory),
        normalize_observations=normalize,
    )
    torch.manual_seed(1)
    network = network_fn(observation_dim(observations), action_dim(actions))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    value = None if network_fn is Both else nn.Linear(1, 1)
    actor_critic = ActorCritic(network, value, observations, actions, normalize_observations=normalize)
    if moments is not None:
        actor_critic.set_observation_moments(*moments)
    save_policy(config, "latest", actor_critic, 1, 0.0)


def acts_alike(directory: Path, observations: np.ndarray, actions: gymnasium.Space, **keywords: Any) -> None:
    """Export, and compare both files in their runtimes with `load_policy`, observation by observation."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    policy = load_policy(directory, **keywords)
    wanted = np.stack([policy(observation) for observation in observations])
    assert len(np.unique(wanted, axis=0)) > 1, "all actions are equal: the test says nothing"
    assert all(actions.contains(action) for action in wanted)
    onnx_path, torch_path = export_policy(directory, directory / "out" / "policy.v1", **keywords)
    assert (onnx_path.name, torch_path.name) == ("policy.v1.onnx", "policy.v1.pt2")
    assert sorted(onnx_path.parent.iterdir()) == [onnx_path, torch_path]
    session = onnxruntime.InferenceSession(onnx_path)
    program = torch.export.load(torch_path).module()
    for batch in (1, 5, len(observations)):
        (by_onnx,) = session.run(None, {"observations": observations[:batch]})
        by_torch = program(torch.as_tensor(observations[:batch])).numpy()
        for found in (by_onnx, by_torch):
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted[:batch], rtol=1e-5, atol=1e-6)


def test_gaussian_with_normalization(tmp_path: Path) -> None:
    mean, std = np.array([1e4, -3.0, 0.01]), np.array([0.5, 20.0, 0.001])
    save(tmp_path, mlp, FLOATS, ACTIONS, (mean, std))
    # 30 standard deviations: some observations are clipped.
    observations = mean + std * np.random.default_rng(0).standard_normal((40, 3)) * np.geomspace(1, 30, 40)[:, None]
    acts_alike(tmp_path, observations, ACTIONS)


def test_images_of_bytes(tmp_path: Path) -> None:
    save(tmp_path, small_cnn, Box(0, 255, (2, 12, 12), np.uint8), Discrete(6))
    observations = np.random.default_rng(0).integers(0, 256, (20, 2, 12, 12), np.uint8)
    acts_alike(tmp_path, observations, Discrete(6))


def test_discrete_spaces_with_a_start_and_a_shared_network(tmp_path: Path) -> None:
    actions = Discrete(3, start=2)
    save(tmp_path, Both, Discrete(7, start=-1), actions)
    acts_alike(tmp_path, np.arange(-1, 6), actions, network_fn=Both)


def refused(text: str, directory: Path, **keywords: Any) -> None:
    output = directory / "out" / "policy"
    with pytest.raises(ConfigurationError, match=text) as raised:
        export_policy(directory, output, **keywords)
    assert "\n" not in str(raised.value)
    assert not output.parent.exists() or not output.parent.is_dir() or not list(output.parent.iterdir())


def test_what_cannot_be_exported_is_told_and_nothing_written(tmp_path: Path) -> None:
    refused("was a policy saved there", tmp_path)
    save(tmp_path, OnlyTwo, FLOATS, ACTIONS)
    refused("own class", tmp_path)
    refused("network_fn: torch.export cannot export", tmp_path, network_fn=OnlyTwo)
    for formats in ((), ("torch", "tflite")):
        refused("formats=.*'onnx', 'torch'", tmp_path, formats=formats)


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, mlp, FLOATS, ACTIONS)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as Python itself marks what cannot be imported
    refused("pip install onnx onnxscript", tmp_path, formats=("torch", "onnx"))
    assert export_policy(tmp_path, tmp_path / "policy.pt2", formats=("torch",)) == [tmp_path / "policy.pt2"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    save(tmp_path, mlp, FLOATS, ACTIONS)
    (tmp_path / "out").write_text("")
    refused("output=.*cannot be written", tmp_path, formats=("torch",))


class TwiceInGraph(nn.Module):
    """A network that acts differently once it is exported."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(obs_dim, act_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * (2 if torch.compiler.is_exporting() else 1)


def test_another_function_than_the_policy_is_not_written(tmp_path: Path) -> None:
    save(tmp_path, TwiceInGraph, FLOATS, Box(-9, 9, (2,), np.float32))
    refused("acts differently", tmp_path, network_fn=TwiceInGraph, formats=("torch",))
