# SPDX-License-Identifier: MIT
"""Policies on disk: back in a new process without MPI, and one clear line for whatever cannot be read."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from torch import Tensor, nn

from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.layers import build, describe
from ppo_mpi_base.networks import (
    ChannelsLast,
    FlattenPixels,
    Residual,
    Scaled,
    SharedTrunk,
    SpaceToDepthConv2d,
    mlp,
    nature_cnn,
    shared_impala_cnn,
    shared_nature_cnn,
)
from ppo_mpi_base.policies import ActorCritic, action_dim, observation_dim
from ppo_mpi_base.saved_policy import describe_space, load_policy, make_space, save_policy

OBSERVATIONS = Box(-np.inf, np.inf, (4,), np.float32)
ACTIONS = Box(np.array([-1.0, -0.5]), np.array([1.0, 0.25]), dtype=np.float32)


class Own(nn.Module):
    """A class of the user's own."""

    def __init__(self, obs_dim: int, act_dim: int, width: int = 5) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(obs_dim, width), nn.Linear(width, act_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


def save(
    directory: Path,
    network_fn: Callable[..., nn.Module] = mlp,
    observations: gymnasium.Space = OBSERVATIONS,
    actions: gymnasium.Space = ACTIONS,
    which: str = "best",
    normalize: bool = False,
    **policy_kwargs: Any,
) -> ActorCritic:
    """Save a policy with random weights, and return it."""
    config = Config(
        total_steps=1,
        env_fn=mlp,
        network_fn=network_fn,
        policy_kwargs=policy_kwargs,
        save_location=str(directory),
        normalize_observations=normalize,
    )
    torch.manual_seed(0)
    network = network_fn(observation_dim(observations), action_dim(actions), **policy_kwargs)
    value = mlp(observation_dim(observations))
    actor_critic = ActorCritic(network, value, observations, actions, -0.5, normalize)
    save_policy(config, which, actor_critic, total_steps=1234, episode_return=math.nan)
    return actor_critic


def expected(actor_critic: ActorCritic, observation: np.ndarray) -> np.ndarray:
    """Return what the environment gets from the policy's most probable action."""
    with torch.no_grad():
        return actor_critic.to_environment(actor_critic.policy(torch.as_tensor(observation)[None]).mode())[0].numpy()


def refused(directory: Path, text: str, **keywords: Any) -> None:
    with pytest.raises(ConfigurationError, match=text) as raised:
        load_policy(directory, **keywords)
    assert "\n" not in str(raised.value) and "load_policy" in str(raised.value)


IN_A_NEW_PROCESS = """
import sys
import numpy as np
from ppo_mpi_base.saved_policy import load_policy
policy = load_policy(sys.argv[1])
observations = np.load(sys.argv[1] + "/observations.npy")
np.save(sys.argv[1] + "/actions.npy", np.stack([policy(observation) for observation in observations]))
assert not [name for name in sys.modules if name.startswith("mpi4py")], "MPI was loaded"
"""


def test_a_normalized_policy_acts_alike_in_a_new_process_without_mpi(tmp_path: Path) -> None:
    actor_critic = save(tmp_path, normalize=True)
    actor_critic.set_observation_moments(np.array([100.0, -3.0, 0.0, 0.5]), np.array([5.0, 0.1, 1.0, 2.0]))
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(tmp_path), normalize_observations=True)
    save_policy(config, "best", actor_critic, 99, 1.5)
    rng = np.random.default_rng(0)
    observations = (actor_critic.observation_mean.numpy() + 3 * rng.standard_normal((20, 4))).astype(np.float32)
    np.save(tmp_path / "observations.npy", observations)
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actions = np.load(tmp_path / "actions.npy")
    wanted = np.stack([expected(actor_critic, observation) for observation in observations])
    np.testing.assert_allclose(actions, wanted, rtol=1e-6, atol=1e-6)
    assert len(np.unique(wanted, axis=0)) > 10, "all actions are at the bounds: the test says nothing"
    description = json.loads((tmp_path / "best.json").read_text())
    assert (description["total_steps"], description["episode_return"]) == (99, 1.5)


def test_a_large_mean_is_subtracted_in_float64(tmp_path: Path) -> None:
    space = Box(-np.inf, np.inf, (4,), np.float64)
    actor_critic = save(tmp_path, observations=space, normalize=True)
    actor_critic.set_observation_moments(np.full(4, 1e7 + 0.3), np.full(4, 0.5))
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(tmp_path), normalize_observations=True)
    save_policy(config, "best", actor_critic, 1, 0.0)
    observation = 1e7 + np.random.default_rng(0).standard_normal(4)
    np.testing.assert_allclose(load_policy(tmp_path)(observation), expected(actor_critic, observation), rtol=1e-5)


