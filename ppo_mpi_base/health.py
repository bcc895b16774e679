# SPDX-License-Identifier: MIT
"""Checks that a run is sound: finite numbers, valid settings by hooks, ranks in step; each check names the culprit."""

from __future__ import annotations

import math
import numbers
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_mpi_base.config import COEFFICIENTS
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.hooks import Hooks, by_name

if TYPE_CHECKING:
    from ppo_mpi_base.learner import Learner
    from ppo_mpi_base.rollout import Rollout
    from ppo_mpi_base.worker import Worker


States = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Names of hooks' states, with their shapes and dtypes."""


def checked_states(hooks: Sequence[Hooks]) -> States:
    """Return the names, shapes and dtypes of hooks' states now.

    Raises:
        ConfigurationError: one cannot be saved in a checkpoint and restored from it.
    """
    found: States = {}
    for kind, hook in by_name(hooks).items():
        if not callable(hook.state):
            raise ConfigurationError(f"{kind}.state is a method of Hooks: give the attribute another name")
        state: Any = hook.state()
        if not isinstance(state, dict):
            raise ConfigurationError(f"{kind}.state must return a dict of tensors, not {state!r}")
        for name, x in state.items():
            of = f"{kind}.state: {name!r}"
            if not isinstance(x, Tensor):
                raise ConfigurationError(f"{of} must be a tensor, not {type(x).__name__}")
            if x.dtype == torch.bfloat16 or x.dtype.is_complex:
                raise ConfigurationError(f"{of} must be of a dtype that NumPy and safetensors support, not {x.dtype}")
            if x.numel() and x.data_ptr() != hook.state()[name].data_ptr():
                raise ConfigurationError(f"{of} is a different tensor in each call: a resumed run could not fill it")
            found[of] = tuple(x.shape), x.dtype
    return found


def check_states_kept(worker: Worker) -> None:
    """Raise `ConfigurationError` if a hook's state has changed its name, shape or dtype: no run could resume it."""
    now = checked_states(worker.config.hooks)
    for name in dict.fromkeys([*worker.hook_states, *now]):
        first, found = worker.hook_states.get(name), now.get(name)
        if first != found:
            raise ConfigurationError(
                f"{name} was {_shown(first)} at the start and is {_shown(found)} in iteration {worker.iteration}: it "
                "must not change, or a resumed run could not fill it"
            )


