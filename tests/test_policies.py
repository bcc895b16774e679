# SPDX-License-Identifier: MIT
"""Distributions against torch.distributions, and what stands between networks and spaces."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.network_checks import check_networks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import (
    ActorCritic,
    Categorical,
    Gaussian,
    action_dim,
    action_noise,
    observation_dim,
)

BOX4 = Box(-np.inf, np.inf, (4,))
ACTION_SPACES = [
    Box(-1.0, 1.0, (1,)),
    Box(-2.0, 0.5, (3,)),
    Box(-np.inf, np.inf, (2,)),
    Box(-1.0, 1.0, (2, 3)),
    Box(-1.0, 1.0, ()),
    Discrete(2),
    Discrete(5, start=-3),
]
every_action_space = pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
shapes = st.sampled_from([(), (1,), (3,), (2, 3)])
seeds = st.integers(0, 2**32)


def actor_critic(observations: gymnasium.Space, actions: gymnasium.Space, **keywords: Any) -> ActorCritic:
    torch.manual_seed(0)
    n = observation_dim(observations)
    return ActorCritic(mlp(n, action_dim(actions), (8,)), mlp(n, 1, (8,)), observations, actions, **keywords)


class Both(nn.Module):
    """A trunk with two heads."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.trunk, self.pi, self.v = nn.Linear(obs_dim, 5), nn.Linear(5, act_dim), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.trunk(x))
        return self.pi(x), self.v(x)


@given(seed=seeds, batch=st.integers(1, 5), shape=shapes, one_each=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_gaussian_is_torchs(seed: int, batch: int, shape: tuple[int, ...], one_each: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    mean, actions = (torch.randn(batch, *shape, generator=random, dtype=torch.float64) for _ in range(2))
    log_std = torch.randn((batch, *shape) if one_each else shape, generator=random, dtype=torch.float64)
    mine = Gaussian(mean, log_std)
    theirs = Independent(Normal(mean, log_std.exp().expand(mean.shape)), len(shape))
    torch.testing.assert_close(mine.log_prob(actions), theirs.log_prob(actions), rtol=1e-10, atol=1e-10)
    # Summed over dimensions, not averaged: else an entropy bonus is too weak by their number.
    torch.testing.assert_close(mine.entropy(), theirs.entropy(), rtol=1e-10, atol=1e-10)
    assert mine.log_prob(actions).shape == mine.entropy().shape == (batch,)
    assert torch.equal(mine.mode(), mean)
    noise = torch.randn(batch, *shape, generator=random, dtype=torch.float64)
    torch.testing.assert_close(mine.sample(noise), mean + log_std.exp() * noise)


@given(seed=seeds, batch=st.integers(1, 5), n=st.integers(1, 7), scale=st.sampled_from([1.0, 100.0]))
@settings(max_examples=30, deadline=None)
def test_a_categorical_is_torchs(seed: int, batch: int, n: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, n, generator=random, dtype=torch.float64)
    actions = torch.randint(n, (batch,), generator=random)
    mine, theirs = Categorical(logits), TorchCategorical(logits=logits)
    torch.testing.assert_close(mine.log_prob(actions), theirs.log_prob(actions), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.entropy(), theirs.entropy(), rtol=1e-10, atol=1e-10)
    assert torch.equal(mine.mode(), theirs.mode)
    assert mine.log_prob(actions).shape == mine.entropy().shape == (batch,)


def test_actions_that_are_not_allowed_add_nothing_to_entropy_and_gradient() -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.5], [-torch.inf, 0.0, -torch.inf]], dtype=torch.float64)
    free = logits.clone().requires_grad_()
    entropy = Categorical(free).entropy()
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    (gradient,) = torch.autograd.grad(entropy.sum(), free)
    p = torch.tensor([0.5, 1.5], dtype=torch.float64).softmax(0)
    of_allowed = -p * (p.log() + entropy[0].detach())
    torch.testing.assert_close(gradient[0], torch.stack([of_allowed[0], torch.zeros_like(p[0]), of_allowed[1]]))
    torch.testing.assert_close(gradient[1], torch.zeros_like(gradient[1]))


