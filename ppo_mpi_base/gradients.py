# SPDX-License-Identifier: MIT
"""The gradient of the user's losses, and the policy's actions: run eagerly or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ppo_mpi_base.compilation import Eager, InPlace
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.flat_parameters import FlatParameters
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import SharedTrunk, SpaceToDepthConv2d
from ppo_mpi_base.origins import Origins
from ppo_mpi_base.policies import ActorCritic, action_noise, any_observations
from ppo_mpi_base.reports import is_column
from ppo_mpi_base.rollout import Batch
from ppo_mpi_base.seeding import torch_kept
from ppo_mpi_base.undisturbed import undisturbed

MOST_STATISTICS = 32
"""Maximum number of statistics, including losses, that are sent with each gradient."""

CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SpaceToDepthConv2d)
"""Layers that use their weights only to multiply by them, in bfloat16 if that is the precision."""

LossFunction = Callable[[ActorCritic, Batch, dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]


class Objective(nn.Module):
    """The sum of the losses that are being minimised, and the statistics, as one function of the parameters."""

    def __init__(self, actor_critic: ActorCritic, loss_fn: LossFunction, hooks: Sequence[Hooks]) -> None:
        super().__init__()
        self.actor_critic, self.loss_fn, self.hooks = actor_critic, loss_fn, list(hooks)
        self.known: list[str] = []
        """The statistics' names, once known: their places in the message must stay the same."""
        self.others: frozenset[str] = frozenset()
        """The losses and statistics, by their names in `known`, that other ranks compute instead of this one."""

    def terms(self, batch: Batch, coefficients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the named losses, after all hooks, and the statistics, which include the losses."""
        return self.complete(batch, *self.loss_fn(self.actor_critic, batch, coefficients))

    def complete(
        self, batch: Batch, losses: dict[str, Tensor], statistics: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the loss function returned, after all hooks, with the losses among the statistics."""
        for hook in self.hooks:
            returned: Any = hook.on_losses(self.actor_critic, batch, losses)
            if not isinstance(returned, dict):
                name, found = type(hook).__name__, type(returned).__name__
                raise ConfigurationError(f"{name}.on_losses must return the dict of losses, not {found}")
            losses = returned
        return losses, {**{f"{name}_loss": loss for name, loss in losses.items()}, **statistics}

    def forward(self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str]) -> tuple[Tensor, Tensor]:
        """Return the sum of this rank's losses except idle ones, a scalar, and statistics (S,), 0 for other ranks'."""
        losses, statistics = self.terms(batch, coefficients)
        if self.known and list(statistics) != self.known:
            raise ConfigurationError(
                f"losses and statistics were {', '.join(self.known)} at first, and are {', '.join(statistics)} now: "
                "loss_fn and on_losses must always return the same ones; multiply by 0 a loss that should not count"
            )
        own = [loss for name, loss in losses.items() if name not in idle and f"{name}_loss" not in self.others]
        nothing = torch.zeros_like(own[0])
        numbers = [nothing if name in self.others else value.detach() for name, value in statistics.items()]
        return torch.stack(own).sum(), torch.stack(numbers)


def checked_names(
    objective: Objective, batch: Batch, coefficients: dict[str, Tensor], config: Config
) -> tuple[list[str], list[str]]:
    """Evaluate the losses once, and return the names of losses and statistics.

    Raises:
        ConfigurationError: the user's loss function returns the wrong thing, or reads a missing coefficient or extra.
    """
    # Without a trace: a resumed run does it once more, and must draw the same random numbers afterwards.
    with undisturbed(objective.actor_critic, evaluating=False), torch.enable_grad():
        try:
            returned = objective.loss_fn(objective.actor_critic, batch, coefficients)
        except KeyError as error:
            missing, extras = error.args[0] if error.args else None, ", ".join(batch.extras) or "none"
            if missing in coefficients or missing in batch.extras:
                raise
            raise ConfigurationError(
                f"loss_fn reads {missing!r}, which is missing: coefficients are {', '.join(coefficients)}, and "
                f"PPO(loss_coefficients={{{missing!r}: ...}}) would add it; extras, which hooks and advantage_fn "
                f"add to rollout.extras, are {extras}"
            ) from error
        if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, dict) for x in returned)):
            raise ConfigurationError(
                f"loss_fn must return two dicts of scalar tensors, (losses, statistics), not {type(returned).__name__}"
            )
        losses, statistics = objective.complete(batch, *returned)
    for name in returned[1]:
        if is_column(name) or name in {f"{loss}_loss" for loss in losses}:
            raise ConfigurationError(f"loss_fn: the statistic {name!r} would hide a column of the logs: rename it")
    for name, value in statistics.items():
        if not isinstance(value, Tensor) or value.shape != ():
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ConfigurationError(f"loss_fn: {name!r} must be a scalar tensor, but has {found}")
        if value.device != (device := batch.advantages.device):
            raise ConfigurationError(f"loss_fn: {name!r} must be on {device}, as the minibatch is, not {value.device}")
    untrained = [name for name, loss in losses.items() if not loss.requires_grad]
    if untrained or not losses:
        raise ConfigurationError(
            f"loss_fn: the loss {', '.join(map(repr, untrained)) or '(there is none)'} depends on no parameter that is "
            "trained: compute it from actor_critic, without detach() or numpy, or leave it out"
        )
    if len(statistics) > MOST_STATISTICS:
        raise ConfigurationError(f"loss_fn: {len(statistics)} losses and statistics, but at most {MOST_STATISTICS} fit")
    if config.target_kl > 0 and "kl" not in statistics:
        raise ConfigurationError(f"target_kl={config.target_kl} needs a loss_fn that returns the statistic 'kl'")
    return list(losses), list(statistics)


