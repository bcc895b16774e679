# SPDX-License-Identifier: MIT
"""Action distributions made from network outputs, and the actor-critic that holds a rank's networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn
from torch.nn import functional

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.normalize import OBSERVATION_CLIP
from ppo_mpi_base.parts import Parts


class Distribution(Protocol):
    """A policy's action distributions for a batch of B observations.

    A policy network that has a method `distribution(outputs)` chooses its own: `outputs` is what its `forward` returned
    (of a network for both, the first of the two), in the default dtype. For a Box, the noise is standard normal and has
    the shape of the actions; for a Discrete space with n actions it is standard Gumbel, (B, n), and actions are int64,
    in [0, n).
    """

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions (B, ...), a deterministic function of the parameters and `noise` (B, ...)."""

    def mode(self) -> Tensor:
        """Return the most probable actions, (B, ...)."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log-probabilities (B,) of actions (B, ...), summed over action dimensions."""

    def entropy(self) -> Tensor:
        """Return entropies (B,), summed over action dimensions."""


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions with means (B, *shape), and log standard deviations (*shape) or (B, *shape)."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return `mean + std * noise` for standard normal noise (B, *shape)."""
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """Return the means, (B, *shape)."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log-densities (B,) of actions (B, *shape)."""
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)).reshape(len(actions), -1).sum(-1)

    def entropy(self) -> Tensor:
        """Return differential entropies (B,): the sum of `log_std + log(2 pi e) / 2`."""
        entropy = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        if self.log_std.dim() == self.mean.dim():  # one for each observation
            return entropy.reshape(len(self.mean), -1).sum(-1)
        return entropy.sum().expand(len(self.mean))


