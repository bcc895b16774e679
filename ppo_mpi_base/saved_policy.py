# SPDX-License-Identifier: MIT
"""Save policies as safetensors with JSON beside them, and load them as functions, without MPI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import safetensors.torch
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import nn

from ppo_mpi_base import layers
from ppo_mpi_base.checks import CountOrZero, checked
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import write_together
from ppo_mpi_base.parts import Parts
from ppo_mpi_base.policies import ActorCritic, action_dim, action_noise, observation_dim

FORMAT = 1
WHEN = "saved_at"
"""The key under which the tensor file says after how many steps, and with which mean return, it was saved."""


class SavedPolicy(NamedTuple):
    """A policy as it was saved.

    Attributes:
        actor_critic: the policy; without values, unless one network gives both.
        which: "best" or "latest": the networks that were found.
        total_steps: agent steps over all ranks when it was saved.
        episode_return: the mean return of the last 100 training episodes then; None before the first.
        hooked: whether it was trained on observations transformed by a `state_processing_hook`.
    """

    actor_critic: ActorCritic
    which: str
    total_steps: int
    episode_return: float | None
    hooked: bool

    def check_hook(self, hook: Callable[[Any], Any] | None) -> None:
        """Raise `ConfigurationError` if the hook used in training is missing, so that observations would be misread."""
        if self.hooked and hook is None:
            raise ConfigurationError(
                "state_processing_hook=None, but the policy was trained with one: give the same function again, in "
                "Python (the command ppo-mpi has no flag for it)"
            )


def save_policy(config: Config, which: str, actor_critic: ActorCritic, total_steps: int, episode_return: float) -> None:
    """Write `which`.safetensors and `which`.json into `config.save_location`; on rank 0 only."""
    directory = Path(config.save_location or ".")
    # Copies: two names for one tensor, as when both networks share layers, would be refused.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in actor_critic.state_dict().items()}
    when = {"total_steps": total_steps, "episode_return": episode_return if np.isfinite(episode_return) else None}
    description = {
        "format": FORMAT,
        **when,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "observation_space": describe_space(actor_critic.observation_space),
        "action_space": describe_space(actor_critic.action_space),
        "normalize_observations": config.normalize_observations,
        "state_processing_hook": config.state_processing_hook is not None,
        "precision": actor_critic.precision,
        "policy_kwargs": {name: repr(value) for name, value in config.policy_kwargs.items()},
        "network": layers.describe(actor_critic.network),
        "gives_value": actor_critic.value_network is None,
        "chooses_distribution": actor_critic.chooses_distribution,
    }
    # The description first: tensors without one could not be loaded. A kill between the two leaves older tensors, which
    # also fit it, and record for themselves when they were saved.
    text = json.dumps(description, indent=1, default=lambda number: number.item())  # sizes may be NumPy's
    contents = {"json": text.encode(), "safetensors": safetensors.torch.save(tensors, {WHEN: json.dumps(when)})}
    write_together({directory / f"{which}.{ending}": content for ending, content in contents.items()})


def load_policy(
    save_location: str | Path,
    which: Literal["best", "latest"] = "best",
    *,
    network_fn: Callable[..., nn.Module] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    deterministic: bool = True,
    seed: int = 0,
) -> Callable[[Any], np.ndarray]:
    """Return the saved policy as a function observation -> action, for one environment's observations.

    Observations of a Dict space are dicts; after training with `state_processing_hook`, they are what the hook returns.
    The policy computes as in training, so after `precision="bfloat16"` it is slow on processors without instructions
    for that. But it uses torch's default dtype, which you must set as it was in training.

    Args:
        save_location: the directory that was given to `PPO()`.
        which: the networks that earned the best mean return, or the latest. "best" falls back to the latest if no
            episode ever ended.
        network_fn: builds the policy network, as for `PPO()`. Not needed if the network is made of torch's own layers
            in `nn.Sequential`, or is one of `ppo_mpi_base.networks`.
        policy_kwargs: for `network_fn`.
        deterministic: return the most probable action, not a sampled one.
        seed: for the sampling.

    Raises:
        ConfigurationError: files are missing or damaged, or `network_fn` is needed or does not fit them.
    """
    saved = load_actor_critic(save_location, which, network_fn=network_fn, policy_kwargs=policy_kwargs)
    return as_function(saved.actor_critic, deterministic, seed)


def load_actor_critic(
    save_location: str | Path,
    which: Literal["best", "latest"] = "best",
    *,
    network_fn: Callable[..., nn.Module] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
) -> SavedPolicy:
    """Return the saved policy as an `ActorCritic`, without its value network, and when it was saved.

    Args and errors are those of `load_policy`.
    """
    directory = Path(save_location)
    if which == "best" and not (directory / "best.safetensors").exists():
        which = "latest"
    description, tensors = _read(directory, which)
    saved = _built(directory / which, description, network_fn, policy_kwargs or {})
    wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith("value_network.")}
    try:
        saved.actor_critic.load_state_dict(wanted)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"load_policy: the network does not fit {directory / which}.safetensors: {reason}"
        ) from error
    return saved


def _built(
    path: Path,
    description: dict[str, Any],
    network_fn: Callable[..., nn.Module] | None,
    policy_kwargs: dict[str, Any],
) -> SavedPolicy:
    """Build a policy with new weights from its description, using `network_fn` if it is given."""
    try:
        observation_space, action_space = (
            make_space(description[f"{kind}_space"]) for kind in ("observation", "action")
        )
        gives_value, normalize = description["gives_value"], description["normalize_observations"]
        precision = checked("precision", description.get("precision", "float32"), Literal["float32", "bfloat16"])
        total_steps, episode_return = description["total_steps"], description["episode_return"]
        hooked = checked("state_processing_hook", description.get("state_processing_hook", False), bool)
        network = None if network_fn or description["network"] is None else layers.build(description["network"])
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(repr(error).split())
        raise ConfigurationError(f"load_policy: {path}.json is damaged: {reason}") from error
    if network_fn is not None:
        sizes = observation_dim(observation_space), action_dim(action_space)
        try:
            network = network_fn(*sizes, **policy_kwargs)
        except Exception as error:  # whatever the user's function raises
            raise ConfigurationError(
                f"load_policy: network_fn{(*sizes,)} fails with policy_kwargs={policy_kwargs!r} ({error!r}): give "
                "those used in training"
            ) from error
    if network is None:
        raise ConfigurationError(
            f"{path.parent} holds a network of your own class: give network_fn, the function that builds it, and its "
            "policy_kwargs, to load_policy, evaluate, record_video or export_policy; ppo-mpi has no flag for it"
        )
    # Values are not needed to act; a stand-in says that the network does not give them.
    stand_in = None if gives_value else nn.Identity()
    policy = ActorCritic(
        network, stand_in, observation_space, action_space, normalize_observations=normalize, precision=precision
    )
    if policy.chooses_distribution != description.get("chooses_distribution", False):
        how = "has a" if policy.chooses_distribution else "lacks the"
        raise ConfigurationError(f"load_policy: network_fn's module {how} method distribution, unlike in training")
    return SavedPolicy(policy, path.name, total_steps, episode_return, hooked)


def as_function(actor_critic: ActorCritic, deterministic: bool, seed: int) -> Callable[[Any], np.ndarray]:
    """Return a policy as a function observation -> action; see `load_policy`."""
    generator = np.random.default_rng(checked("seed", seed, CountOrZero))
    actor_critic.eval()
    space = actor_critic.observation_space
    shape = space.shape

    @torch.no_grad()
    def policy(observation: Any) -> np.ndarray:
        if isinstance(space, Parts):
            observation = space.join(observation)
        copied = np.array(observation)  # whatever its strides are
        if copied.shape != shape:
            found = "a dict" if isinstance(observation, Mapping) else copied.shape
            raise ConfigurationError(f"observation: its shape must be {shape}, as in training, not {found}")
        distribution = actor_critic.policy(torch.as_tensor(copied[None]))
        if deterministic:
            action = distribution.mode()
        else:
            noise = action_noise(actor_critic.action_space, generator, 1)
            action = distribution.sample(torch.as_tensor(noise, dtype=torch.get_default_dtype()))
        return actor_critic.to_environment(action).numpy()[0]  # for a Discrete space a number, as in training

    return policy


def _read(directory: Path, which: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = directory / which
    try:
        description = json.loads((directory / f"{which}.json").read_bytes())
        content = (directory / f"{which}.safetensors").read_bytes()
        tensors, when = safetensors.torch.load(content), saved_at(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = directory / "saved_model"
        hint = f"did you mean {inside}?" if inside.is_dir() else "was a policy saved there?"
        hint = f"give the directory, {directory.parent}" if directory.is_file() else hint
        raise ConfigurationError(f"load_policy: there is no {error.filename}: {hint}") from error
    except OSError as error:
        raise ConfigurationError(f"load_policy: {error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, safetensors.SafetensorError) as error:
        raise ConfigurationError(f"load_policy: {path}.json or .safetensors is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise ConfigurationError(f"load_policy: {path}.json has format {found!r}, but this version reads {FORMAT}")
    return {**description, **when}, tensors


def saved_at(content: bytes) -> dict[str, Any]:
    """Return `total_steps` and `episode_return` of the networks in a file; {} if an earlier version wrote it.

    Raises:
        ValueError: the file is damaged.
    """
    length = int.from_bytes(content[:8], "little")  # safetensors reads metadata from files only
    header = json.loads(content[8 : 8 + length])
    return dict(json.loads(header.get("__metadata__", {}).get(WHEN, "{}")))


def describe_space(space: gymnasium.Space) -> dict[str, Any]:
    """Describe, for JSON, a Box or Discrete space, or the `Parts` of a Dict space of them."""
    if isinstance(space, Parts):
        return {"kind": "Parts", "dict": describe_space(space.parts)}
    if isinstance(space, Dict):
        return {"kind": "Dict", "parts": [[name, describe_space(part)] for name, part in space.items()]}
    if isinstance(space, Discrete):
        own = {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), **own}
    if not isinstance(space, Box):
        raise ConfigurationError(f"the space {space} cannot be saved; only Box, Discrete and Dict can")
    bounds = {"low": space.low, "high": space.high}
    # JSON has no infinity; as text, all numbers are kept exactly.
    return {
        "kind": "Box",
        "shape": list(space.shape),
        "dtype": str(space.dtype),
        **{
            name: repr(x.flat[0].item()) if x.size and (x == x.flat[0]).all() else [repr(v) for v in x.ravel().tolist()]
            for name, x in bounds.items()
        },
    }


def make_space(description: dict[str, Any]) -> gymnasium.Space:
    """Return the space that `describe_space` described."""
    if description["kind"] == "Parts":
        return Parts(make_space(description["dict"]))  # type: ignore[arg-type]
    if description["kind"] == "Dict":
        return Dict([(name, make_space(part)) for name, part in description["parts"]])
    if description["kind"] == "Discrete":
        own = {"dtype": np.dtype(description["dtype"]).type} if "dtype" in description else {}
        return Discrete(description["n"], start=description["start"], **own)
    shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
    low, high = (_numbers(description[name], dtype) for name in ("low", "high"))  # one number for all, or one for each
    return Box(
        np.broadcast_to(low.reshape(shape if low.ndim else ()), shape).astype(dtype),
        np.broadcast_to(high.reshape(shape if high.ndim else ()), shape).astype(dtype),
        shape,
        dtype.type,
    )


def _numbers(texts: str | list[str], dtype: np.dtype) -> np.ndarray:
    """Return the numbers that `repr` wrote as texts; for booleans, NumPy would take any text for True."""
    return np.array(texts) == "True" if dtype.kind == "b" else np.array(texts, dtype=dtype)
