# SPDX-License-Identifier: MIT
"""Ready networks for users who bring none, and the initialization that PPO likes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(
    obs_dim: int, out_dim: int = 1, hidden: Sequence[int] = (64, 64), activation: type[nn.Module] = nn.Tanh
) -> nn.Sequential:
    """Build a multilayer perceptron: (B, obs_dim) -> (B, out_dim)."""
    sizes = [obs_dim, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))


class Scaled(nn.Module):
    """Multiplies its input by a constant, such as 1/255 for images of bytes."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        return x * self.factor


def nature_cnn(obs_dim: int, out_dim: int = 1) -> nn.Sequential:
    """Build the network of Mnih et al. (2015), doi.org/10.1038/nature14236.

    Images (B, obs_dim, 84, 84) of values in [0, 255] -> (B, out_dim).
    """
    return nn.Sequential(
        Scaled(1 / 255),
        nn.Conv2d(obs_dim, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, out_dim),
    )


def orthogonal_(network: nn.Module, last_gain: float, generator: torch.Generator | None = None) -> None:
    """Initialize linear and convolutional layers orthogonally: gain sqrt 2, the last one `last_gain`; biases 0.

    A small last gain (0.01 for a policy) starts with nearly equal actions everywhere: Andrychowicz et al. (2021),
    arxiv.org/abs/2006.05990, section 3.2.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    for layer in layers:
        gain = last_gain if layer is layers[-1] else 2.0**0.5
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
