# SPDX-License-Identifier: MIT
"""Ready networks: what goes in, what comes out, and how they start."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from ppo_mpi_base.networks import (
    FlattenPixels,
    Residual,
    Scaled,
    SharedTrunk,
    SpaceToDepthConv2d,
    impala_cnn,
    mlp,
    nature_cnn,
    orthogonal_,
    shared_impala_cnn,
    shared_nature_cnn,
)


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


def test_the_nature_cnn_computes_what_torchs_layers_do() -> None:
    """In float64, with the gradients of all parameters; its weights are those of plain layers, but for their order."""
    network = nature_cnn(4, 6).double()
    plain = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6)),
    ).double()
    pixel_by_pixel = torch.arange(64 * 49).view(64, 49).t().flatten()  # where plain layers have channel by channel
    for mine, theirs in zip(plain.parameters(), network.parameters(), strict=True):
        mine.data.copy_(theirs.data[:, pixel_by_pixel.argsort()] if theirs.shape == (512, 3136) else theirs.data)
    images = torch.randint(0, 256, (3, 4, 84, 84), generator=torch.Generator().manual_seed(0)).double()
    found = []
    for module, seen in ((network, images), (plain, images / 255)):
        output = module(seen)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    ours, theirs = found
    wanted = [x[:, pixel_by_pixel] if x.shape == (512, 3136) else x for x in theirs]
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [(4, 8, 4, (84, 84)), (1, 8, 4, (85, 87)), (3, (2, 6), (1, 3), (5, 10)), (2, 3, 3, (7, 9)), (2, 3, 1, (5, 4))],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_space_to_depth_is_the_same_convolution(
    channels: int, kernel: int, stride: int, size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    folded = SpaceToDepthConv2d(channels, 5, kernel, stride, bias).double()
    plain = nn.Conv2d(channels, 5, kernel, stride, bias=bias).double()
    plain.load_state_dict(folded.state_dict())
    found = []
    for layer in (folded, plain):
        x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = layer(x.requires_grad_())
        weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found.append([y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid_out", ["in a row", "cut out", "shifted", "channels last"])
def test_space_to_depth_of_what_needs_no_gradient(stride: int, dtype: torch.dtype, laid_out: str) -> None:
    images = torch.randint(0, 256, (2, 3, 33, 35), generator=torch.Generator().manual_seed(0)).to(dtype)
    images = {
        "in a row": images,
        "cut out": images[:, :, 1:, 3:],
        "shifted": images.flatten()[1 : 1 + 2 * 3 * 33 * 34].view(2, 3, 33, 34),
        "channels last": images.contiguous(memory_format=torch.channels_last),
    }[laid_out]
    folded = SpaceToDepthConv2d(3, 5, 2 * stride, stride).to(dtype)
    plain = functional.conv2d(images.double(), folded.weight.double(), folded.bias.double(), stride)  # type: ignore[union-attr]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 4.0}[dtype]
    torch.testing.assert_close(folded(images).double(), plain, rtol=0, atol=tolerance)


def test_space_to_depth_rounds_as_autocast_does() -> None:
    layer, plain = SpaceToDepthConv2d(4, 32, 8, 4), nn.Conv2d(4, 32, 8, 4)
    plain.load_state_dict(layer.state_dict())
    images = torch.rand(2, 4, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(images), plain(images)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


def test_output_layers_of_a_shared_network_compute_in_float32() -> None:
    torch.manual_seed(0)
    network = SharedTrunk(nn.Linear(5, 64), nn.Linear(64, 3), nn.Linear(64, 1))
    seen = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        policy, value = network(seen)
        features = network.trunk(seen)
    assert features.dtype == torch.bfloat16 and policy.dtype == value.dtype == torch.float32
    torch.testing.assert_close((policy, value), (network.policy(features.float()), network.value(features.float())))
    assert not torch.equal(policy, policy.bfloat16().float())


def test_flattened_pixels() -> None:
    images = torch.arange(12.0).view(1, 2, 2, 3)
    wanted = torch.tensor([[0.0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]])
    assert torch.equal(FlattenPixels()(images), wanted)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(FlattenPixels()(last), wanted) and FlattenPixels()(last).data_ptr() == last.data_ptr()


def test_space_to_depth_needs_a_kernel_of_whole_strides() -> None:
    with pytest.raises(ValueError, match="kernel_size=8 must be a multiple of stride=3"):
        SpaceToDepthConv2d(1, 1, 8, 3)


def test_the_impala_cnn_is_that_of_the_paper() -> None:
    network = impala_cnn(4, 6)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        *[(4, 16), *[(16, 16)] * 4],
        *[(16, 32), *[(32, 32)] * 4],
        *[(32, 32), *[(32, 32)] * 4],
    ]
    assert {(m.kernel_size, m.stride, m.padding) for m in convolutions} == {((3, 3), (1, 1), (1, 1))}
    # Each of the three blocks halves the image, rounding up: 84, 42, 21, 11.
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [(32 * 121, 256), (256, 6)]
    assert network(torch.zeros(2, 4, 84, 84)).shape == (2, 6)


def test_the_impala_cnn_against_its_paper_by_hand() -> None:
    torch.manual_seed(0)
    network, relu = impala_cnn(1, 2).double(), functional.relu
    weights = iter(network.parameters())
    images = torch.randint(0, 256, (1, 1, 84, 84)).double()

    def convolved(x: Tensor) -> Tensor:
        return functional.conv2d(x, next(weights), next(weights), padding=1)

    x = images / 255
    for _ in range(3):
        x = functional.max_pool2d(convolved(x), 3, 2, padding=1)
        for _ in range(2):
            x = x + convolved(relu(convolved(relu(x))))
    x = relu(functional.linear(relu(x).permute(0, 2, 3, 1).flatten(1), next(weights), next(weights)))
    torch.testing.assert_close(network(images), functional.linear(x, next(weights), next(weights)))


def test_a_residual_adds_its_input() -> None:
    torch.testing.assert_close(Residual(Scaled(0.5), Scaled(3.0))(torch.tensor([4.0])), torch.tensor([10.0]))


@pytest.mark.parametrize("network_fn", [shared_nature_cnn, shared_impala_cnn])
def test_a_shared_network_gives_both_from_the_same_features(network_fn: Callable[[int, int], SharedTrunk]) -> None:
    network, images = network_fn(2, 5), torch.full((3, 2, 84, 84), 7.0)
    logits, values = network(images)
    assert logits.shape == (3, 5) and values.shape == (3, 1)
    features = network.trunk(images)
    torch.testing.assert_close((logits, values), (network.policy(features), network.value(features)))


def test_a_shared_network_starts_with_equal_actions_and_a_value_of_its_own() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    network = SharedTrunk(trunk, nn.Linear(8, 3), nn.Linear(8, 1))
    orthogonal_(network, 0.01)
    for layer, gain in ((trunk[0], math.sqrt(2)), (network.policy, 0.01), (network.value, 1.0)):
        singular = torch.linalg.svdvals(layer.weight.detach())
        torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=1e-6)
        assert not layer.bias.any()


def test_the_nature_cnn_sees_bytes_from_0_to_1() -> None:
    network, images = nature_cnn(1, 2), torch.full((1, 1, 84, 84), 255.0)
    torch.testing.assert_close(network(images), network[1:](torch.ones(1, 1, 84, 84)))
    assert torch.equal(Scaled(0.5)(torch.tensor([4.0])), torch.tensor([2.0]))


@pytest.mark.parametrize("parametrized", [weight_norm, spectral_norm])
def test_layers_whose_weight_is_computed_start_orthogonal_too(parametrized: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.Sequential(parametrized(nn.Linear(9, 4)), nn.Tanh(), parametrized(nn.Linear(4, 2))).eval()
    orthogonal_(network, 0.5)
    # A spectral norm divides by the largest singular value, of which it has an estimate.
    for layer, gain in ((network[0], 2.0**0.5), (network[2], 0.5)):
        products = layer.weight @ layer.weight.T
        assert torch.allclose(products / products[0, 0], torch.eye(len(products)), atol=1e-5)
        assert parametrized is spectral_norm or products[0, 0].item() == pytest.approx(gain**2)


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
