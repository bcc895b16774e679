# SPDX-License-Identifier: MIT
"""Observations of a Dict space: the rows that stand for them, the dicts that networks see, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple, flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from ppo_mpi_base.envs import Environments
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.evaluate import evaluate
from ppo_mpi_base.export import export_policy
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.parts import Parts
from ppo_mpi_base.policies import ActorCritic, observation_dim
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.saved_policy import describe_space, load_policy, make_space

LENGTH = 5


class Told(gymnasium.Env):
    """Games of five steps, each of which wants the action that the observation's part "answer" tells."""

    observation_space = Dict(
        {
            "image": Box(0, 255, (2, 3, 3), np.uint8),
            "task": Dict({"answer": Discrete(3, start=1), "where": Box(-1, 1, (2,), np.float32)}),
        }
    )
    action_space = Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.answer - 1)
        self.steps += 1
        return self._observe(), reward, False, self.steps == LENGTH, {}

    def _observe(self) -> dict[str, Any]:
        self.answer = int(self.np_random.integers(1, 4))
        image = np.full((2, 3, 3), 10 * self.steps, np.uint8)
        where = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"image": image, "task": {"answer": self.answer, "where": where}}


class OfParts(nn.Module):
    """A network that looks at all parts, and says if they are not what they should be."""

    def __init__(self, obs_dim: Any, out_dim: int = 1) -> None:
        super().__init__()
        assert obs_dim == {"image": 2, "task": {"answer": 3, "where": 2}}
        self.pixels, self.out = nn.Linear(18, 2), nn.Linear(7, out_dim)

    def forward(self, seen: dict[str, Any]) -> Tensor:
        image, task = seen["image"], seen["task"]
        assert image.shape[1:] == (2, 3, 3)
        assert task["answer"].shape[1:] == (3,)
        return self.out(torch.cat([self.pixels(image.flatten(1) / 255), task["answer"], task["where"]], 1))


def spaces(depth: int = 1) -> st.SearchStrategy[Any]:
    """Return spaces of which parts can be, with dicts up to a depth."""
    box = st.builds(
        lambda shape, dtype: Box(0, 9, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=3),
        st.sampled_from([np.float32, np.float64, np.uint8, np.int32]),
    )
    plain = box | st.builds(Discrete, st.integers(1, 4), start=st.integers(-2, 2))
    return plain | dicts(depth - 1) if depth else plain


def dicts(depth: int = 1) -> st.SearchStrategy[Dict]:
    parts = st.lists(st.tuples(st.sampled_from("cab"), spaces(depth)), min_size=1, max_size=3, unique_by=lambda x: x[0])
    return st.builds(Dict, parts)


@given(dicts(), st.integers(0, 2**31 - 1))
def test_networks_see_what_the_environment_showed(space: Dict, seed: int) -> None:
    rows = Parts(space)
    space.seed(seed)
    shown = [space.sample() for _ in range(3)]
    joined = [rows.join(x) for x in shown]
    assert all(row.shape == rows.shape and row.dtype == rows.dtype for row in joined)
    seen = rows.split(torch.as_tensor(np.stack(joined)))
    for i, x in enumerate(shown):
        compare(space, x, seen, i)
        np.testing.assert_array_equal(joined[i], flatten(space, x))  # whose dtype may be larger


def compare(space: Dict, shown: dict[str, Any], seen: dict[str, Any], i: int) -> None:
    assert list(seen) == list(space)
    for name, part in space.items():
        if isinstance(part, Dict):
            compare(part, shown[name], seen[name], i)
        elif isinstance(part, Discrete):
            one_hot = [float(part.start + k == shown[name]) for k in range(int(part.n))]
            assert seen[name][i].tolist() == one_hot
        else:
            assert seen[name][i].shape == part.shape
            np.testing.assert_array_equal(seen[name][i].numpy(), shown[name])


@given(dicts())
def test_rows_are_read_back_from_json(space: Dict) -> None:
    rows = Parts(space)
    again = make_space(json.loads(json.dumps(describe_space(rows))))
    assert isinstance(again, Parts)
    assert again == rows
    assert again.dtype == rows.dtype
    np.testing.assert_array_equal(again.low, rows.low)