def test_an_entropy_of_one_action_that_is_certain_is_0() -> None:
    logits = torch.tensor([[0.0, -1e6, 0.0 - 1e6]], requires_grad=True)
    entropy = Categorical(logits).entropy()
    assert entropy.item() == 0.0
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_noise_samples_what_the_logits_say() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    noise = torch.as_tensor(action_noise(Discrete(4), np.random.default_rng(0), 40_000))
    actions = Categorical(logits.expand(40_000, 4)).sample(noise)
    frequencies = torch.bincount(actions, minlength=4) / 40_000
    # Three standard errors of a frequency are at most 0.0075.
    torch.testing.assert_close(frequencies, logits.softmax(0).float(), rtol=0, atol=0.0075)


def test_noise_samples_the_mean_and_spread_of_a_gaussian() -> None:
    noise = torch.as_tensor(action_noise(Box(-1, 1, (2,)), np.random.default_rng(0), 40_000))
    mean, log_std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, -2.0])
    actions = Gaussian(mean.expand(40_000, 2), log_std).sample(noise.float())
    torch.testing.assert_close(actions.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(actions.std(0), log_std.exp(), rtol=0.02, atol=0)


@every_action_space
def test_noise_is_one_row_an_action_from_its_generator(space: gymnasium.Space) -> None:
    noise = action_noise(space, np.random.default_rng(3), 6)
    assert noise.shape == ((6, space.n) if isinstance(space, Discrete) else (6, *(space.shape or ())))
    np.testing.assert_array_equal(noise, action_noise(space, np.random.default_rng(3), 6))
    rows = action_noise(space, np.random.default_rng(3), 2)
    np.testing.assert_array_equal(noise[:2], rows)


@every_action_space
def test_the_ratio_is_exactly_1_for_the_policy_that_acted(space: gymnasium.Space) -> None:
    policy = actor_critic(BOX4, space, initial_log_std=1.0)
    observations = torch.randn(6, 4)
    noise = torch.as_tensor(action_noise(space, np.random.default_rng(0), 6), dtype=torch.float32)
    actions, sent = policy.act(observations, noise)
    old = policy.policy(observations).log_prob(actions)
    ratio = (policy.policy_and_value(observations)[0].log_prob(actions) - old).exp()
    assert torch.equal(ratio, torch.ones(6))
    assert actions.shape == sent.shape == (6, *(space.shape or ()))
    for action in sent.detach().numpy():
        assert space.contains(action if space.shape else action.astype(space.dtype))  # type: ignore[arg-type]


def test_environments_get_the_clipped_action_and_the_loss_the_other() -> None:
    space = Box(np.array([-1.0, 0.0]), np.array([0.5, np.inf]), dtype=np.float64)
    policy = actor_critic(BOX4, space, initial_log_std=2.0)
    actions, sent = policy.act(torch.randn(50, 4), torch.randn(50, 2))
    assert (actions != sent).any()
    np.testing.assert_array_equal(sent.detach().numpy(), np.clip(actions.detach().numpy(), space.low, space.high))


def test_discrete_actions_count_from_the_spaces_start() -> None:
    policy = actor_critic(BOX4, Discrete(3, start=10))
    actions, sent = policy.act(torch.randn(40, 4), torch.randn(40, 3))
    assert sorted(set(actions.tolist())) == [0, 1, 2]
    assert torch.equal(sent, actions + 10)


def test_dimensions() -> None:
    assert [observation_dim(s) for s in (BOX4, Box(0, 255, (3, 84, 84), np.uint8), Box(0, 1, ()), Discrete(7))] == [
        4,
        3,
        1,
        7,
    ]
    assert [action_dim(s) for s in ACTION_SPACES] == [1, 3, 2, 6, 1, 2, 5]


def test_discrete_observations_are_one_hot_from_the_spaces_start() -> None:
    seen = actor_critic(Discrete(3, start=-1), Discrete(2)).preprocess(torch.tensor([-1, 1, 0]))
    assert torch.equal(seen, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]))