def _shown(state: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if state is None else f"{state[1]} {state[0]}"


def check_finite(worker: Worker) -> None:
    """Raise `TrainingError` if this rank's rollout has an observation or a reward that is infinite or NaN."""
    if (found := worker.storage.first_bad()) is not None:
        source, t, i = found
        raise TrainingError(
            f"{source} is not finite: rank {worker.ranks.rank}, environment {worker.first_global_index + i}, "
            f"step {t} of iteration {worker.iteration} (total_steps {worker.total_steps}); nothing was learned from it"
        )


def raise_not_finite(learner: Learner) -> None:
    """Recompute each rank's gradient, to name the rank that made it infinite or NaN. Collective: call on all ranks."""
    learner.begin_update(learner.update)
    for batch in learner.update:
        learner.backward(batch)
    finite = learner.ranks.gather_all(bool(learner.flat.message.isfinite().all()))
    culprits = ", ".join(str(rank) for rank, fine in enumerate(finite) if not fine) or "any (only their sum)"
    rollout = learner.rollout
    learner.ranks.raise_together(
        TrainingError(
            f"gradient or loss is not finite: rank {culprits}, iteration {rollout.iteration} "
            f"(total_steps {rollout.total_steps}); no parameter was changed by it"
        )
    )


def check_rates_and_coefficients(learner: Learner) -> None:
    """Raise `ConfigurationError` if a hook has set an invalid learning rate or coefficient."""
    rates: dict[str, Any] = dict(learner.learning_rates)
    for text, wanted, there in (
        ("learning_rates", learner.flat.slices, rates),
        ("coefficients", learner.config.coefficients, learner.coefficients),
    ):
        if missing := sorted(wanted.keys() - there.keys()):
            raise ConfigurationError(f"worker.{text}[{missing[0]!r}] is missing: a hook must not remove it")
    for name, rate in rates.items():
        if name not in learner.epochs or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < math.inf:
            raise ConfigurationError(
                f"worker.learning_rates[{name!r}]={rate!r}: the names are 'policy' and 'value', the values "
                "numbers of at least 0"
            )
    known = learner.config.coefficients
    coefficients: dict[str, Any] = dict(learner.coefficients)
    for name, coefficient in coefficients.items():
        if not isinstance(coefficient, Tensor) or coefficient.shape != ():
            raise ConfigurationError(
                f"worker.coefficients[{name!r}]={coefficient!r} must stay a 0-d tensor: change it in place, as with "
                f"worker.coefficients[{name!r}].fill_(0.1)"
            )
        number = float(coefficient)
        if name not in known or not math.isfinite(number) or (name in COEFFICIENTS and number < 0):
            raise ConfigurationError(
                f"worker.coefficients[{name!r}]={number:g}: the names are {', '.join(known)}; values must be finite, "
                "PPO's own at least 0; loss_coefficients adds others"
            )


def check_row(worker: Worker, row: dict[str, Any]) -> None:
    """Raise `ConfigurationError` if a hook has put anything but named numbers into the row of the logs.

    Or if it has changed one of the two numbers by which plots and resumed runs find the row.
    """
    for name, value in (("total_steps", worker.total_steps), ("iteration", worker.iteration)):
        if row.get(name) != value:
            found = row.get(name, "missing")
            raise ConfigurationError(f"on_iteration: statistics[{name!r}] must stay {value}, not {found}")
    for name, value in row.items():
        if not isinstance(name, str):
            raise ConfigurationError(f"on_iteration: statistics[{name!r}]: the name must be a str")
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
            raise ConfigurationError(f"on_iteration: statistics[{name!r}]={value!r} must be one number") from error


def check_hooked(worker: Worker, rollout: Rollout) -> None:
    """Check a rollout after hooks have changed it, on this rank.

    Raises:
        ConfigurationError: minibatches cannot be taken from `rollout.extras`, or rewards have a gradient.
        TrainingError: a reward is no longer finite.
    """
    if rollout.rewards.requires_grad:
        raise ConfigurationError(
            "on_rollout: rollout.rewards depend on parameters now: detach() what you add to them, or compute it under "
            "torch.no_grad()"
        )
    if not rollout.rewards.isfinite().all():
        raise TrainingError(
            f"on_rollout: a hook has made rollout.rewards infinite or NaN: rank {worker.ranks.rank}, iteration "
            f"{worker.iteration} (total_steps {worker.total_steps})"
        )
    shape = tuple(rollout.rewards.shape)
    for name, extra in rollout.extras.items():
        if not isinstance(extra, Tensor) or extra.shape[:2] != shape:
            found = tuple(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
            raise ConfigurationError(f"rollout.extras[{name!r}] must be a tensor (T, N, ...) with {shape}, not {found}")
        if extra.device != (device := rollout.rewards.device):
            raise ConfigurationError(
                f"rollout.extras[{name!r}] must be on {device}, as the rollout is, not {extra.device}"
            )


def check_attached(worker: Worker) -> None:
    """Raise `ConfigurationError` if parameters or gradients have left the flat tensors, and so would not be trained."""
    if not worker.flat.attached():
        raise ConfigurationError(
            "a hook or callback has separated parameters or gradients from the flat tensors that are trained: never "
            "call zero_grad() or load_state_dict(assign=True) on the networks, or replace a parameter's data or grad"
        )


def check_in_step(worker: Worker) -> None:
    """Compare parameters across ranks by a hash. Collective: call on all ranks.

    Raises:
        TrainingError: they differ; the message names the first differing tensor and rank.
    """
    hashes = worker.ranks.gather_all(zlib.crc32(worker.flat.data.cpu().numpy().data))
    if len(set(hashes)) == 1:
        return
    rank = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
    tensors = worker.ranks.gather_all([zlib.crc32(p.detach().cpu().numpy().data) for p in worker.flat.parameters()])
    names = worker.flat.names(worker.actor_critic)
    name = next(name for k, name in enumerate(names) if tensors[rank][k] != tensors[0][k])
    error = TrainingError(
        f"ranks are out of step: {name} on rank {rank} differs from rank 0's in iteration {worker.iteration} "
        f"(total_steps {worker.total_steps}): a hook or a callback must do the same on all ranks"
    )
    worker.ranks.raise_together(error)
