# SPDX-License-Identifier: MIT
"""The gradient of the user's losses, and the policy's actions: run as they are written, or compiled."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_mpi_base.config import Config
from ppo_mpi_base.flat_parameters import FlatParameters
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.rollout import Batch

NUMBERS = itertools.count()
WORTHWHILE_MINIBATCHES = 25_000
# Values, and that an object still has none of its own where its class had one.
CONSTANTS = ("CONSTANT_MATCH", "EQUALS_MATCH", "NOT_PRESENT_IN_GENERIC_DICT")
INSIDE = re.compile(
    r"self\._names|__import__\('torch'\)|G\['(torch'|__import_(torch|ppo_mpi_base)_dot_)|\['named_|\.(training|_[a-z_]*)$"
)

LossFunction = Callable[[ActorCritic, Batch, dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]


class Objective(nn.Module):
    """The sum of the losses that are being minimised, and the statistics, as one function of the parameters."""

    def __init__(self, actor_critic: ActorCritic, loss_fn: LossFunction, hooks: Sequence[Hooks]) -> None:
        super().__init__()
        self.actor_critic, self.loss_fn, self.hooks = actor_critic, loss_fn, list(hooks)

    def terms(self, batch: Batch, coefficients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the named losses, after all hooks, and the statistics with the losses among them."""
        losses, statistics = self.loss_fn(self.actor_critic, batch, coefficients)
        for hook in self.hooks:
            losses = hook.on_losses(self.actor_critic, batch, losses)
        return losses, {**{f"{name}_loss": loss for name, loss in losses.items()}, **statistics}

    def forward(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str]) -> tuple[Tensor, Tensor]:
        """Return the sum of all losses but the idle ones, a scalar, and the statistics, (S,)."""
        losses, statistics = self.terms(batch, coefficients)
        total = torch.stack([loss for name, loss in losses.items() if name not in idle]).sum()
        return total, torch.stack([value.detach() for value in statistics.values()])


