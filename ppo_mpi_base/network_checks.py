# SPDX-License-Identifier: MIT
"""Checks of the user's networks before training: what they and their distributions return, and its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.policies import ActorCritic, action_dim, action_noise


def check_networks(actor_critic: ActorCritic, observations: Tensor) -> None:
    """Run both networks on a batch of observations (B, ...) and compare their outputs with the action space.

    Raises:
        ConfigurationError: a network or its distribution fails, or what it returns has the wrong shape.
    """
    seen = actor_critic.preprocess(observations)
    wanted = action_dim(actor_critic.action_space)
    shared = actor_critic.value_network is None
    output = _run("network_fn", actor_critic.network, seen)
    if shared and not (isinstance(output, tuple) and len(output) == 2):
        raise ConfigurationError(
            "value_network_fn is missing, so network_fn's module must return (means or logits, values)"
        )
    policy_output, values = output if shared else (output, _run("value_network_fn", actor_critic.value_network, seen))
    batch = len(observations)
    if actor_critic.chooses_distribution:
        _check_distribution(actor_critic, policy_output, batch)
        actor_critic.idle_output = policy_output[:1].detach().clone()
    elif _shape(policy_output) != (batch, wanted):
        raise ConfigurationError(
            f"network_fn: the module returns shape {_shape(policy_output)} for {batch} observations {_shape(seen)}; "
            f"{actor_critic.action_space} needs ({batch}, {wanted})"
        )
    if _shape(values) not in ((batch, 1), (batch,)):
        name = "network_fn" if shared else "value_network_fn"
        raise ConfigurationError(
            f"{name}: the module returns values of shape {_shape(values)} for {batch} observations; "
            f"it must be ({batch}, 1) or ({batch},)"
        )


def _check_distribution(actor_critic: ActorCritic, outputs: Tensor, batch: int) -> None:
    """Call everything that training needs from a network's own distribution, and check what it returns."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (batch,):
        raise ConfigurationError(
            f"network_fn: the module returns {_shape(outputs)} for {batch} observations; with a method distribution, "
            "it must return one tensor (B, ...), which distribution gets"
        )
    space = actor_critic.action_space
    noise = torch.as_tensor(action_noise(space, np.random.default_rng(0), batch), dtype=outputs.dtype)
    try:
        with torch.no_grad():
            policy: Any = actor_critic.network.distribution(outputs)  # type: ignore[operator]
            actions = policy.sample(noise.to(outputs.device))
            found = {"sample(noise)": actions, "mode()": policy.mode()}
            found |= {"log_prob(actions)": policy.log_prob(actions), "entropy()": policy.entropy()}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigurationError(f"network_fn: the module's distribution fails: {reason}") from error
    for name, returned in found.items():
        wanted = (batch, *(space.shape or ())) if name in ("sample(noise)", "mode()") else (batch,)
        if _shape(returned) != wanted:
            raise ConfigurationError(
                f"network_fn: {name} of the module's distribution has shape {_shape(returned)} for {batch} "
                f"observations; it must be {wanted}"
            )
    if isinstance(space, Discrete) and (
        actions.dtype != torch.int64 or not 0 <= actions.min() <= actions.max() < space.n
    ):
        raise ConfigurationError(
            f"network_fn: sample(noise) of the module's distribution gives {actions.tolist()} ({actions.dtype}); "
            f"{space} needs int64 from 0 to {space.n - 1}"
        )


def _shape(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _shape(part) for name, part in found.items()}
    return tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__


def _run(name: str, network: Callable[[Any], Any] | None, seen: Tensor | dict[str, Any]) -> Any:
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"{name} must return a torch.nn.Module, not {type(network).__name__}")
    try:
        with torch.no_grad():
            return network(seen)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigurationError(f"{name}: the module fails on observations {_shape(seen)}: {reason}") from error
