# SPDX-License-Identifier: MIT
"""The fields of `Config` as the keywords of a function: its signature, its help, and its errors for wrong ones."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ppo_mpi_base import config
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError, did_you_mean

REQUIRED = {
    "total_steps": "the number of agent steps, such as 1e6",
    "env_fn": "a function that builds one gymnasium.Env",
    "network_fn": "a function (obs_dim, act_dim) -> torch module",
}

KNOWN_AS = {
    "n_steps": "rollout_length_per_worker",
    "num_steps": "rollout_length_per_worker",
    "steps_per_epoch": "rollout_length_per_worker",
    "n_envs": "num_environments",
    "num_envs": "num_environments",
    "batch_size": "train_batch_size",
    "minibatch_size": "train_batch_size",
    "epochs": "train_pi_epochs and train_v_epochs",
    "n_epochs": "train_pi_epochs and train_v_epochs",
    "num_epochs": "train_pi_epochs and train_v_epochs",
    "update_epochs": "train_pi_epochs and train_v_epochs",
    "train_pi_iters": "train_pi_epochs",
    "train_v_iters": "train_v_epochs",
    "total_timesteps": "total_steps",
    "learning_rate": "pi_lr and vf_lr",
    "lr": "pi_lr and vf_lr",
    "gae_lambda": "lam",
    "clip_range": "clip_ratio",
    "clip_coef": "clip_ratio",
    "clip_eps": "clip_ratio",
    "clip_epsilon": "clip_ratio",
    "normalize_advantage": "standardize_advantages",
    "norm_adv": "standardize_advantages",
    "ent_coef": "entropy_coef",
    "vf_coef": "value_coef",
    "max_grad_norm": "pi_grad_clip and v_grad_clip",
    "ac_kwargs": "policy_kwargs and critic_kwargs",
    "callback": "hooks",
    "callbacks": "hooks",
    "gpu": "device",
    "cuda": "device",
    "verbose": "quiet",
    "save_path": "save_location",
    "log_dir": "log_directory",
}
"""Other libraries' names -> the keywords here, if these look different."""

P = ParamSpec("P")
R = TypeVar("R")


def keywords_of(config_class: Callable[P, Config]) -> Callable[[Callable[[Config], R]], Callable[P, R]]:
    """Give a function of one `Config` the config's keywords as its signature, for people, editors and type checkers."""

    def decorate(function: Callable[[Config], R]) -> Callable[P, R]:
        known = [item.name for item in dataclasses.fields(Config)]

        @functools.wraps(function)
        def with_keywords(*args: P.args, **keywords: P.kwargs) -> R:
            if args:
                raise ConfigurationError(f"PPO takes keywords only, such as total_steps={args[0]!r}")
            for name in keywords:
                if name not in known:
                    meant = f"; here it is {KNOWN_AS[name]}" if name in KNOWN_AS else did_you_mean(name, known)
                    raise ConfigurationError(f"unknown keyword {name!r}{meant}")
            for name, remedy in REQUIRED.items():
                if keywords.get(name) is None:
                    raise ConfigurationError(f"{name} is missing: give {remedy}")
            return function(config_class(**keywords))  # type: ignore[call-arg]

        returns = inspect.signature(function).return_annotation
        signature = inspect.signature(config_class).replace(return_annotation=returns)
        with_keywords.__signature__ = signature  # type: ignore[attr-defined]
        meanings = "\n".join(f"    {name}: {text}" for name, text in field_docstrings().items())
        with_keywords.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{meanings}"
        return with_keywords

    return decorate


@functools.cache
def field_docstrings() -> dict[str, str]:
    """Return the docstring below each field of `Config`, by name; an empty dict if there is no source code."""
    try:
        module = ast.parse(inspect.getsource(config))
    except OSError:
        return {}
    (definition,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {
        item.target.id: " ".join(str(text.value.value).split())
        for item, text in itertools.pairwise(definition.body)
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
