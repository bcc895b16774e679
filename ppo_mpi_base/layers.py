# SPDX-License-Identifier: MIT
"""Networks of torch's layers as plain data, so that a saved policy needs neither the user's code nor a pickle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from ppo_mpi_base.networks import ChannelsLast, FlattenPixels, Residual, Scaled, SharedTrunk, SpaceToDepthConv2d

# What is needed to rebuild each layer, besides its weights: the names are both attributes and constructor arguments.
CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p", "inplace"),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.Softmax: ("dim",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.Tanh: (),
    nn.ReLU: ("inplace",),
    nn.SiLU: ("inplace",),
    nn.Mish: ("inplace",),
    nn.SELU: ("inplace",),
    nn.Sigmoid: (),
    nn.Identity: (),
    Scaled: ("factor",),
    ChannelsLast: (),
    FlattenPixels: (),
    SpaceToDepthConv2d: ("in_channels", "out_channels", "kernel_size", "stride"),
}
# Modules that hold other networks, and how to build them from these.
CONTAINERS: dict[type[nn.Module], Callable[[dict[str, nn.Module]], nn.Module]] = {
    nn.Sequential: lambda parts: nn.Sequential(OrderedDict(parts)),
    Residual: lambda parts: Residual(OrderedDict(parts)),
    SharedTrunk: lambda parts: SharedTrunk(**parts),
}
BY_NAME = {kind.__name__: kind for kind in (*LAYERS, *CONTAINERS)}
WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)


def describe(network: nn.Module) -> dict[str, Any] | None:
    """Return a network of these layers and containers, at any depth, as data for JSON; None if it has any other.

    A layer with forward hooks counts as another: they may change what it does, as `nn.utils.spectral_norm`'s does. So
    does a network with a `distribution` of its own.
    """
    if network._forward_hooks or network._forward_pre_hooks or hasattr(network, "distribution"):
        return None
    if type(network) in CONTAINERS:
        parts = {name: describe(layer) for name, layer in network._modules.items() if layer is not None}
        return None if None in parts.values() else {"layer": type(network).__name__, "parts": parts}
    names = LAYERS.get(type(network))
    if names is None:
        return None
    description = {"layer": type(network).__name__, **{name: getattr(network, name) for name in names}}
    if isinstance(network, WITH_BIAS):
        description["bias"] = network.bias is not None
    return description


def build(description: dict[str, Any]) -> nn.Module:
    """Return the network that `describe` has described, with new weights."""
    kind = description["layer"]
    if "parts" in description:
        parts = {name: build(part) for name, part in description["parts"].items()}
        return CONTAINERS[BY_NAME[kind]](parts)
    arguments = {name: tuple(x) if isinstance(x, list) else x for name, x in description.items() if name != "layer"}
    return BY_NAME[kind](**arguments)