@pytest.mark.parametrize("actions", [Discrete(3, start=5), Box(-1, 1, (2, 2)), Box(-np.inf, np.inf, (1,))], ids=str)
def test_actions_belong_to_the_space(tmp_path: Path, actions: gymnasium.Space) -> None:
    actor_critic = save(tmp_path, actions=actions)
    best, sampled = load_policy(tmp_path), load_policy(tmp_path, deterministic=False, seed=1)
    with pytest.raises(ConfigurationError, match="seed=-1 must be a whole number of at least 0"):
        load_policy(tmp_path, deterministic=False, seed=-1)
    again = load_policy(tmp_path, deterministic=False, seed=1)
    drawn = []
    for observation in np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32):
        np.testing.assert_array_equal(best(observation), expected(actor_critic, observation))
        drawn.append(sampled(observation))
        np.testing.assert_array_equal(drawn[-1], again(observation))
        assert actions.contains(drawn[-1]) and actions.contains(best(observation))
    assert len(np.unique(drawn, axis=0)) > 1
    if isinstance(actions, Box):
        assert np.std([drawn[k] - best(np.zeros(4, np.float32)) for k in range(50)]) > 0.1, "no noise"


def test_discrete_observations_and_images(tmp_path: Path) -> None:
    actor_critic = save(tmp_path, observations=Discrete(4, start=1), actions=Discrete(3))
    policy = load_policy(tmp_path)
    for k in range(1, 5):
        assert policy(np.int64(k)) == expected(actor_critic, np.asarray(k))  # type: ignore[arg-type]
    assert {policy(1): "as a key"}, "games in tables look actions up"
    images = Box(0, 255, (2, 84, 84), np.uint8)
    actor_critic = save(tmp_path, nature_cnn, images, Discrete(6))
    image = np.random.default_rng(0).integers(0, 256, (2, 84, 84), np.uint8)
    assert load_policy(tmp_path)(image) == expected(actor_critic, image)
    flipped = image[::-1, :, ::-1]
    assert load_policy(tmp_path)(flipped) == expected(actor_critic, flipped.copy())


def test_the_default_dtype_of_the_one_who_loads_is_free(tmp_path: Path, default_dtype: None) -> None:
    torch.set_default_dtype(torch.float64)
    actor_critic = save(tmp_path)
    observation = np.ones(4, np.float32)
    wanted = expected(actor_critic, observation)
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        for deterministic in (True, False):
            load_policy(tmp_path, deterministic=deterministic)(observation)
        np.testing.assert_allclose(load_policy(tmp_path)(observation), wanted, rtol=1e-5)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_a_class_of_ones_own_needs_its_builder(tmp_path: Path) -> None:
    actor_critic = save(tmp_path, Own, width=7)
    refused(tmp_path, "own class: give network_fn, .* and its policy_kwargs, to load_policy, evaluate")
    refused(tmp_path, "does not fit", network_fn=Own)
    refused(
        tmp_path,
        r"network_fn\(4, \d\) fails .*{'widths': 7}.*: give those",
        network_fn=Own,
        policy_kwargs={"widths": 7},
    )
    policy = load_policy(tmp_path, network_fn=Own, policy_kwargs={"width": 7})
    observation = np.ones(4, np.float32)
    np.testing.assert_array_equal(policy(observation), expected(actor_critic, observation))


def test_a_network_that_gives_values_too(tmp_path: Path) -> None:
    class Both(Own):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x[:, 0]

    config = Config(total_steps=1, env_fn=Both, network_fn=Both, save_location=str(tmp_path))
    actor_critic = ActorCritic(Both(4, 2), None, OBSERVATIONS, ACTIONS)
    save_policy(config, "best", actor_critic, 1, 0.0)
    observation = np.ones(4, np.float32)
    found = load_policy(tmp_path, network_fn=Both)(observation)
    np.testing.assert_array_equal(found, expected(actor_critic, observation))


def test_a_shared_ready_network_needs_no_builder(tmp_path: Path) -> None:
    images = Box(0, 255, (1, 84, 84), np.uint8)
    config = Config(total_steps=1, env_fn=Own, network_fn=shared_nature_cnn, save_location=str(tmp_path))
    actor_critic = ActorCritic(shared_nature_cnn(1, 3), None, images, Discrete(3))
    save_policy(config, "best", actor_critic, 1, 0.0)
    observation = images.sample()
    assert load_policy(tmp_path)(observation) == expected(actor_critic, observation)


