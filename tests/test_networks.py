# SPDX-License-Identifier: MIT
"""Ready networks: what goes in, what comes out, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ppo_mpi_base.networks import Scaled, mlp, nature_cnn, orthogonal_


@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=str)
def test_an_mlp_has_the_layers_that_were_asked_for(shape: tuple[int, ...]) -> None:
    network = mlp(5, 3, hidden=(7, 11), activation=nn.ReLU)
    assert network(torch.zeros(2, *shape)).shape == (2, 3)
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [(5, 7), (7, 11), (11, 3)]
    assert [type(m) for m in network] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_the_default_mlp_is_that_of_the_field() -> None:
    network = mlp(17)
    assert [tuple(p.shape) for p in network.parameters()] == [(64, 17), (64,), (64, 64), (64,), (1, 64), (1,)]
    assert sum(isinstance(m, nn.Tanh) for m in network) == 2
    assert mlp(4, 2, hidden=())(torch.zeros(3, 4)).shape == (3, 2)


def test_the_nature_cnn_is_that_of_the_paper() -> None:
    network = nature_cnn(4, 6)
    # Weights and biases of 32 8x8x4, 64 4x4x32, 64 3x3x64, 512x3136 and 6x512.
    layers = [32 * 256 + 32, 64 * 512 + 64, 64 * 576 + 64, 512 * 3136 + 512, 6 * 512 + 6]
    assert [sum(p.numel() for p in m.parameters()) for m in network if list(m.parameters())] == layers
    assert network(torch.zeros(2, 4, 84, 84)).shape == (2, 6)


def test_the_nature_cnn_sees_bytes_from_0_to_1() -> None:
    network, images = nature_cnn(1, 2), torch.full((1, 1, 84, 84), 255.0)
    torch.testing.assert_close(network(images), network[1:](torch.ones(1, 1, 84, 84)))
    assert torch.equal(Scaled(0.5)(torch.tensor([4.0])), torch.tensor([2.0]))


@pytest.mark.parametrize("last_gain", [0.01, 1.0])
def test_layers_start_orthogonal(last_gain: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    orthogonal_(network, last_gain)
    for layer, gain in zip((network[0], network[2], network[4]), (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight = layer.weight.detach().flatten(1)
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(short @ short.T, gain**2 * torch.eye(len(short)), rtol=1e-5, atol=1e-6)
        assert layer.bias is None or not layer.bias.any()


def test_the_generator_decides_alone_how_layers_start() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        network = mlp(3, 2)
        orthogonal_(network, 1.0, torch.Generator().manual_seed(seed))
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