def test_rows_of_other_parts_are_another_space() -> None:
    a, b = Box(0, 1, (1,)), Box(0, 1, (1,))
    rows = Parts(Dict([("a", a), ("b", b)]))
    assert rows == Parts(Dict([("a", a), ("b", b)]))
    assert rows != Parts(Dict([("b", b), ("a", a)]))  # the same dict, but rows of another order
    assert rows != Box(0, 1, (2,))
    assert Box(0, 1, (2,)) != rows
    assert str(rows) == str(rows.parts)


def test_sizes_by_part() -> None:
    assert observation_dim(Parts(Told.observation_space)) == {"image": 2, "task": {"answer": 3, "where": 2}}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Dict(), r"the observation space is Dict\(\), which has no parts"),
        (Dict({"in": Dict()}), r"the observation space of 'in' is Dict\(\), which has no parts"),
        (Dict({"keys": MultiBinary(3)}), r"the part 'keys' of the observation space is MultiBinary\(3\)"),
        (Dict({"in": Dict({"pair": Tuple([Discrete(2)])})}), "the part 'in.pair' of the observation space"),
    ],
)
def test_other_parts_are_refused_by_name(space: Dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match="^" + message):
        Parts(space)


WRONG = [
    ({"image": np.zeros((2, 3), np.uint8)}, r"the part 'image' of an observation is of shape \(2, 3\)"),
    (
        {"image": np.arange(283, 301).reshape(2, 3, 3) * [[[0], [0], [1]]]},
        "'image' of an observation is of dtype int64, with 289 in it; .*uint8",
    ),
    ({"image": np.full((2, 3, 3), 0.5)}, "'image' of an observation is of dtype float64, with 0.5 in it"),
    ({"task": {"where": np.zeros(2)}}, "the part 'task' of an observation has the parts 'where', but lacks 'answer'"),
    ({"task": {"where": np.zeros(2), "answer": 0}}, r"'task.answer' of an observation is 0, .* Discrete\(3, start=1\)"),
    ({"task": {"where": np.zeros(2), "answer": 4}}, "'task.answer' of an observation is 4"),
    ({"task": {"where": np.zeros(2), "answer": 1.5}}, "'task.answer' of an observation is of dtype float64, with 1.5"),
    ({"task": {"where": np.zeros(2), "answer": None}}, "'task.answer' of an observation is of dtype object"),
    ({"task": {"where": np.zeros(2), "answer": [1, 2]}}, r"'task.answer' of an observation is of shape \(2,\)"),
    ({"task": 7}, "the part 'task' of an observation is not a dict, but int"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_observations_that_are_not_of_their_space_are_told(wrong: dict[str, Any], message: str) -> None:
    space = Told.observation_space
    with pytest.raises(TrainingError, match=message):
        Parts(space).join({**space.sample(), **wrong})


def test_errors_name_the_environment() -> None:
    class Wrong(Told):
        def _observe(self) -> dict[str, Any]:
            return {**super()._observe(), "image": 3}

    environments = Environments([Wrong()], seed=0, first_global_index=12)
    with pytest.raises(TrainingError, match=r"^environment 12: env_fn: the part 'image' .* shape \(\), .*Box"):
        environments.reset(np.zeros((1, 23), np.float32))
    for made in (Told(), SyncVectorEnv([Told])):
        with pytest.raises(ConfigurationError, match="^obs_space_override: the part 'x' of"):
            Environments(
                made if isinstance(made, SyncVectorEnv) else [made],
                seed=0,
                first_global_index=0,
                state_processing_hook=lambda x: x,
                obs_space_override=Dict({"x": MultiBinary(2)}),
            )


def test_a_row_is_no_observation_of_a_dict_space() -> None:
    class Flattens(Told):
        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            return Parts(self.observation_space).join(observation), *rest

    environments, seen = Environments([Flattens()], seed=0, first_global_index=0), np.zeros((1, 23), np.float32)
    environments.reset(seen)
    with pytest.raises(TrainingError, match="not a dict, but ndarray"):
        environments.step(np.zeros(1, np.int64), seen)


def test_numbers_that_other_types_hold_are_taken() -> None:
    shown = {"image": np.full((2, 3, 3), 7, np.int64), "task": {"answer": np.int8(2), "where": [0.5, 1]}}
    row = Parts(Told.observation_space).join(shown)
    assert row.dtype == np.float32
    assert row.tolist() == [7] * 18 + [0, 1, 0, 0.5, 1]


def test_rows_take_no_more_memory_than_the_largest_part_needs() -> None:
    image, kind = Box(0, 255, (4,), np.uint8), Discrete(3)
    assert Parts(Dict({"image": image, "kind": kind})).dtype == np.uint8
    assert Parts(Dict({"image": image, "kind": kind, "x": Box(0, 1, (1,), np.float32)})).dtype == np.float32


def processed(observation: dict[str, Any]) -> dict[str, Any]:
    return {"task": observation["task"], "image": 255 - observation["image"]}


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("hook", [None, processed])
def test_vector_environments_give_the_rows_of_a_list(mode: AutoresetMode, hook: Any) -> None:
    made: list[Any] = [[Told() for _ in range(3)], SyncVectorEnv([Told] * 3, autoreset_mode=mode)]
    shown = []
    for environments in made:
        stepped = Environments(environments, seed=7, first_global_index=0, state_processing_hook=hook)
        assert stepped.observation_space == Parts(Told.observation_space)
        seen = np.zeros((LENGTH + 1, 3, 23), np.float32)
        stepped.reset(seen[0])
        finals = [stepped.step(np.zeros(3, np.int64), x).final_observations for x in seen[1:]]
        assert [len(final) for final in finals] == [0] * (LENGTH - 1) + [3]
        shown.append((seen[:LENGTH], np.stack([finals[-1][i] for i in range(3)])))
    np.testing.assert_array_equal(shown[0][0], shown[1][0])
    np.testing.assert_array_equal(shown[0][1], shown[1][1])
    last = 10 * LENGTH if hook is None else 255 - 10 * LENGTH
    assert (shown[0][1][:, :18] == last).all()


def test_a_vector_environment_that_resets_all_is_told() -> None:
    class ResetsAll(SyncVectorEnv):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return super().reset(seed=seed)

    environments = Environments(
        ResetsAll([Told] * 3, autoreset_mode=AutoresetMode.DISABLED),
        seed=7,
        first_global_index=0,
        first_ep_lens=[2, 9, 9],
    )
    seen = np.zeros((3, 23), np.float32)
    environments.reset(seen)
    environments.step(np.zeros(3, np.int64), seen)
    with pytest.raises(ConfigurationError, match="resets all environments"):
        environments.step(np.zeros(3, np.int64), seen)


def test_a_vector_environment_that_returns_more_than_it_reset_fails() -> None:
    class ReturnsTwo(SyncVectorEnv):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            seen, infos = super().reset(seed=seed, options=options)
            two = {"image": seen["image"][:2], "task": {name: x[:2] for name, x in seen["task"].items()}}
            return (two if seed is None else seen), infos

    made = ReturnsTwo([Told] * 3, autoreset_mode=AutoresetMode.DISABLED)
    environments, seen = Environments(made, seed=7, first_global_index=0, first_ep_lens=[1, 9, 9]), np.zeros((3, 23))
    environments.reset(seen)
    with pytest.raises(ValueError, match="zip"):
        environments.step(np.zeros(3, np.int64), seen)


def keywords(directory: Path, **others: Any) -> dict[str, Any]:
    return {
        "total_steps": 6_000,
        "env_fn": Told,
        "network_fn": OfParts,
        "value_network_fn": OfParts,
        "use_vectorized_envs": True,
        "num_environments": 8,
        "rollout_length_per_worker": 50,
        "train_batch_size": 100,
        "train_pi_epochs": 8,
        "train_v_epochs": 8,
        "pi_lr": 0.01,
        "log_directory": str(directory / "logs"),
        "save_location": str(directory / "saved_model"),
        "quiet": True,
        **others,
    }


def test_a_run_learns_what_one_part_tells(tmp_path: Path) -> None:
    given_out = keywords(tmp_path)
    result = PPO(**given_out)
    assert result.best_return > 0.9 * LENGTH
    policy = load_policy(given_out["save_location"], network_fn=OfParts)
    environment = Told()
    observation, _ = environment.reset(seed=3)
    acted = []
    for _ in range(20):
        acted.append(int(policy(observation)) == environment.answer - 1)
        observation, *_ = environment.step(0)
    assert np.mean(acted) > 0.9
    played = evaluate(given_out["save_location"], Told, episodes=4, network_fn=OfParts)
    assert played.mean > 0.9 * LENGTH


@pytest.mark.parametrize(
    "others",
    [
        {"precision": "bfloat16"},
        {"normalize_observations": True},
        {"make_vec_env_fn": lambda env_fn, n: SyncVectorEnv([env_fn] * n)},
        {"evaluate_every": 400, "evaluate_episodes": 2},
    ],
    ids=lambda others: next(iter(others)),
)
def test_what_else_a_run_may_ask_for(tmp_path: Path, others: dict[str, Any]) -> None:
    assert PPO(**keywords(tmp_path, total_steps=800, **others)).total_steps == 800


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    PPO(**keywords(whole, total_steps=1600))
    for steps in (800, 1600):
        PPO(**keywords(halves, total_steps=steps, resume="auto"))
    tensors = [load_file(directory / "saved_model" / "latest.safetensors") for directory in (whole, halves)]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


def test_an_exported_policy_takes_rows(tmp_path: Path) -> None:
    PPO(**keywords(tmp_path, total_steps=400))
    policy = load_policy(tmp_path / "saved_model", network_fn=OfParts)
    (path,) = export_policy(tmp_path / "saved_model", tmp_path / "policy", formats=["torch"], network_fn=OfParts)
    space = Told.observation_space
    shown = [space.sample() for _ in range(8)]
    rows = torch.as_tensor(np.stack([Parts(space).join(x) for x in shown]))
    acted = torch.export.load(path).module()(rows)
    assert acted.tolist() == [int(policy(x)) for x in shown]


def test_a_hook_sees_the_dicts(tmp_path: Path) -> None:
    def hook(observation: dict[str, Any]) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[observation["task"]["answer"] - 1]

    space = Box(0, 1, (3,), np.float32)
    linear = {"network_fn": nn.Linear, "value_network_fn": lambda obs_dim: nn.Linear(obs_dim, 1)}
    PPO(**keywords(tmp_path, total_steps=800, state_processing_hook=hook, obs_space_override=space, **linear))
    evaluate(str(tmp_path / "saved_model"), Told, episodes=2, state_processing_hook=hook)


def test_networks_that_cannot_take_parts_are_told(tmp_path: Path) -> None:
    for name, network in (("mlp", mlp), ("wrong name", lambda obs_dim, act_dim: nn.Linear(obs_dim["speed"], act_dim))):
        with pytest.raises(
            ConfigurationError, match=r"^network_fn fails for obs_dim=\{'image': 2, .*FlattenObservation"
        ):
            PPO(**keywords(tmp_path / name, network_fn=network))

    class Forgets(OfParts):
        def forward(self, seen: dict[str, Any]) -> Tensor:
            return self.out(seen["img"])

    with pytest.raises(ConfigurationError, match=r"^network_fn: .*'answer': \(2, 3\), .*: KeyError: 'img'"):
        PPO(**keywords(tmp_path / "forgets", network_fn=Forgets))


def test_a_saved_policy_wants_dicts(tmp_path: Path) -> None:
    PPO(**keywords(tmp_path, total_steps=400))
    policy = load_policy(tmp_path / "saved_model", network_fn=OfParts)
    with pytest.raises(TrainingError, match="an observation is not a dict, but ndarray"):
        policy(np.zeros(23))


def test_a_network_of_parts_may_idle() -> None:
    sizes = observation_dim(Parts(Told.observation_space))
    actor_critic = ActorCritic(OfParts(sizes, 3), OfParts(sizes), Parts(Told.observation_space), Discrete(3))
    rows = torch.randn(4, 23)
    with actor_critic.idling("policy"):
        policy, values = actor_critic.policy_and_value(rows)
    assert policy.log_prob(torch.zeros(4)).tolist() == pytest.approx([-np.log(3)] * 4)
    assert values.shape == (4,)
    assert values.abs().min() > 0