def test_another_network_is_told(tmp_path: Path) -> None:
    save(tmp_path)
    refused(tmp_path, "does not fit", network_fn=lambda obs_dim, act_dim: mlp(obs_dim, act_dim, (32,)))
    refused(tmp_path, "does not fit", network_fn=Own)


def test_best_falls_back_to_the_latest(tmp_path: Path) -> None:
    observation = np.ones(4, np.float32)
    latest = save(tmp_path, which="latest", hidden=(3,))
    np.testing.assert_array_equal(load_policy(tmp_path)(observation), expected(latest, observation))
    best = save(tmp_path, which="best")
    np.testing.assert_array_equal(load_policy(tmp_path)(observation), expected(best, observation))
    np.testing.assert_array_equal(load_policy(tmp_path, "latest")(observation), expected(latest, observation))


def test_nothing_saved_is_told(tmp_path: Path) -> None:
    refused(tmp_path, "was a policy saved there")
    refused(tmp_path / "no" / "such", "was a policy saved there")
    (tmp_path / "run" / "saved_model").mkdir(parents=True)
    refused(tmp_path / "run", "did you mean .*/run/saved_model")
    save(tmp_path)
    (tmp_path / "best.json").unlink()
    refused(tmp_path, "was a policy saved there")


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["best.json", "best.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "torn", "noise", "pickle", "torch"])
def test_damaged_files_are_told_and_run_nothing(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path)
    path, trap = tmp_path / file, tmp_path / "trap"
    content = path.read_bytes()
    if damage == "torch":
        torch.save({"network": Malicious(trap)}, path)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "torn": content[:-1],
                "noise": np.random.default_rng(0).bytes(len(content)),
                "pickle": pickle.dumps(Malicious(trap)),
            }[damage]
        )
    refused(tmp_path, "damaged")
    assert not trap.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"layer": "os.system", "command": "true"}},
        {"network": {"layer": "Linear", "in_features": "x", "out_features": 2}},
        {"network": {"layer": "Linear", "in_features": 4, "out_features": 2, "surprise": 1}},
        {"network": 3},
        {"observation_space": {"kind": "Tuple"}},
        {"observation_space": None},
        {"action_space": {"kind": "Box", "shape": [2], "dtype": "float32", "low": "x", "high": "1"}},
    ],
    ids=str,
)
def test_a_description_that_was_tampered_with_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path)
    path = tmp_path / "best.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(tmp_path, "best.json")


def test_a_description_without_its_parts_is_told(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "best.json").write_text('{"format": 1}')
    refused(tmp_path, "best.json")


@pytest.mark.parametrize("content", ['{"format": 2}', '{"format": null}', "{}", "[]", "3", "null"])
def test_another_format_is_told(tmp_path: Path, content: str) -> None:
    save(tmp_path)
    (tmp_path / "best.json").write_text(content)
    refused(tmp_path, "format .* this version reads 1")


NETWORKS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (mlp(3, 2, (4,)), (3,)),
    (nature_cnn(1, 2), (1, 84, 84)),
    (nn.Linear(3, 2, bias=False), (3,)),
    (nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ELU(0.5)), nn.Sequential(), nn.LeakyReLU(0.3)), (3,)),
    (nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1, 2, 2, bias=False), nn.Flatten(2)), (2, 9)),
    (nn.Sequential(nn.Conv2d(2, 3, (2, 3), (1, 2), (1, 0), padding_mode="circular"), nn.SiLU()), (2, 6, 7)),
    (nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.Sigmoid(), nn.Identity()), (2, 5, 5)),
    (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Softplus(2.0, 5.0)), (1, 5, 5)),
    (nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True), (1, 6, 6)),
    (nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    (nn.Sequential(nn.LayerNorm(3, eps=0.1), nn.GELU("tanh"), nn.Dropout(0.3), Scaled(0.5)), (3,)),
    (nn.LayerNorm((2, 3), elementwise_affine=False), (2, 3)),
    (nn.LayerNorm(3, bias=False), (3,)),
    (shared_nature_cnn(2, 3), (2, 84, 84)),
    (shared_impala_cnn(1, 2), (1, 84, 84)),
    (nn.Sequential(ChannelsLast(), FlattenPixels()), (2, 3, 4)),
    (SpaceToDepthConv2d(2, 3, (4, 6), (2, 3), bias=False), (2, 8, 9)),
    (SharedTrunk(nn.Sequential(nn.Linear(3, 4)), Residual(nn.Linear(4, 4)), nn.Identity()), (3,)),
    (nn.Sequential(OrderedDict(hidden=nn.Linear(3, 4), act=nn.Tanh(), out=nn.Linear(4, 2))), (3,)),
]