def test_observations_reach_the_network_in_the_default_dtype() -> None:
    for dtype in (np.uint8, np.float64, np.int32):
        space = Box(0, 100, (4,), dtype)
        seen = actor_critic(space, Discrete(2)).preprocess(torch.as_tensor(np.arange(8, dtype=dtype).reshape(2, 4)))
        assert torch.equal(seen, torch.arange(8.0).view(2, 4))


def test_normalized_observations() -> None:
    policy = actor_critic(Box(-np.inf, np.inf, (2,), np.float64), Discrete(2), normalize_observations=True)
    raw = torch.tensor([[1e6 + 0.5, 3.0], [1e6 - 1.0, 1e9], [1e6, -1e9]], dtype=torch.float64)
    torch.testing.assert_close(policy.preprocess(raw), raw.clamp(-10, 10).float())
    policy.set_observation_moments(np.array([1e6, 1.0]), np.array([0.5, 2.0]))
    wanted = torch.tensor([[1.0, 1.0], [-2.0, 10.0], [0.0, -10.0]])
    # In float64, since a large mean leaves nothing of the difference in float32.
    torch.testing.assert_close(policy.preprocess(raw), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(policy.value(raw), policy.value_network(wanted).reshape(-1))  # type: ignore[misc]


@pytest.mark.parametrize("space", [Box(0, 255, (4,), np.uint8), Discrete(4)], ids=str)
def test_what_cannot_be_normalized_is_told(space: gymnasium.Space) -> None:
    with pytest.raises(ConfigurationError, match="normalize_observations=True needs a Box of floats"):
        actor_critic(space, Discrete(2), normalize_observations=True)


@every_action_space
def test_two_networks_or_one_that_gives_both(space: gymnasium.Space) -> None:
    two = actor_critic(BOX4, space)
    one = ActorCritic(Both(4, action_dim(space)), None, BOX4, space)
    noise = torch.as_tensor(action_noise(space, np.random.default_rng(0), 5), dtype=torch.float32)
    for policy in (two, one):
        observations = torch.randn(5, 4)
        distribution, values = policy.policy_and_value(observations)
        assert values.shape == distribution.entropy().shape == (5,)
        torch.testing.assert_close(values, policy.value(observations))
        torch.testing.assert_close(distribution.mode(), policy.policy(observations).mode())
        assert torch.equal(policy.act(observations, noise)[0], policy.policy(observations).sample(noise))
        actions, sent, log_probs, seen_values = policy.act_and_evaluate(observations, noise)
        torch.testing.assert_close((actions, sent), policy.act(observations, noise))
        torch.testing.assert_close((log_probs, seen_values), (distribution.log_prob(actions), values))


def test_each_parameter_belongs_to_one_slice() -> None:
    two = actor_critic(BOX4, Box(-1, 1, (2,)))
    slices = two.parameter_slices()
    assert {id(p) for p in slices["value"]} == {id(p) for p in two.value_network.parameters()}  # type: ignore[union-attr]
    assert {id(p) for p in slices["policy"]} == {id(p) for p in (*two.network.parameters(), two.log_std)}
    one = ActorCritic(Both(4, 2), None, BOX4, Box(-1, 1, (2,)))
    assert {id(p) for p in one.parameter_slices()["policy"]} == {id(p) for p in one.parameters()}
    assert list(one.parameter_slices()) == ["policy"]


def test_a_shared_layer_is_trained_once() -> None:
    trunk = nn.Linear(4, 5)
    shared = ActorCritic(
        nn.Sequential(trunk, nn.Linear(5, 2)), nn.Sequential(trunk, nn.Linear(5, 1)), BOX4, Discrete(2)
    )
    counted = [id(p) for part in shared.parameter_slices().values() for p in part]
    assert len(counted) == len(set(counted)) == 6


def test_the_standard_deviation_starts_where_it_is_told() -> None:
    policy = actor_critic(BOX4, Box(-1, 1, (2, 3)), initial_log_std=-0.7)
    assert torch.equal(policy.log_std, torch.full((2, 3), -0.7)) and policy.log_std.requires_grad
    assert policy.policy(torch.zeros(1, 4)).entropy().item() == pytest.approx(
        6 * (-0.7 + 0.5 * math.log(2 * math.pi * math.e))
    )
    assert not hasattr(actor_critic(BOX4, Discrete(2)), "log_std")


class Gives(nn.Module):
    """A module whose output has the given shape, or is whatever was given."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return torch.zeros(len(x), *self.what) if isinstance(self.what, tuple) else self.what


class Pair(Gives):
    """A module that gives two outputs."""

    def forward(self, x: Tensor) -> Any:
        return tuple(torch.zeros(len(x), *shape) for shape in self.what)


GOOD, VALUE = Gives((3,)), Gives((1,))
WRONG: list[tuple[Any, Any, str]] = [
    (Gives((2,)), VALUE, r"network_fn: the module returns shape \(2, 2\) for 2 observations .* needs \(2, 3\)"),
    (Gives(()), VALUE, r"network_fn: .*\(2, 3\)"),
    (Gives("x"), VALUE, "network_fn: the module returns shape str"),
    (GOOD, Gives((2,)), r"value_network_fn: the module returns values of shape \(2, 2\)"),
    (GOOD, Gives(None), "value_network_fn: .* NoneType"),
    (nn.Linear(5, 3), VALUE, "network_fn: the module fails on observations .*shapes cannot be multiplied"),
    (GOOD, nn.Linear(5, 1), "value_network_fn: the module fails"),
    (GOOD, None, "value_network_fn is missing"),
    (Pair(((3,), (4,))), None, r"network_fn: the module returns values of shape \(2, 4\)"),
    (Pair(((2,), (1,))), None, r"network_fn: the module returns shape \(2, 2\)"),
]


@pytest.mark.parametrize(("network", "value_network", "text"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_networks_of_a_wrong_shape_are_told_at_once(network: Any, value_network: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as raised:
        check_networks(ActorCritic(network, value_network, BOX4, Discrete(3)), torch.zeros(2, 4))
    assert "\n" not in str(raised.value)


class Choosing(nn.Module):
    """Chooses a distribution made by a function of its outputs."""

    def __init__(self, make: Any, outputs: int = 2) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, outputs), make

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def distribution(self, outputs: Tensor) -> Any:
        return self.make(outputs)


class Flat(Gaussian):
    """Forgets to sum over action dimensions."""

    def log_prob(self, actions: Tensor) -> Tensor:
        return -actions.square()


def both_of(outputs: Tensor) -> Gaussian:
    return Gaussian(*outputs.chunk(2, -1))


def test_a_network_chooses_its_distribution() -> None:
    policy = ActorCritic(Choosing(both_of), mlp(4), BOX4, Box(-1.0, 1.0, (1,)), initial_log_std=-3.0)
    seen = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    check_networks(policy, seen)
    assert "log_std" not in policy.state_dict(), "nothing would train it"
    mean, log_std = policy.network(seen).chunk(2, -1)
    theirs = Independent(Normal(mean, log_std.exp()), 1)
    actions = policy.policy(seen).sample(torch.ones(5, 1))
    torch.testing.assert_close(actions, mean + log_std.exp())
    torch.testing.assert_close(policy.policy(seen).log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(policy.policy_and_value(seen)[0].entropy(), theirs.entropy())
    with policy.idling("policy"):  # zeros may be no valid parameters
        idle = policy.network(torch.zeros(7, 4))
    torch.testing.assert_close(idle, policy.network(seen[:1]).detach().expand(7, 2))
    assert policy.network(seen).shape == (5, 2)


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (Choosing(lambda outputs: outputs), "the module's distribution fails: AttributeError: .*sample"),
        (Choosing(lambda outputs: Flat(*outputs.chunk(2, -1))), r"log_prob\(actions\) .* shape \(3, 1\) .* be \(3,\)"),
        (
            Choosing(lambda outputs: Gaussian(outputs, outputs)),
            r"sample\(noise\) .* shape \(3, 2\) .* must be \(3, 1\)",
        ),
        (type("Two", (Choosing,), {"forward": lambda self, x: (x, x)})(both_of), "returns tuple for 3 .* one tensor"),
        (
            type("One", (Choosing,), {"forward": lambda self, x: x[:1, :2]})(both_of),
            r"returns \(1, 2\) for 3 obs.* one",
        ),
    ],
)
def test_what_is_wrong_with_a_networks_own_distribution_is_told(network: nn.Module, text: str) -> None:
    policy = ActorCritic(network, mlp(4), BOX4, Box(-1.0, 1.0, (1,)))
    with pytest.raises(ConfigurationError, match=f"^network_fn: .*{text}"):
        check_networks(policy, torch.zeros(3, 4))


class Cold(Categorical):
    """Forgets what kind of numbers actions are."""

    def sample(self, noise: Tensor) -> Tensor:
        return super().sample(noise) + self.logits.new_zeros(())


def test_discrete_actions_of_a_distribution_of_ones_own_are_integers() -> None:
    policy = ActorCritic(Choosing(Categorical, 3), mlp(4), BOX4, Discrete(3))
    check_networks(policy, torch.zeros(5, 4))
    assert policy.act(torch.zeros(5, 4), torch.zeros(5, 3))[0].dtype == torch.int64
    for made, outputs in ((Cold, 3), (Categorical, 4)):  # a float; and an action too many, if noise chooses it
        policy = ActorCritic(Choosing(made, outputs), mlp(4), BOX4, Discrete(outputs - (made is Categorical)))
        with pytest.raises(ConfigurationError, match="network_fn: (sample.noise. .*needs int64 from 0 to|.*fails: )"):
            check_networks(policy, torch.zeros(5, 4))


def test_good_networks_pass() -> None:
    for value in (VALUE, Gives(())):
        check_networks(ActorCritic(GOOD, value, BOX4, Discrete(3)), torch.zeros(2, 4))
    check_networks(ActorCritic(Pair(((3,), (1,))), None, BOX4, Discrete(3)), torch.zeros(2, 4))


def test_bfloat16_is_what_networks_multiply_in_and_nothing_else() -> None:
    torch.manual_seed(0)
    network, value_network = nn.Linear(3, 2), nn.Linear(3, 1)
    space = Box(-1, 1, (3,), np.float32)
    half = ActorCritic(network, value_network, space, Discrete(2), precision="bfloat16")
    seen = torch.randn(50, 3)
    policy, values = half.policy_and_value(seen)
    assert isinstance(policy, Categorical) and policy.logits.dtype == values.dtype == torch.float32
    small = seen.bfloat16()
    for found, layer in ((policy.logits, network), (values[:, None], value_network)):
        wanted = (small @ layer.weight.bfloat16().T).float() + layer.bias
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-8)
        assert torch.equal(found, found.bfloat16().float())
        assert not torch.equal(found, layer(seen))
    torch.testing.assert_close(half.value(seen), values)
    assert torch.equal(half.policy(seen).mode(), policy.mode())
    policy.log_prob(torch.zeros(50)).sum().backward()
    assert network.weight.grad is not None and network.weight.grad.dtype == torch.float32


def test_clipped_actions_lie_in_a_space_of_doubles() -> None:
    space = Box(np.array([-0.1, -1 / 3, -np.inf]), np.array([0.1, 0.3, 1e300]), dtype=np.float64)
    policy = ActorCritic(mlp(4, 3), mlp(4), Box(-1, 1, (4,)), space)
    for actions in (torch.full((1, 3), -1e30), torch.full((1, 3), 1e30)):
        assert space.contains(policy.to_environment(actions)[0].numpy())
    assert policy.action_high[0] == np.nextafter(np.float32(0.1), np.float32(0))