@dataclass(frozen=True)
class Categorical:
    """Categorical distributions over n actions, from logits (B, n)."""

    logits: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions (B,) int64 in [0, n), by the Gumbel-max trick from standard Gumbel noise (B, n)."""
        return (self.logits + noise).argmax(-1)

    def mode(self) -> Tensor:
        """Return the actions of the largest logits, (B,)."""
        return self.logits.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log-probabilities (B,) of actions (B,) in [0, n)."""
        return self.logits.log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return entropies (B,)."""
        log_probs = self.logits.log_softmax(-1)
        # A logit of -inf, as for an action that is not allowed, adds 0; 0 * -inf would be NaN.
        finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
        return -(log_probs.exp() * finite).sum(-1)


def observation_dim(space: gymnasium.Space) -> Any:
    """Return `obs_dim`: a Box's leading dimension (channels of an image), a Discrete space's number of values.

    For a Dict space, a dict of these.
    """
    if isinstance(space, Parts):
        space = space.parts
    if isinstance(space, Dict):
        return {name: observation_dim(part) for name, part in space.items()}
    if isinstance(space, Discrete):
        return int(space.n)
    return int(space.shape[0]) if space.shape else 1


def action_dim(space: gymnasium.Space) -> int:
    """Return `act_dim`: the number of action means for a Box, or of logits for a Discrete space."""
    return int(space.n) if isinstance(space, Discrete) else math.prod(space.shape or ())


def any_observations(space: gymnasium.Space, batch: int) -> Tensor:
    """Return observations to try networks on, (batch, *shape) in the space's dtype: zeros, or a Discrete's start."""
    start = space.start if isinstance(space, Discrete) else 0
    return torch.as_tensor(np.full((batch, *(space.shape or ())), start, space.dtype))


def action_noise(space: gymnasium.Space, generator: np.random.Generator, length: int) -> np.ndarray:
    """Draw the noise for `length` samples: (length, n) Gumbel for Discrete, (length, *shape) normal for a Box."""
    if isinstance(space, Discrete):
        return generator.gumbel(size=(length, int(space.n)))
    return generator.standard_normal((length, *(space.shape or ())))


class ActorCritic(nn.Module):
    """The policy and value networks of a rank, with the conversions between them and the environment's spaces.

    Args:
        network: observations (B, ...) -> means or logits (B, act_dim); if `value_network` is None, a tuple of these
            and values (B, 1) or (B,). With a method `distribution` of its own, any other tensor (B, ...).
        value_network: observations (B, ...) -> (B, 1) or (B,).
        observation_space: Box; Discrete, which networks see as one-hot vectors; or `Parts`, which they see as dicts.
        action_space: Box or Discrete.
        initial_log_std: of the Gaussian policy for a Box.
        normalize_observations: normalize observations by the moments that were last set.
        precision: "bfloat16" lets networks multiply and convolve in it; outputs have the default dtype.
    """

    action_low: Tensor
    action_high: Tensor
    observation_mean: Tensor
    observation_std: Tensor

    def __init__(
        self,
        network: nn.Module,
        value_network: nn.Module | None,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        initial_log_std: float = 0.0,
        normalize_observations: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.network = network
        self.value_network = value_network
        self.observation_space = observation_space
        self.action_space = action_space
        self.normalize_observations = normalize_observations
        self.precision = precision
        self.idle_output: Tensor | None = None  # a row for `idling`; zeros may be no valid parameters
        if isinstance(action_space, Box):
            if not self.chooses_distribution:
                self.log_std = nn.Parameter(torch.full(action_space.shape, float(initial_log_std)))
            self.register_buffer("action_low", _inner(action_space.low, math.inf))
            self.register_buffer("action_high", _inner(action_space.high, -math.inf))
        if normalize_observations:
            if not isinstance(observation_space, Box) or observation_space.dtype.kind != "f":
                raise ConfigurationError(
                    f"normalize_observations=True needs a Box of floats, not {observation_space}: "
                    "scale in the network instead"
                )
            self.register_buffer("observation_mean", torch.zeros(observation_space.shape, dtype=torch.float64))
            self.register_buffer("observation_std", torch.ones(observation_space.shape, dtype=torch.float64))

    @property
    def chooses_distribution(self) -> bool:
        """Whether the policy network has a method `distribution`."""
        return callable(getattr(self.network, "distribution", None))

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU if there are none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def network_buffers(self) -> list[Tensor]:
        """Return the buffers of both networks, without the bounds and moments that this class keeps."""
        networks = [self.network] if self.value_network is None else [self.network, self.value_network]
        return [buffer for network in networks for buffer in network.buffers()]

    def parameter_slices(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of "policy" and of "value"; all are the policy's if one network gives both."""
        if self.value_network is None:
            return {"policy": list(self.parameters())}
        value = list(self.value_network.parameters())
        of_value = {id(parameter) for parameter in value}
        return {
            "policy": [parameter for parameter in self.parameters() if id(parameter) not in of_value],
            "value": value,
        }

    @contextmanager
    def idling(self, name: str) -> Iterator[None]:
        """Let one of two networks, "policy" or "value", return zeros without computing within the `with` block.

        If the policy chooses its distribution, it returns what it once returned for one observation. Everything else
        about it, such as its weights, is unchanged.
        """
        networks = {"policy": (self.network, action_dim(self.action_space)), "value": (self.value_network, 1)}
        network, width = networks[name]
        row = self.idle_output if name == "policy" else None
        attributes = vars(network)  # not by setattr, which module wrappers pass on to what they wrap
        own = attributes.get("forward")  # a wrapper's; other modules use their class's

        def forward(seen: Tensor | dict[str, Any]) -> Tensor:
            batch = len(_first(seen))
            return _first(seen).new_zeros(batch, width) if row is None else row.expand(batch, *row.shape[1:])

        attributes["forward"] = forward
        try:
            yield
        finally:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own

    def set_observation_moments(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Normalize by these from now on; each has the shape of an observation."""
        self.observation_mean.copy_(torch.as_tensor(mean))
        self.observation_std.copy_(torch.as_tensor(std))

    def preprocess(self, observations: Tensor) -> Any:
        """Return the networks' input, (B, ...) in the default dtype: normalized if asked for, one-hot if Discrete.

        For the rows (B, n) of a Dict space, a dict of its parts.
        """
        if isinstance(self.observation_space, Discrete):
            index = observations.long() - int(self.observation_space.start)
            return functional.one_hot(index, int(self.observation_space.n)).to(torch.get_default_dtype())
        if self.normalize_observations:
            observations = (observations - self.observation_mean) / self.observation_std
            observations = observations.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        seen = observations.to(torch.get_default_dtype())
        return self.observation_space.split(seen) if isinstance(self.observation_space, Parts) else seen

    def _outputs(self, network: nn.Module, seen: Tensor | dict[str, Any]) -> Any:
        """Return a network's output: a tensor, or a tuple of means or logits and values."""
        if self.precision != "bfloat16":
            return network(seen)
        with torch.autocast(_first(seen).device.type, torch.bfloat16):
            outputs = network(seen)
        dtype = torch.get_default_dtype()
        return tuple(x.to(dtype) for x in outputs) if isinstance(outputs, tuple) else outputs.to(dtype)

    def _distribution(self, output: Tensor) -> Distribution:
        if self.chooses_distribution:
            return self.network.distribution(output)  # type: ignore[operator]
        if isinstance(self.action_space, Discrete):
            return Categorical(output)
        return Gaussian(output.reshape(-1, *self.log_std.shape), self.log_std)

    def policy(self, observations: Tensor) -> Distribution:
        """Return pi(. | s) for observations (B, ...)."""
        output = self._outputs(self.network, self.preprocess(observations))
        return self._distribution(output if self.value_network is not None else output[0])

    def policy_and_value(self, observations: Tensor) -> tuple[Distribution, Tensor]:
        """Return pi(. | s) and V(s), (B,), for observations (B, ...)."""
        seen = self.preprocess(observations)
        if self.value_network is None:
            output, values = self._outputs(self.network, seen)
        else:
            output, values = self._outputs(self.network, seen), self._outputs(self.value_network, seen)
        return self._distribution(output), values.reshape(-1)

    def value(self, observations: Tensor) -> Tensor:
        """Return V(s), (B,), for observations (B, ...)."""
        if self.value_network is None:
            return self.policy_and_value(observations)[1]
        return self._outputs(self.value_network, self.preprocess(observations)).reshape(-1)

    def to_environment(self, actions: Tensor) -> Tensor:
        """Return the actions for the environment: clipped to a Box's bounds, or shifted by a Discrete space's start."""
        if isinstance(self.action_space, Discrete):
            return actions + int(self.action_space.start)
        return actions.clamp(self.action_low, self.action_high)

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampled actions (B, ...), as the loss sees them and as the environment gets them."""
        actions = self.policy(observations).sample(noise)
        return actions, self.to_environment(actions)

    def act_and_evaluate(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `act` returns, and the actions' log-probabilities and V(s), (B,) each, from the same pass."""
        policy, values = self.policy_and_value(observations)
        actions = policy.sample(noise)
        return actions, self.to_environment(actions), policy.log_prob(actions), values


def _first(seen: Tensor | dict[str, Any]) -> Tensor:
    """Return the networks' input or, if it is a dict, its first part."""
    while isinstance(seen, dict):
        seen = next(iter(seen.values()))
    return seen


def _inner(bound: np.ndarray, inwards: float) -> Tensor:
    """Return a bound in the default dtype, rounded towards `inwards`: clipped actions must not leave the space."""
    rounded = torch.as_tensor(bound, dtype=torch.get_default_dtype()).clone()
    outside = rounded.double() < torch.as_tensor(bound) if inwards > 0 else rounded.double() > torch.as_tensor(bound)
    return torch.where(outside, rounded.nextafter(torch.full_like(rounded, inwards)), rounded)


def lacks_bfloat16(device: torch.device) -> bool:
    """Return whether a device has no bfloat16 instructions, so bfloat16 takes many times as long as float32."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