@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=[str(n).replace("\n", "")[:60] for n, _ in NETWORKS])
def test_a_network_of_torchs_layers_is_built_anew_from_json(network: nn.Module, shape: tuple[int, ...]) -> None:
    description = describe(network)
    assert description is not None
    again = build(json.loads(json.dumps(description)))
    again.load_state_dict(network.state_dict())
    x = torch.randn(2, *shape)
    torch.testing.assert_close(again.eval()(x), network.eval()(x), rtol=0, atol=0)


def test_what_cannot_be_described_is_not() -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    louder = nn.Linear(3, 2)
    louder.register_forward_hook(lambda module, inputs, output: 2 * output)
    spectral = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 2)))
    for unknown in (
        louder,
        spectral,
        Own(3, 2),
        Louder(3, 2),
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(Louder(3, 2))),
    ):
        assert describe(unknown) is None


SPACES = [
    Discrete(3, start=-2),
    Discrete(3, dtype=np.int32),
    Box(0.0, 1.0, (0,), np.float32),
    OBSERVATIONS,
    ACTIONS,
    Box(-np.inf, np.array([[0.1, np.inf]]), (1, 2), np.float64),
    Box(0, 255, (2, 3), np.uint8),
    Box(-1.0, 1.0, (), np.float32),
    Box(0, 1, (2,), np.bool_),
    Box(np.array([False, True]), np.array([True, True]), dtype=np.bool_),
    Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    Box(np.array([0, 1]), np.array([2**62 + 1, 2**53 + 1]), dtype=np.int64),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space: gymnasium.Space) -> None:
    text = json.dumps(describe_space(space), allow_nan=False)
    again = make_space(json.loads(text))
    assert again == space and again.dtype == space.dtype
    if isinstance(space, Box) and isinstance(again, Box):
        np.testing.assert_array_equal(again.bounded_below, space.bounded_below)
        np.testing.assert_array_equal(again.bounded_above, space.bounded_above)


def test_other_spaces_are_told() -> None:
    with pytest.raises(ConfigurationError, match="only Box, Discrete and Dict"):
        describe_space(MultiBinary(2))


def test_networks_that_share_layers_are_saved(tmp_path: Path) -> None:
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    network, value = nn.Sequential(trunk, nn.Linear(8, 2)), nn.Sequential(trunk, nn.Linear(8, 1))
    actor_critic = ActorCritic(network, value, OBSERVATIONS, ACTIONS)
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(tmp_path))
    save_policy(config, "best", actor_critic, total_steps=1, episode_return=1.0)
    observation = np.ones(4, np.float32)
    np.testing.assert_array_equal(load_policy(tmp_path)(observation), expected(actor_critic, observation))


def test_a_policy_computes_in_the_precision_of_its_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    actor_critic = ActorCritic(mlp(4, 2), mlp(4), OBSERVATIONS, ACTIONS, precision="bfloat16")
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(tmp_path), precision="bfloat16")
    save_policy(config, "best", actor_critic, total_steps=1, episode_return=1.0)
    observation = np.array([0.3, -0.7, 0.11, 0.9], np.float32)
    acts = expected(actor_critic, observation)
    np.testing.assert_array_equal(load_policy(tmp_path)(observation), acts)
    actor_critic.precision = "float32"
    assert (expected(actor_critic, observation) != acts).all()


def test_sizes_may_be_numpys(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(np.prod((4,)), np.int64(8)), nn.Dropout(np.float32(0.5)), nn.Linear(8, 2))  # type: ignore[arg-type]
    actor_critic = ActorCritic(network, mlp(4), OBSERVATIONS, ACTIONS)
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, save_location=str(tmp_path))
    save_policy(config, "best", actor_critic, total_steps=1, episode_return=1.0)
    observation = np.ones(4, np.float32)
    actor_critic.eval()
    np.testing.assert_array_equal(load_policy(tmp_path)(observation), expected(actor_critic, observation))


def test_layers_that_write_into_their_input_do_so_again() -> None:
    network = Residual(OrderedDict(a=nn.ReLU(inplace=True), b=nn.Linear(3, 3)))  # relu(x) + f(relu(x))
    again = build(json.loads(json.dumps(describe(network))))
    again.load_state_dict(network.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(again(x.clone()), network(x.clone()))


@pytest.mark.parametrize("observation", [np.zeros(3, np.float32), np.zeros((1, 4), np.float32), 0.0, {"a": 1}])
def test_an_observation_of_another_shape_is_told(tmp_path: Path, observation: Any) -> None:
    save(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"observation: its shape must be \(4,\), as in training, not (\(|a dict)"
    ):
        load_policy(tmp_path)(observation)
