# SPDX-License-Identifier: MIT
"""Ready-made networks, and an initialization that suits PPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized


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


class ChannelsLast(nn.Module):
    """Stores images (B, C, H, W) with their channels last in memory, which CPUs convolve faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same numbers."""
        return x.contiguous(memory_format=torch.channels_last)


class FlattenPixels(nn.Module):
    """Flattens each image pixel by pixel: (B, C, H, W) -> (B, H * W * C).

    If channels are last in memory, as after convolutions on CPUs, nothing is copied; `nn.Flatten` would copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the same numbers."""
        return x.permute(0, 2, 3, 1).flatten(1)


class SpaceToDepthConv2d(nn.Conv2d):
    """A convolution without padding whose kernel is a multiple of its stride, such as 8x8 at stride 4.

    It computes the same function of the same parameters as `nn.Conv2d`, with a smaller kernel (there 2x2) at stride 1:
    blocks of stride x stride pixels first become channels, contiguous in memory. CPUs are slow with large kernels on
    few channels. Source: Shi et al. (2016), arxiv.org/abs/1609.05158, section 3.2, whose shuffling is inverted here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)
        if any(size % step for size, step in zip(self.kernel_size, self.stride, strict=True)):
            raise ValueError(f"kernel_size={kernel_size} must be a multiple of stride={stride}")

    def forward(self, input: Tensor) -> Tensor:
        """Return what `nn.Conv2d` returns: (B, C, H, W) -> (B, out_channels, ...)."""
        height, width = (n - n % step for n, step in zip(input.shape[2:], self.stride, strict=True))
        # The kernel reaches none of the pixels cut off.
        images = input[:, :, :height, :width]
        return functional.conv2d(self._folded_words(images), self._folded(self.weight), self.bias)

    def _folded(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) as (B, C * block, H / stride, W / stride), the channels last in memory."""
        (batch, channels, height, width), (down, right) = x.shape, self.stride
        blocks = x.reshape(batch, channels, height // down, down, width // right, right).permute(0, 2, 4, 1, 3, 5)
        return blocks.reshape(batch, height // down, width // right, channels * down * right).permute(0, 3, 1, 2)

    def _folded_words(self, x: Tensor) -> Tensor:
        """Return the same as `_folded`, but move neighbours in a row together, as words of 8 bytes, if possible.

        It takes a fraction of the time, eager or compiled. Words have no gradient, and exported programs lack them.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x, word = x.contiguous(), 8 // x.element_size()
        (batch, channels, height, width), (down, right) = x.shape, self.stride
        # Compiled code cannot ask where its memory begins.
        divisible = right % word == 0 and (is_compiling() or x.storage_offset() % word == 0)
        exported = torch.jit.is_tracing() or is_exporting()  # type: ignore[attr-defined, no-untyped-call]
        if exported or x.requires_grad or not divisible:
            return self._folded(x)
        rows = x.view(torch.int64).reshape(batch, channels, height // down, down, width // right, right // word)
        blocks = rows.permute(0, 2, 4, 1, 3, 5).contiguous().view(x.dtype)
        return blocks.view(batch, height // down, width // right, channels * down * right).permute(0, 3, 1, 2)


class Residual(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        return input + super().forward(input)  # type: ignore[no-untyped-call]


class SharedTrunk(nn.Module):
    """One network for policy and value: shared features, and an output layer for each.

    If autocast makes the trunk compute in bfloat16, the output layers still compute in the default dtype: with
    bfloat16's 8 bits, a value of 1.5 would be rounded by up to 0.004, and an advantage may be no larger than that.

    Args:
        trunk: observations (B, ...) -> features.
        policy: features -> means or logits (B, act_dim).
        value: features -> values (B, 1).
    """

    def __init__(self, trunk: nn.Module, policy: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = trunk, policy, value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means or logits, and values."""
        features, device = self.trunk(x), x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                features = features.to(torch.get_default_dtype())
                return self.policy(features), self.value(features)
        return self.policy(features), self.value(features)


def nature_trunk(obs_dim: int) -> nn.Sequential:
    """Build the hidden layers of `nature_cnn`: images (B, obs_dim, 84, 84) of values in [0, 255] -> (B, 512)."""
    return nn.Sequential(
        Scaled(1 / 255),
        SpaceToDepthConv2d(obs_dim, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1),
        nn.ReLU(),
        FlattenPixels(),
        nn.Linear(7 * 7 * 64, 512),
        nn.ReLU(),
    )


def nature_cnn(obs_dim: int, out_dim: int = 1) -> nn.Sequential:
    """Build the network of Mnih et al. (2015), doi.org/10.1038/nature14236.

    Images (B, obs_dim, 84, 84) of values in [0, 255] -> (B, out_dim).
    """
    return nn.Sequential(*nature_trunk(obs_dim), nn.Linear(512, out_dim))


def shared_nature_cnn(obs_dim: int, act_dim: int) -> SharedTrunk:
    """Build one `nature_cnn` for policy and value: images (B, obs_dim, 84, 84) -> (B, act_dim) and (B, 1)."""
    return SharedTrunk(nature_trunk(obs_dim), nn.Linear(512, act_dim), nn.Linear(512, 1))


def impala_trunk(obs_dim: int) -> nn.Sequential:
    """Build the hidden layers of `impala_cnn`: images (B, obs_dim, 84, 84) of values in [0, 255] -> (B, 256)."""
    layers: list[nn.Module] = [Scaled(1 / 255), ChannelsLast()]
    channels = obs_dim
    for width in (16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
        for _ in range(2):
            convolutions = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            layers.append(Residual(*(layer for convolution in convolutions for layer in (nn.ReLU(), convolution))))
        channels = width
    return nn.Sequential(*layers, nn.ReLU(), FlattenPixels(), nn.Linear(11 * 11 * 32, 256), nn.ReLU())


def impala_cnn(obs_dim: int, out_dim: int = 1) -> nn.Sequential:
    """Build the 15-convolution network of Espeholt et al. (2018), arxiv.org/abs/1802.01561, figure 3, without LSTM.

    Images (B, obs_dim, 84, 84) of values in [0, 255] -> (B, out_dim).
    """
    return nn.Sequential(*impala_trunk(obs_dim), nn.Linear(256, out_dim))


def shared_impala_cnn(obs_dim: int, act_dim: int) -> SharedTrunk:
    """Build one `impala_cnn` for policy and value: images (B, obs_dim, 84, 84) -> (B, act_dim) and (B, 1)."""
    return SharedTrunk(impala_trunk(obs_dim), nn.Linear(256, act_dim), nn.Linear(256, 1))


def orthogonal_(network: nn.Module, last_gain: float, generator: torch.Generator | None = None) -> None:
    """Initialize linear and convolutional layers orthogonally: gain sqrt(2), `last_gain` for the last; biases 0.

    With a small last gain (0.01 for a policy), the initial policy is nearly the same everywhere: Andrychowicz et al.
    (2021), arxiv.org/abs/2006.05990, section 3.2. In a `SharedTrunk`, it is the policy's; the value's last gain is 1.
    """
    if isinstance(network, SharedTrunk):
        for part, gain in ((network.trunk, 2.0**0.5), (network.policy, last_gain), (network.value, 1.0)):
            orthogonal_(part, gain, generator)
        return
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    for layer in layers:
        gain = last_gain if layer is layers[-1] else 2.0**0.5
        weight = nn.init.orthogonal_(torch.empty_like(layer.weight), gain, generator=generator)
        with torch.no_grad():
            if is_parametrized(layer, "weight"):
                layer.weight = weight  # sets the underlying parameters so that it becomes this
            else:
                layer.weight.copy_(weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