def origins_of_terms(objective: Objective, batch: Batch, coefficients: dict[str, Tensor]) -> dict[str, frozenset[str]]:
    """Evaluate the losses once; return the networks, "policy" and "value", that each loss and statistic depends on.

    Raises:
        ConfigurationError: the losses also train parameters of neither network.
    """
    actor_critic = objective.actor_critic
    with undisturbed(actor_critic, evaluating=False), torch.enable_grad():
        # Inside `undisturbed`: there, the parameters have their own tensors.
        with Origins(actor_critic.parameter_slices()) as origins:
            losses, statistics = objective.terms(batch, coefficients)
        if not _trained_by(losses.values()) <= set(actor_critic.parameters()):
            raise ConfigurationError("they train parameters that belong to neither network")
        return {name: origins.of(value) for name, value in statistics.items()}


def _trained_by(losses: Iterable[Tensor]) -> set[Tensor]:
    """Return the tensors that `backward` of these losses would give a gradient."""
    nodes: list[Any] = [loss.grad_fn for loss in losses]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [origin for origin, _ in node.next_functions]
            if hasattr(node, "variable"):  # torch's AccumulateGrad
                found.add(node.variable)
    return found


class Gradients:
    """Adds the losses' gradients to the flat message, and lets the policy act.

    Args:
        objective: the losses.
        flat: where parameters and gradients are.
        compiler: compiles the losses and the policy, or leaves them as they are.
    """

    def __init__(self, objective: Objective, flat: FlatParameters, compiler: Eager) -> None:
        self.objective, self.flat = objective, flat
        self._compiler = compiler
        self._names = flat.names(objective)
        self._trained = self._names
        self._written = flat.parts  # their gradients, and the statistics
        self._left_out: Callable[[], AbstractContextManager[None]] = nullcontext
        # torch.compile would distinguish these cases itself, but would have to check for them in each call.
        self._additions: dict[tuple[Any, ...], InPlace] = {}
        self._weights = _cast_weights(objective.actor_critic, flat.data.device)
        self._cast = {name: weight.detach().to(torch.bfloat16) for name, weight in self._weights.items()}
        self._acting = compiler(_acting(objective.actor_critic, self._cast), "the policy acts")
        self._acted: tuple[Tensor, ...] | None = None  # on a device with its own memory

    def leave_to_others(self, slices: frozenset[str], terms: frozenset[str]) -> None:
        """Add no gradients to these slices, and compute none of these losses and statistics: other ranks do."""
        self.objective.others = terms
        # For uncompiled losses: a compiler removes unused computations itself.
        self._left_out = partial(self.objective.actor_critic.idling, *slices) if slices else nullcontext
        own = [k for k, name in enumerate(self.flat.slice_names) if name not in slices]
        self._trained = [self._names[k] for k in own]
        self._written = [*(self.flat.parts[k] for k in own), self.flat.parts[-1]]

    @torch.no_grad()
    def begin_rollout(self) -> None:
        """Use the current parameters for acting, and notice what hooks have changed."""
        self.check_again()
        for name, weight in self._weights.items():
            self._cast[name].copy_(weight)

    def check_again(self) -> None:
        """Let compiled losses notice what hooks have changed outside their tensors."""
        self._compiler.check_again()

    def add(
        self, batch: Batch, coefficients: dict[str, Tensor], idle: frozenset[str], weight: float, first: bool = False
    ) -> None:
        """Add `weight` times the gradient, and the statistics, of one minibatch to the flat message.

        If it is an update's first, overwrite what was there: writing and reading zeros would take time, too.
        """
        key = (idle, weight, first, batch.advantages.shape[0], *batch.extras)
        addition = self._additions.get(key)
        if addition is None:
            names = list(batch.extras), list(coefficients)
            addition = self._additions[key] = self._addition(idle, weight, first, *names)
        with torch.no_grad():
            addition(*self._written, self.flat.data, *batch[:-1], *batch.extras.values(), *coefficients.values())

    def act(self, observations: Tensor, noise: Tensor, out: Sequence[Tensor]) -> None:
        """Sample actions for observations (N, ...); overwrite `out` with them, and with what the environments get.

        If one network gives policy and value, also with the actions' log-probabilities and the values, (N,) each.
        Noise is on the networks' device, all else in host memory. On a CPU, the policy's own call writes there: after
        environments have emptied the processor's caches, each further operation is slow.
        """
        device = noise.device
        with torch.no_grad():
            if device.type == "cpu":
                self._acting(*out, observations, noise)
                return
            if self._acted is None:
                self._acted = tuple(torch.empty_like(x, device=device) for x in out)
            self._acting(*self._acted, observations.to(device), noise)
            for x, acted in zip(out, self._acted, strict=True):
                x.copy_(acted)

    def _addition(
        self, idle: frozenset[str], weight: float, first: bool, extras: list[str], coefficients: list[str]
    ) -> InPlace:
        """Return the function that `add` calls, of the tensors to write, the parameters and a minibatch's tensors."""
        trained, count = self._trained, len(self._written)

        def arguments(tensors: Sequence[Tensor]) -> tuple[Batch, dict[str, Tensor], frozenset[str]]:
            columns, rest = tensors[: len(Batch._fields) - 1], tensors[len(Batch._fields) - 1 :]
            batch = Batch._make([*columns, dict(zip(extras, rest, strict=False))])
            return batch, dict(zip(coefficients, rest[len(extras) :], strict=True)), idle

        def by_autograd(*tensors: Tensor) -> None:
            if first:
                self.flat.message.zero_()
            with torch.enable_grad(), self._left_out():
                total, statistics = self.objective(*arguments(tensors[count + 1 :]))
                (total * weight).backward()
            self.flat.statistics[: len(statistics)].add_(statistics, alpha=weight)

        def traceable(*tensors: Tensor) -> None:
            *gradient, numbers = tensors[:count]
            parameters = dict(zip(self._names, self.flat.views(tensors[count]), strict=True))

            def total(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                return functional_call(self.objective, {**parameters, **own}, arguments(tensors[count + 1 :]))

            # With respect to each parameter: for the flat tensor, one zero-padded gradient each would be added up.
            found, statistics = torch.func.grad(total, has_aux=True)({name: parameters[name] for name in trained})
            sums = [*zip(gradient, found.values(), strict=True), (numbers[: len(statistics)], statistics)]
            for old, new in sums:
                old.copy_(new * weight if first else old + new * weight)

        return self._compiler(traceable, "the losses run", by_autograd)


class _Acting(nn.Module):
    """What the policy does in each step of a rollout, as a module, so that other tensors can replace its weights.

    One network for both gives values with the actions. If there are two, the value network waits for a large batch.
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__()
        self.actor_critic = actor_critic

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Return actions, what environments get, and perhaps log-probabilities and values."""
        if self.actor_critic.value_network is None:
            return self.actor_critic.act_and_evaluate(observations, noise)
        return self.actor_critic.act(observations, noise)


def _cast_weights(actor_critic: ActorCritic, device: torch.device) -> dict[str, Tensor]:
    """Return the weights that autocast would cast again in each step of a rollout, by their names in `_Acting`.

    There are none if a user's network does not run with them, because it leaves autocast for some of its layers.
    """
    if actor_critic.precision != "bfloat16":
        return {}
    module = _Acting(actor_critic)
    heads = [head for part in module.modules() if isinstance(part, SharedTrunk) for head in (part.policy, part.value)]
    not_cast = {layer for head in heads for layer in head.modules()}
    weights = {
        f"{layer_name}.{name}": weight
        for layer_name, layer in module.named_modules()
        if type(layer) in CAST_LAYERS and layer not in not_cast
        for name, weight in layer.named_parameters(recurse=False)
    }
    return weights if _runs_by(module, weights, device) else {}


def _runs_by(module: _Acting, weights: dict[str, Tensor], device: torch.device) -> bool:
    """Return whether the policy runs with weights in bfloat16; buffers and random states do not change."""
    actor_critic = module.actor_critic
    observations = any_observations(actor_critic.observation_space, 2).to(device)
    noise = action_noise(actor_critic.action_space, np.random.default_rng(0), 2)
    copies = {name: weight.detach().to(torch.bfloat16) for name, weight in weights.items()}
    copies |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.no_grad(), torch_kept(device):
            numbers = torch.as_tensor(noise, dtype=torch.get_default_dtype(), device=device)
            functional_call(module, copies, (observations, numbers))
    except Exception:  # any error in the user's network
        return False
    return True


def _acting(actor_critic: ActorCritic, weights: dict[str, Tensor]) -> InPlace:
    """Return the function that overwrites tensors with what `_Acting` returns for observations and noise."""
    module = _Acting(actor_critic)

    def act(*tensors: Tensor) -> None:
        *written, observations, noise = tensors
        acted = functional_call(module, weights, (observations, noise)) if weights else module(observations, noise)
        for old, new in zip(written, acted, strict=True):
            old.copy_(new)

    return act
