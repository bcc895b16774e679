# SPDX-License-Identifier: MIT
"""Builds a rank's environments and networks from the user's functions, and checks them before step 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch

from ppo_mpi_base.config import Config
from ppo_mpi_base.envs import Environments
from ppo_mpi_base.errors import ConfigurationError, TrainingError, check_takes
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.network_checks import check_networks
from ppo_mpi_base.networks import SharedTrunk, orthogonal_
from ppo_mpi_base.policies import ActorCritic, action_dim, any_observations, observation_dim
from ppo_mpi_base.seeding import NETWORKS, seed_sequence
from ppo_mpi_base.undisturbed import undisturbed

T = TypeVar("T")


def checked_together(ranks: Communicator, build: Callable[[], T]) -> T:
    """Build something on each rank; a `ConfigurationError` or `TrainingError` on any rank is raised on all.

    Collective: call on all ranks.
    """
    built: T | None = None
    error: Exception | None = None
    try:
        built = build()
    except (ConfigurationError, TrainingError) as reason:
        error = reason
    ranks.raise_together(error)
    return built  # type: ignore[return-value]


OF_A_RANK = {"log_directory", "device", "env_kwargs", "quiet", "max_seconds", "stop_deadline", "checkpoint_seconds"}
"""Keywords that may differ between ranks. One rank's time limit stops all; only rank 0's checkpoint_seconds count."""
TABLES = ("policy_kwargs", "critic_kwargs", "loss_coefficients")


def check_equal_keywords(config: Config, ranks: Communicator) -> None:
    """Raise if a number or string differs between this rank and rank 0. Collective: call on all ranks.

    Raises:
        ConfigurationError: it differs; ranks would wait for each other in vain, or train different networks.
    """
    named = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    named |= {f"{table}[{name!r}]": value for table in TABLES for name, value in named[table].items()}
    named["save_location"] = None if config.save_location is None else "a directory"  # only rank 0 writes there
    plain = int | float | str | tuple | list | None
    compared = named.keys() - OF_A_RANK - {"hooks"}
    mine = {name: named[name] for name in sorted(compared) if isinstance(named[name], plain)}
    if (found := _differing(mine, ranks, missing="a function")) is not None:
        name, value, first = found
        raise ConfigurationError(
            f"{name}={value!r} on rank {ranks.rank}, but {first!r} on rank 0: it must be equal on all ranks"
        )


def _differing(mine: dict[str, Any], ranks: Communicator, missing: Any = None) -> tuple[str, Any, Any] | None:
    """Return a name whose value differs from rank 0's, and both values, or None. Collective: call on all ranks."""
    first = ranks.gather_all(mine)[0]
    each = ((name, mine.get(name, missing), first.get(name, missing)) for name in dict.fromkeys([*mine, *first]))
    return next((found for found in each if found[1] != found[2]), None)


def choose_device(config: Config, ranks: Communicator) -> torch.device:
    """Return the device of this rank's networks, with its index if it has one, and make it torch's current device.

    Collective: call on all ranks.

    Raises:
        ConfigurationError: it is of another kind than rank 0's.
    """
    device = torch.empty(0, device="cpu" if config.device is None else config.device).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # autocast uses the current one
    check_equal_devices(device, ranks)
    return device


