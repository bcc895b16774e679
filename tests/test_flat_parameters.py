# SPDX-License-Identifier: MIT
"""The flat tensors, and clipping and Adam on them against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppo_mpi_base.flat_parameters import Adam, FlatParameters, clip_scale
from ppo_mpi_base.networks import mlp


def networks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return mlp(3, 2, (5,)).to(dtype), mlp(3, 1, (4,)).to(dtype)


def flat_of(policy: nn.Module, value: nn.Module, statistics: int = 0) -> FlatParameters:
    return FlatParameters({"policy": list(policy.parameters()), "value": list(value.parameters())}, statistics)


def backward(policy: nn.Module, value: nn.Module, k: int = 0) -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    (policy(x).square().sum() + 3 * (value(x) - 1).square().sum()).backward()


def test_parameters_keep_their_values_and_become_views() -> None:
    policy, value = networks()
    before = [p.detach().clone() for net in (policy, value) for p in net.parameters()]
    flat = flat_of(policy, value, statistics=3)
    assert all(torch.equal(a, b) for a, b in zip(flat.parameters(), before, strict=True))
    assert torch.equal(flat.data, torch.cat([p.flatten() for p in before]))
    n = sum(p.numel() for p in policy.parameters())
    assert flat.slices == {"policy": slice(0, n), "value": slice(n, len(flat.data))}
    assert flat.message.shape == (len(flat.data) + 3,) and flat.message.is_contiguous() and not flat.message.any()
    flat.data.fill_(2.0)
    assert all((p == 2).all() for net in (policy, value) for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_without_blas_is_the_same_but_for_rounding(dtype: torch.dtype) -> None:
    policy, value = networks(dtype)
    flat = flat_of(policy, value)
    flat.message.normal_(generator=torch.Generator().manual_seed(0))
    exact = flat.gradient[flat.slices["value"]].double().norm().item()
    for flat.blas_is_one in (True, False):
        assert flat.norm("value") == pytest.approx(exact, rel=1e-6 if dtype is torch.float32 else 1e-14)


def test_gradients_accumulate_in_the_message() -> None:
    policy, value = networks()
    twin_policy, twin_value = copy.deepcopy((policy, value))
    flat = flat_of(policy, value, statistics=2)
    for k in range(2):
        backward(policy, value, k)
        backward(twin_policy, twin_value, k)
    wanted = torch.cat([p.grad.flatten() for net in (twin_policy, twin_value) for p in net.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(flat.gradient, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(flat.message[: len(wanted)], flat.gradient) and not flat.statistics.any()
    flat.statistics.fill_(5.0)
    assert flat.message[-2:].tolist() == [5.0, 5.0] and flat.attached()
    assert torch.equal(torch.cat([part.flatten() for part in flat.parts]), flat.message)
    assert not any(part._is_view() for part in flat.parts), "which would be compiled for any size"
    flat.message.zero_()
    assert all(not p.grad.any() for p in flat.parameters())  # type: ignore[union-attr]


def test_what_cuts_the_views_is_noticed() -> None:
    for cut in (
        lambda policy: policy.zero_grad(),
        lambda policy: policy.load_state_dict(copy.deepcopy(policy.state_dict()), assign=True),
        lambda policy: setattr(policy[1].weight, "data", policy[1].weight.data.clone()),
        lambda policy: setattr(policy[-1].bias, "grad", policy[-1].bias.grad.clone()),
    ):
        policy, value = networks()
        flat = flat_of(policy, value)
        backward(policy, value)
        assert flat.attached()
        cut(policy)
        # A parameter that was replaced is no longer the one that the flat tensor knows.
        own = {id(p) for p in flat.parameters()}
        assert not flat.attached() or not all(id(p) in own for p in policy.parameters())


def test_loading_a_state_keeps_the_views() -> None:
    policy, value = networks()
    flat = flat_of(policy, value)
    state = {name: torch.full_like(x, 0.5) for name, x in policy.state_dict().items()}
    policy.load_state_dict(state)
    assert flat.attached() and (flat.data[flat.slices["policy"]] == 0.5).all()


def test_a_parameter_of_two_slices_belongs_to_the_first_and_a_frozen_one_to_none() -> None:
    shared, own, frozen = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2).requires_grad_(False)
    flat = FlatParameters(
        {"policy": [*shared.parameters(), *frozen.parameters()], "value": [*shared.parameters(), *own.parameters()]}
    )
    assert flat.slices == {"policy": slice(0, 6), "value": slice(6, 9)}
    assert {id(p) for p in flat.parameters()} == {id(p) for p in (*shared.parameters(), *own.parameters())}


def test_views_have_the_parameters_shapes_and_order() -> None:
    flat = flat_of(*networks())
    views = flat.views(torch.arange(len(flat.data)))
    assert [v.shape for v in views] == [p.shape for p in flat.parameters()]
    assert torch.equal(torch.cat([v.flatten() for v in views]), torch.arange(len(flat.data)))


def test_adam_is_torchs_over_100_steps() -> None:
    policy, value = networks()
    twin_policy, twin_value = copy.deepcopy((policy, value))
    flat = flat_of(policy, value)
    adam = Adam(flat, epsilon=1e-5)
    rates = {"policy": 3e-3, "value": 1e-2}
    theirs = {
        "policy": torch.optim.Adam(twin_policy.parameters(), lr=rates["policy"], eps=1e-5),
        "value": torch.optim.Adam(twin_value.parameters(), lr=rates["value"], eps=1e-5),
    }
    for k in range(100):
        flat.message.zero_()
        twin_policy.zero_grad()
        twin_value.zero_grad()
        backward(policy, value, k)
        backward(twin_policy, twin_value, k)
        rates["value"] *= 0.99
        theirs["value"].param_groups[0]["lr"] = rates["value"]
        # The policy rests now and then, so that the slices' numbers of steps differ.
        moved = {name: rates[name] for name in (("value",) if k % 4 == 3 else ("policy", "value"))}
        gradient = flat.gradient.clone()
        adam.step(moved)
        assert torch.equal(flat.gradient, gradient)
        for name in moved:
            theirs[name].step()
    wanted = torch.cat([p.detach().flatten() for net in (twin_policy, twin_value) for p in net.parameters()])
    torch.testing.assert_close(flat.data, wanted, rtol=1e-10, atol=1e-12)
    assert adam.steps.tolist() == [75, 100] and flat.attached()


def test_a_step_of_one_slice_leaves_the_other_alone() -> None:
    policy, value = networks()
    flat = flat_of(policy, value)
    adam = Adam(flat)
    backward(policy, value)
    before = flat.data.clone()
    adam.step({"value": 0.1})
    n = flat.slices["value"].start
    assert torch.equal(flat.data[:n], before[:n]) and (flat.data[n:] != before[n:]).all()
    assert not adam.first_moment[:n].any() and not adam.second_moment[:n].any()


@given(scale=st.sampled_from([1e-3, 1.0, 1e4]), limit=st.sampled_from([0.1, 1.0, 50.0]), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_each_slice_is_clipped_by_its_own_norm_as_torch_does(scale: float, limit: float, seed: int) -> None:
    policy, value = networks()
    flat = flat_of(policy, value, statistics=1)
    torch.manual_seed(seed)
    flat.message.copy_(scale * torch.randn_like(flat.message))
    before = flat.message.clone()
    twins = [nn.Parameter(p.detach().clone()) for p in policy.parameters()]
    for twin, p in zip(twins, policy.parameters(), strict=True):
        twin.grad = p.grad.clone()  # type: ignore[union-attr]
    their_norm = torch.nn.utils.clip_grad_norm_(twins, limit).item()
    norm = flat.norm("policy")
    assert norm == pytest.approx(their_norm, rel=1e-10)
    clipped = flat.gradient[flat.slices["policy"]] * clip_scale(norm, limit)
    wanted = torch.cat([twin.grad.flatten() for twin in twins])  # type: ignore[union-attr]
    torch.testing.assert_close(clipped, wanted, rtol=2e-5, atol=0)  # torch adds 1e-6 to the norm
    assert torch.equal(flat.message, before)


def test_no_limit_and_a_limit_above_the_norm_change_nothing() -> None:
    assert clip_scale(3.0, None) == clip_scale(3.0, 3.0) == clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == 0.25


def test_a_scaled_step_is_the_step_of_a_scaled_gradient() -> None:
    moved = []
    for scales, factor in (({"policy": 0.5, "value": 0.25}, {}), (None, {"policy": 0.5, "value": 0.25})):
        policy, value = networks()
        flat = flat_of(policy, value)
        adam = Adam(flat)
        for k in range(3):
            flat.message.zero_()
            backward(policy, value, k)
            for name, by in factor.items():
                flat.gradient[flat.slices[name]] *= by
            adam.step({"policy": 1e-2, "value": 1e-3}, scales)
        moved.append(flat.data)
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-14)


def test_the_moments_of_dead_units_become_0_before_they_become_slow() -> None:
    """Numbers below 1.2e-38 take processors a hundred times as long; 0.9 to the power of 900 is one."""
    units, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(units.state_dict())
    flat = FlatParameters({"policy": list(units.parameters())}, 0)
    adam, theirs = Adam(flat), torch.optim.Adam(twin.parameters(), lr=1e-2)
    for k in range(1500):
        flat.message.copy_(torch.linspace(-1, 1, 8))
        if k > 10:
            flat.message[:6] = 0.0
        for parameter, own in zip(twin.parameters(), units.parameters(), strict=True):
            parameter.grad = own.grad.clone()  # type: ignore[union-attr]
        adam.step({"policy": 1e-2})
        theirs.step()
        assert not ((adam.first_moment != 0) & (adam.first_moment.abs() < torch.finfo(torch.float32).tiny)).any()
    assert not adam.first_moment[:6].any() and adam.first_moment[6:].all() and adam.second_moment.all()
    torch.testing.assert_close(flat.data, torch.cat([p.detach().flatten() for p in twin.parameters()]))
