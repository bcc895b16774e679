# SPDX-License-Identifier: MIT
"""Every keyword: its default, its range, and one clear line where a value cannot work."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ppo_mpi_base.config
from ppo_mpi_base.checks import Range
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.keywords import KNOWN_AS, keywords_of
from ppo_mpi_base.ppo import PPO, ppo_losses


def env_fn() -> Any:
    raise AssertionError("a configuration builds nothing")


def network_fn(obs_dim: int, act_dim: int) -> nn.Module:
    return nn.Linear(obs_dim, act_dim)


def config(**keywords: Any) -> Config:
    return Config(**{"total_steps": 1000, "env_fn": env_fn, "network_fn": network_fn, **keywords})


def error_of(**keywords: Any) -> str:
    """Return the one line by which these keywords are refused."""
    with pytest.raises(ConfigurationError) as raised:
        config(**keywords)
    text = str(raised.value)
    assert "\n" not in text
    return text


PUBLIC = {
    "env_kwargs": {},
    "policy_kwargs": {},
    "critic_kwargs": {},
    "seed": 0,
    "rollout_length_per_worker": 512,
    "clip_rewards": False,
    "gamma": 0.99,
    "lam": 0.95,
    "max_ep_len": None,
    "clip_ratio": 0.2,
    "entropy_coef": 0.0,
    "pi_lr": 3e-4,
    "vf_lr": 1e-3,
    "train_batch_size": None,
    "pi_grad_clip": 1.0,
    "v_grad_clip": 1.0,
    "log_directory": "./logs/",
    "save_location": "./saved_model/",
    "device": None,
    "train_pi_epochs": 40,
    "train_v_epochs": 40,
    "target_kl": 0.0,
    "grad_accum": 1,
    "external_update_callback": None,
    "delay_training_for_steps": 0,
    "use_vectorized_envs": False,
    "num_environments": None,
    "make_vec_env_fn": None,
    "rollout_interception_callback": None,
    "state_processing_hook": None,
    "obs_space_override": None,
}


def test_the_public_keywords_keep_their_names_and_defaults() -> None:
    made = config()
    assert {name: getattr(made, name) for name in PUBLIC} == PUBLIC
    # What else changes the training is off unless asked for.
    assert (made.normalize_observations, made.normalize_rewards, made.anneal_lr, made.orthogonal_init) == (False,) * 4
    assert (made.value_clip_ratio, made.value_coef, made.initial_log_std, made.hooks) == (None, 1.0, 0.0, ())


def test_each_keyword_has_a_text_that_says_what_it_means() -> None:
    tree = ast.parse(Path(inspect.getfile(ppo_mpi_base.config)).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config").body
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert told, f"{ast.unparse(node.target)} has no text"


WRONG = [
    ("total_steps", 0, "whole number of at least 1"),
    ("total_steps", 0.5, "whole number"),
    ("total_steps", math.nan, "whole number"),
    ("total_steps", math.inf, "whole number"),
    ("total_steps", "1e6", "whole number"),
    ("seed", -1, "whole number of at least 0"),
    ("seed", True, "whole number"),
    ("rollout_length_per_worker", 0, "at least 1"),
    ("max_ep_len", 0, "at least 1"),
    ("stagger_episodes", 0, "at least 1"),
    ("gamma", 1.01, "number from 0 to 1"),
    ("gamma", -0.01, "number from 0 to 1"),
    ("gamma", math.nan, "from 0 to 1"),
    ("gamma", "0.99", "from 0 to 1"),
    ("gamma", True, "from 0 to 1"),
    ("gamma", None, "from 0 to 1"),
    ("lam", 1.5, "from 0 to 1"),
    ("clip_ratio", 0, "number above 0"),
    ("value_clip_ratio", 0.0, "above 0"),
    ("entropy_coef", -1e-9, "number of at least 0"),
    ("value_coef", 0, "above 0"),
    ("pi_lr", -3e-4, "at least 0"),
    ("vf_lr", math.inf, "at least 0"),
    ("adam_epsilon", 0, "above 0"),
    ("train_batch_size", 0, "at least 1"),
    ("train_batch_size", 2.5, "whole number"),
    ("train_pi_epochs", -1, "at least 0"),
    ("grad_accum", 0, "at least 1"),
    ("pi_grad_clip", 0.0, "above 0"),
    ("v_grad_clip", -1, "above 0"),
    ("target_kl", -0.01, "at least 0"),
    ("initial_log_std", math.nan, "number"),
    ("delay_training_for_steps", -5, "at least 0"),
    ("delay_training_for_steps", 100_000, "must be below total_steps="),
    ("total_steps", 10**400, "whole number of at least 1"),
    ("env_fn", "CartPole-v1", "such as lambda: gymnasium.make('CartPole-v1')"),
    ("quiet", 1, "True or False"),
    ("anneal_lr", "no", "True or False"),
    ("compile", "yes", "'auto'"),
    ("precision", "float16", "'bfloat16'"),
    ("env_kwargs", ["id"], "dict"),
    ("loss_coefficients", 0.1, "dict"),
    ("device", 0, 'such as "cpu" or "cuda:1"'),
    ("network_fn", nn.Linear(1, 1).weight, "function"),
    ("value_network_fn", 3, "function"),
    ("rollout_interception_callback", [], "function"),
    ("log_directory", None, "path"),
    ("save_location", 7, "path"),
    ("device", "gpu", 'choose "cpu"'),
    ("device", "cuda:99", 'choose "cpu"'),
]


@pytest.mark.parametrize(("name", "value", "remedy"), WRONG, ids=[f"{name}={value!r:.12}" for name, value, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_name(name: str, value: object, remedy: str) -> None:
    if isinstance(value, nn.Parameter):
        value = "mlp"
    text = error_of(**{name: value})
    assert text.startswith(f"{name}={value!r}") and remedy in text


@pytest.mark.parametrize("value", ["x", None, math.nan, math.inf])
def test_coefficients_are_numbers(value: object) -> None:
    assert error_of(loss_coefficients={"beta": value}).startswith(f"loss_coefficients['beta']={value!r} must be a num")


def test_tensors_are_made_where_the_package_says() -> None:
    torch.set_default_device("meta")
    try:
        text = error_of()
    finally:
        torch.set_default_device(None)
    assert "torch.set_default_device('meta')" in text and "device='meta'" in text


def test_a_coefficient_that_nothing_reads_is_told() -> None:
    text = error_of(loss_coefficients={"clip_ration": 0.1})
    assert text == (
        "loss_coefficients['clip_ration']: nothing reads it without a loss_fn; did you mean 'clip_ratio'?"
    ), text


def test_coefficients_that_are_keywords_have_their_ranges() -> None:
    text = error_of(loss_coefficients={"clip_ratio": -1})
    assert text.startswith("loss_coefficients['clip_ratio']=-1 must be a number above 0"), text


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config) if f.name not in ("device", "hooks")])
def test_no_keyword_takes_just_anything(name: str) -> None:
    assert name in error_of(**{name: object()})


@given(st.floats())
@settings(deadline=None)
def test_a_fraction_is_any_number_from_0_to_1(value: float) -> None:
    if 0 <= value <= 1:
        assert config(gamma=value, lam=value).gamma == value
    else:
        assert "gamma" in error_of(gamma=value)


@given(low=st.floats(-1e6, 1e6), value=st.floats(), above=st.booleans(), size=st.floats(0, 1e6))
@settings(deadline=None)
def test_a_range_holds_its_ends_but_one_that_is_left_out(low: float, value: float, above: bool, size: float) -> None:
    allowed = Range(low, low + size, above)
    assert (low in allowed) == (not above)
    assert (low + size in allowed) == (low + size > low or not above)
    assert math.inf not in Range(low) and math.nan not in allowed
    assert (value in allowed) == ((low < value if above else low <= value) and value <= low + size)


def test_numbers_arrive_in_the_type_that_the_code_counts_with(tmp_path: Path) -> None:
    made = config(total_steps=1e6, rollout_length_per_worker=128.0, gamma=1, save_location=tmp_path, clip_ratio=1)
    assert (made.total_steps, made.rollout_length_per_worker, made.gamma) == (1_000_000, 128, 1.0)
    assert type(made.total_steps) is type(made.rollout_length_per_worker) is int
    assert type(made.gamma) is type(made.clip_ratio) is float
    assert made.save_location == str(tmp_path)
    assert config(save_location=None, pi_grad_clip=None, v_grad_clip=None, train_pi_epochs=0).save_location is None


def test_numbers_of_numpy_are_numbers() -> None:
    made = config(total_steps=np.int64(5000), seed=np.uint32(3), pi_lr=np.float32(0.5), gamma=np.float64(0.5))
    assert (made.total_steps, made.seed, made.pi_lr, made.gamma) == (5000, 3, 0.5, 0.5)
    assert "total_steps" in error_of(total_steps=np.int64(0))


def test_compile_is_one_of_three() -> None:
    assert [config(compile=value).compile for value in ("auto", True, False)] == ["auto", True, False]
    with pytest.raises(ConfigurationError, match="compile"):
        config(compile="always")
    # 0 equals False, and the code asks `compile is False`: it must not end up as "yes".
    try:
        made = config(compile=0)
    except ConfigurationError:
        return
    assert made.compile is False


def test_keywords_that_need_each_other() -> None:
    assert "use_vectorized_envs=True" in error_of(num_environments=8)
    assert "num_environments" in error_of(use_vectorized_envs=True)
    assert "use_vectorized_envs=True" in error_of(make_vec_env_fn=env_fn)
    assert "state_processing_hook" in error_of(obs_space_override=Box(0, 1, (2,)))
    made = config(use_vectorized_envs=True, num_environments=8, make_vec_env_fn=env_fn)
    assert (made.environments_per_rank, config().environments_per_rank) == (8, 1)
    assert config(obs_space_override=Box(0, 1, (2,)), state_processing_hook=abs).obs_space_override is not None


def test_a_minibatch_larger_than_the_rollout_is_refused() -> None:
    # It would give no update at all, without a word.
    rollout = {"rollout_length_per_worker": 16, "use_vectorized_envs": True, "num_environments": 4}
    assert config(**rollout, train_batch_size=64).minibatch_size == 64
    assert config(**rollout).minibatch_size == 64
    text = error_of(**rollout, train_batch_size=65)
    assert "train_batch_size=65" in text and "at most 64" in text
    assert config(rollout_length_per_worker=16).minibatch_size == 16


def test_hooks_are_a_list_of_hooks() -> None:
    assert "hooks" in error_of(hooks=[object()])
    assert "hooks=[MyHooks()]" in error_of(hooks=Hooks())
    assert "hooks" in error_of(hooks=[Hooks])
    assert error_of(hooks=[Hooks()]).startswith("hooks: Hooks has none of the methods on_start, on_rollout, ")
    own = type("Own", (Hooks,), {"on_end": lambda self, worker: None})
    assert len(config(hooks=[own(), own()]).hooks) == 2


def test_functions_that_take_something_else_are_told() -> None:
    told = error_of(loss_fn=lambda actor_critic, batch: ({}, {}))
    assert told.startswith("loss_fn must accept the arguments (actor_critic, batch, coefficients), but does not: ")
    for name, accepted in {
        "advantage_fn": "rollout, gamma, lam",
        "state_processing_hook": "observation",
        "rollout_interception_callback": "steps",
    }.items():
        text = error_of(**{name: lambda: None})
        assert text.startswith(f"{name} must accept the arguments ({accepted}), but does not"), text
    assert error_of(external_update_callback=lambda worker: 0.0).startswith(
        "external_update_callback must accept the arguments ()"
    )


def test_coefficients_of_the_loss() -> None:
    assert config(clip_ratio=0.1, entropy_coef=0.01, value_coef=0.5).coefficients == {
        "clip_ratio": 0.1,
        "entropy_coef": 0.01,
        "value_coef": 0.5,
    }
    more = config(value_clip_ratio=0.3, loss_fn=ppo_losses, loss_coefficients={"beta": 2}).coefficients
    assert (more["value_clip_ratio"], more["beta"]) == (0.3, 2.0) and type(more["beta"]) is float
    assert config(loss_coefficients={"clip_ratio": 0.7}).coefficients["clip_ratio"] == 0.7


def test_a_config_does_not_change_and_shares_nothing() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().gamma = 0.5  # type: ignore[misc]
    config().env_kwargs["id"] = 1
    assert config().env_kwargs == {}


@keywords_of(Config)
def takes_a_config(config: Config) -> Config:
    """Return it."""
    return config


REQUIRED: dict[str, Any] = {"total_steps": 1e3, "env_fn": env_fn, "network_fn": network_fn}


def test_a_function_of_a_config_takes_its_keywords() -> None:
    assert takes_a_config(**REQUIRED, gamma=0.5) == config(gamma=0.5)
    assert inspect.signature(takes_a_config).parameters == inspect.signature(Config).parameters
    assert inspect.signature(PPO).return_annotation == "Result"
    assert takes_a_config.__name__ == "takes_a_config"
    assert (takes_a_config.__doc__ or "").startswith("Return it.\n\nArgs:\n    total_steps: ")


def test_a_misspelt_keyword_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="unknown keyword 'gama'; did you mean 'gamma'"):
        takes_a_config(**REQUIRED, gama=0.5)
    with pytest.raises(ConfigurationError, match=r"unknown keyword 'n_epochs'; here it is train_pi_epochs and train_v"):
        takes_a_config(**REQUIRED, n_epochs=4)
    fields = {item.name for item in dataclasses.fields(Config)}
    assert {name for names in KNOWN_AS.values() for name in names.split(" and ")} <= fields
    with pytest.raises(ConfigurationError, match=r"unknown keyword 'zzz'$"):
        takes_a_config(**REQUIRED, zzz=0.5)


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_missing_is_told(name: str) -> None:
    for without in ({k: v for k, v in REQUIRED.items() if k != name}, {**REQUIRED, name: None}):
        with pytest.raises(ConfigurationError, match=f"{name} is missing: give"):
            takes_a_config(**without)


def test_positions_say_nothing() -> None:
    with pytest.raises(ConfigurationError, match="keywords only"):
        takes_a_config(1e6)  # type: ignore[misc,arg-type]


def test_help_tells_what_each_keyword_means() -> None:
    told = inspect.getdoc(PPO) or ""
    for item in dataclasses.fields(Config):
        assert f"\n    {item.name}: " in told
    assert "\n    gamma: Discount factor. Usual: 0.98 to 0.999.\n" in told