class EagerGradients:
    """Adds gradients to the flat gradient, and acts, operation by operation."""

    def __init__(self, objective: Objective, flat: FlatParameters) -> None:
        self.objective, self.flat = objective, flat

    def add(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str], weight: float) -> None:
        """Add `weight` times the gradient, and the statistics, of one minibatch to the flat message."""
        total, statistics = self.objective(batch, coefficients, idle)
        (total * weight).backward()
        self.flat.statistics[: len(statistics)].add_(statistics, alpha=weight)

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampled actions for observations (N, ...), and what the environments get."""
        with torch.no_grad():
            return self.objective.actor_critic.act(observations, noise)


class CompiledGradients(EagerGradients):
    """The same by `torch.compile`: one call computes losses, statistics and gradient, and adds them to the message.

    What cannot be compiled runs as it is written, after one line that says why.

    Args:
        objective: the losses.
        flat: where parameters and gradients are.
        tell: gets that line.
    """

    def __init__(self, objective: Objective, flat: FlatParameters, tell: Callable[[str], None]) -> None:
        super().__init__(objective, flat)
        self._names = flat.names(objective)
        self._tell = tell
        # torch.compile would tell these cases apart by itself, at the price of checking for them in each call.
        self._gradients: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._act: Callable[..., tuple[Tensor, Tensor]] | None = None

    def add(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str], weight: float) -> None:
        """Add `weight` times the gradient, and the statistics, of one minibatch to the flat message."""
        key = (idle, weight, len(batch.advantages), *batch.extras)
        with torch.no_grad():
            try:
                if key in self._gradients:
                    return self._gradients[key](self.flat.data, self.flat.message, batch, coefficients)
                compiled = self._compile_gradient(idle, weight)
                # On a copy of the message: a failure half-way must not leave a part of the gradient in it.
                message = self.flat.message.clone()
                compiled(self.flat.data, message, batch, coefficients)
                self.flat.message.copy_(message)
            except Exception as error:
                self._tell(f"compile: the losses run uncompiled ({_first_line(error)})")
                compiled = self._uncompiled(idle, weight)
                compiled(self.flat.data, self.flat.message, batch, coefficients)
            self._gradients[key] = compiled

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampled actions for observations (N, ...), and what the environments get."""
        with torch.no_grad():
            if self._act is not None:
                return self._act(self.flat.data, observations, noise)
            try:
                self._act = self._compile_acting()
                return self._act(self.flat.data, observations, noise)
            except Exception as error:
                self._tell(f"compile: the policy acts uncompiled ({_first_line(error)})")
                self._act = lambda data, observations, noise: self.objective.actor_critic.act(observations, noise)
                return self._act(self.flat.data, observations, noise)

    def _parameters(self, data: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, self.flat.views(data), strict=True))

    def _compile_gradient(self, idle: frozenset[str], weight: float) -> Callable[..., None]:
        def add_gradient(data: Tensor, message: Tensor, batch: Batch, coefficients: dict[str, Tensor]) -> None:
            def total(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                return torch.func.functional_call(self.objective, parameters, (batch, coefficients, idle))

            # With respect to each parameter, not to the flat tensor: that would add up one zero-padded gradient each.
            gradient, statistics = torch.func.grad(total, has_aux=True)(self._parameters(data))
            parts = torch.cat([*(gradient[name].reshape(-1) for name in self._names), statistics])
            message[: len(parts)].add_(parts, alpha=weight)

        return _compiled(add_gradient)

    def _compile_acting(self) -> Callable[..., tuple[Tensor, Tensor]]:
        acting = Acting(self.objective.actor_critic)

        def act(data: Tensor, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(acting, self._parameters(data), (observations, noise))

        return _compiled(act)

    def _uncompiled(self, idle: frozenset[str], weight: float) -> Callable[..., None]:
        def add_gradient(data: Tensor, message: Tensor, batch: Batch, coefficients: dict[str, Tensor]) -> None:
            with torch.enable_grad():
                EagerGradients.add(self, batch, coefficients, idle, weight)

        return add_gradient


class Acting(nn.Module):
    """`ActorCritic.act` as a module's forward pass, which `torch.func.functional_call` needs."""

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__()
        self.actor_critic = actor_critic

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampled actions, and what the environments get."""
        return self.actor_critic.act(observations, noise)


def choose_gradients(
    config: Config, objective: Objective, flat: FlatParameters, ranks: int, tell: Callable[[str], None]
) -> EagerGradients:
    """Return compiled or eager gradients, as `config.compile` asks for; `tell` gets a line where that cannot be."""
    if config.compile is False or (config.compile == "auto" and not _worth_compiling(config, ranks)):
        return EagerGradients(objective, flat)
    if flat.data.device.type == "cpu" and _compiler() is None:
        tell("compile: no C++ compiler (g++ or clang++) was found, so training runs uncompiled, several times slower")
        return EagerGradients(objective, flat)
    return CompiledGradients(objective, flat, tell)


def _worth_compiling(config: Config, ranks: int) -> bool:
    """Say whether compiling, some 10 seconds, will be made up for by faster minibatches, some 0.5 ms each."""
    samples = config.rollout_length_per_worker * config.environments_per_rank
    iterations = config.total_steps / (samples * ranks)
    epochs = max(config.train_pi_epochs, config.train_v_epochs)
    return iterations * epochs * samples / config.minibatch_size > WORTHWHILE_MINIBATCHES


def _compiler() -> str | None:
    """Return the C++ compiler that `torch.compile` would use on a CPU, or None."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Its own code object: torch keeps what it compiled by code object, and without the checks that are dropped below
    # would run what it compiled for another run, or for another size of minibatch.
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(NUMBERS)}")
    function = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    options: dict[str, Any] = {"guard_filter_fn": _guards_of_the_user, "cpp_wrapper": True}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def _guards_of_the_user(guards: Sequence[Any]) -> list[bool]:
    """Keep the checks on numbers that a user's loss or network reads from outside; drop all others.

    The others make a quarter of a small network's time, and what they watch cannot change between two calls: shapes
    and the parameters' places are fixed, and `CompiledGradients` tells apart the rest.
    """
    return [guard.guard_type in CONSTANTS and not INSIDE.search(guard.name) for guard in guards]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
