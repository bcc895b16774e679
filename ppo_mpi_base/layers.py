# SPDX-License-Identifier: MIT
"""Networks of torch's own layers as plain data: a saved policy needs neither the user's code nor a pickle."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ppo_mpi_base.networks import Scaled

# What is needed to build each layer anew, besides its weights: the names are both attributes and constructor arguments.
CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p",),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.Tanh: (),
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Identity: (),
    Scaled: ("factor",),
}
BY_NAME = {kind.__name__: kind for kind in LAYERS}
WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)


def describe(network: nn.Module) -> dict[str, Any] | None:
    """Return a network of these layers, in `nn.Sequential` at any depth, as data for JSON; None if it has any other."""
    if type(network) is nn.Sequential:
        parts = {name: describe(layer) for name, layer in network._modules.items() if layer is not None}
        return None if None in parts.values() else {"layer": "Sequential", "parts": parts}
    names = LAYERS.get(type(network))
    if names is None:
        return None
    description = {"layer": type(network).__name__, **{name: getattr(network, name) for name in names}}
    if isinstance(network, WITH_BIAS):
        description["bias"] = network.bias is not None
    return description


def build(description: dict[str, Any]) -> nn.Module:
    """Return the network of a description by `describe`, with new weights."""
    if description["layer"] == "Sequential":
        return nn.Sequential(OrderedDict((name, build(part)) for name, part in description["parts"].items()))
    arguments = {name: tuple(x) if isinstance(x, list) else x for name, x in description.items() if name != "layer"}
    return BY_NAME[description["layer"]](**arguments)