def check_equal_devices(device: torch.device, ranks: Communicator) -> None:
    """Raise if this rank's device is of another kind than rank 0's. Collective: call on all ranks.

    Raises:
        ConfigurationError: it is; each rank takes its own Adam steps, whose last bits would differ.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if (found := _differing({"device": kind}, ranks)) is not None:
        _, mine, first = found
        raise ConfigurationError(
            f"device: rank {ranks.rank} computes on {mine}, but rank 0 on {first}: all ranks need the same kind"
        )


def build_environment(env_fn: Callable[..., gymnasium.Env], env_kwargs: dict[str, Any]) -> gymnasium.Env:
    """Build one environment, or raise `ConfigurationError` if `env_fn` returns something else."""
    check_takes("env_fn", env_fn, **env_kwargs)
    environment = env_fn(**env_kwargs)
    if not isinstance(environment, gymnasium.Env):
        raise ConfigurationError(f"env_fn must return a gymnasium.Env, not {type(environment).__name__}")
    return environment


def build_environments(config: Config, ranks: Communicator) -> Environments:
    """Build the N environments of this rank.

    Raises:
        ConfigurationError: a function returns something other than it should, or spaces are not supported.
    """
    n = config.environments_per_rank
    made: list[gymnasium.Env] | gymnasium.vector.VectorEnv
    if config.make_vec_env_fn is not None:
        check_takes("make_vec_env_fn", config.make_vec_env_fn, "env_fn", "n", **config.env_kwargs)
        made = config.make_vec_env_fn(config.env_fn, n, **config.env_kwargs)
        if not isinstance(made, gymnasium.vector.VectorEnv):
            raise ConfigurationError(
                f"make_vec_env_fn must return a gymnasium.vector.VectorEnv, not {type(made).__name__}"
            )
        if made.num_envs != n:
            raise ConfigurationError(f"make_vec_env_fn returned {made.num_envs} environments for num_environments={n}")
    else:
        made = [build_environment(config.env_fn, config.env_kwargs) for _ in range(n)]
    return Environments(
        made,
        seed=config.seed,
        first_global_index=ranks.rank * n,
        max_ep_len=config.max_ep_len,
        first_ep_lens=_staggered(config.stagger_episodes, ranks, n),
        state_processing_hook=config.state_processing_hook,
        obs_space_override=config.obs_space_override,
    )


def _staggered(longest: int | None, ranks: Communicator, n: int) -> list[int] | None:
    """Return first-episode lengths for a rank's n environments, spread evenly up to `longest` over all ranks."""
    if longest is None:
        return None
    return [-(-longest * (ranks.rank * n + i + 1) // (ranks.size * n)) for i in range(n)]  # rounded up


def check_equal_spaces(environments: Environments, ranks: Communicator) -> None:
    """Raise if this rank's spaces differ from rank 0's. Collective: call on all ranks."""
    spaces = {"observation": environments.observation_space, "action": environments.action_space}
    if (found := _differing({name: str(space) for name, space in spaces.items()}, ranks)) is not None:
        name, space, first = found
        raise ConfigurationError(f"env_fn: the {name} space on rank {ranks.rank} is {space}, but on rank 0 {first}")


def check_equal_networks(actor_critic: ActorCritic, ranks: Communicator) -> None:
    """Raise if the shapes of this rank's parameters differ from rank 0's. Collective: call on all ranks."""
    mine = {name: tuple(parameter.shape) for name, parameter in sorted(actor_critic.named_parameters())}
    if (found := _differing(mine, ranks)) is not None:
        name, shape, first = found
        raise ConfigurationError(
            f"network_fn, value_network_fn: the parameter {name} has shape {shape} on rank {ranks.rank}, "
            f"but {first} on rank 0"
        )


def build_networks(config: Config, environments: Environments, device: torch.device) -> ActorCritic:
    """Build policy and value networks with equal weights on all ranks, from the seed.

    Raises:
        ConfigurationError: a network fails on the spaces or returns the wrong shape, or none can be trained.
    """
    seeds = seed_sequence(config.seed, NETWORKS).generate_state(2, np.uint64)
    torch.manual_seed(int(seeds[0]))
    space = environments.observation_space
    obs_dim, act_dim = observation_dim(space), action_dim(environments.action_space)
    network = _network("network_fn", config.network_fn, obs_dim, act_dim, **config.policy_kwargs)
    value_network = None
    if config.value_network_fn is not None:
        value_network = _network("value_network_fn", config.value_network_fn, obs_dim, **config.critic_kwargs)
    actor_critic = ActorCritic(
        network,
        value_network,
        space,
        environments.action_space,
        initial_log_std=config.initial_log_std,
        normalize_observations=config.normalize_observations,
        precision=config.precision,
    ).cpu()  # the CPU, where all ranks draw the same weights, wherever the user's functions put theirs
    # Not as many as the network's outputs, or rows would look like columns.
    observations = any_observations(space, 3 if act_dim == 2 else 2)
    check_networks(actor_critic, observations)
    if not any(parameter.requires_grad for parameter in actor_critic.parameters()):
        raise ConfigurationError("network_fn: no parameter of the networks is trainable (requires_grad)")
    if config.orthogonal_init:
        if value_network is None and not isinstance(network, SharedTrunk):
            raise ConfigurationError(
                "orthogonal_init=True: one network for policy and value must be a networks.SharedTrunk, whose output "
                "layers are known; otherwise leave it out and initialize the network in network_fn"
            )
        random = torch.Generator().manual_seed(int(seeds[1]))
        orthogonal_(network, 0.01, random)
        if value_network is not None:
            orthogonal_(value_network, 1.0, random)
    actor_critic.to(device)
    if device.type != "cpu":
        with undisturbed(actor_critic, evaluating=False):
            check_networks(actor_critic, observations.to(device))  # `to` does not move tensors that are not buffers
    return actor_critic


def _network(name: str, build: Callable[..., torch.nn.Module], *sizes: Any, **keywords: Any) -> torch.nn.Module:
    """Build a network with the user's function, or raise `ConfigurationError` if it does not accept its arguments."""
    if isinstance(build, torch.nn.Module):
        raise ConfigurationError(f"{name} is already a network: give a function that builds one for each run")
    check_takes(name, build, *["obs_dim", "act_dim"][: len(sizes)], **keywords)
    try:
        return build(*sizes, **keywords)
    except (KeyError, TypeError) as error:
        if not isinstance(sizes[0], dict):
            raise
        raise ConfigurationError(
            f"{name} fails for obs_dim={sizes[0]}, the sizes of the parts of a Dict space ({error!r}): "
            "gymnasium.wrappers.FlattenObservation would join them into one vector"
        ) from error
