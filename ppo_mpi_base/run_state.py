# SPDX-License-Identifier: MIT
"""What a run's checkpoint holds: its state, collected from all ranks, and given back to them bit for bit."""

from __future__ import annotations

import itertools
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import by_name
from ppo_mpi_base.saved_policy import describe_space
from ppo_mpi_base.seeding import restore_torch, seed_torch, torch_states

if TYPE_CHECKING:
    from ppo_mpi_base.worker import Worker

Facts = dict[str, Any]
"""What a checkpoint says besides its tensors, for JSON."""

Arrays = dict[str, np.ndarray]
"""The tensors of a checkpoint, by name; those that belong to one rank alone as "rank<number>/<name>"."""


def collected(worker: Worker) -> tuple[Facts, Arrays] | None:
    """Return a run's whole state on rank 0, None on other ranks. Collective: call on all ranks."""
    of_ranks = worker.ranks.gather({**_local_state(worker), **_differing(worker)})
    if of_ranks is None:
        return None
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state(worker).items()}
    for rank, own in enumerate(of_ranks):
        arrays.update({f"rank{rank}/{name}": array for name, array in own.items()})
    return {**_progress(worker), **_description(worker)}, arrays


def restore(worker: Worker, facts: Facts, arrays: Arrays) -> None:
    """Continue from what `collected` returned, on this or another number of ranks. Collective: call on all ranks.

    Raises:
        ConfigurationError: it belongs to other networks, spaces or hooks.
    """
    same_ranks = facts["ranks"] == worker.ranks.size
    error: ConfigurationError | None = None
    of_hooks = {name: x for name, x in _of_rank(arrays, worker.ranks.rank).items() if name.startswith("hooks/")}
    if of_hooks and not same_ranks:
        worker.reports.tell(f"{', '.join(of_hooks)} differed between ranks: all continue with rank 0's")
    changed = _changed(worker, facts)
    try:
        _check_same(_description(worker), facts)
        _fill(state(worker), {**arrays, **_coefficients(worker, changed), **(of_hooks if same_ranks else {})})
    except ConfigurationError as reason:
        error = reason
    worker.ranks.raise_together(error)
    worker.total_steps, worker.iteration = facts["total_steps"], facts["iteration"]
    worker.reports.restore(facts["reports"])
    _continue_schedules(worker, changed, facts["learning_rates"])
    if same_ranks and facts["environments"] == worker.config.environments_per_rank:
        _continue_episodes(worker, _of_rank(arrays, worker.ranks.rank))
    else:
        _begin_episodes(worker, facts, arrays)


def state(worker: Worker) -> dict[str, Tensor]:
    """Return, by name, the tensors that hold what was learned; writing into them restores it.

    They are equal on all ranks, except perhaps those of hooks.
    """
    parts: dict[str, dict[str, Tensor]] = {
        "adam": worker.learner.optimizer.state(),
        "observations": worker.observation_moments.state(),
        "rewards": worker.reward_normalizer.moments.state(),
        "coefficients": worker.coefficients,
        "not_trained": {str(k): tensor for k, tensor in enumerate(worker.learner.not_trained())},
    }
    named = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return {"parameters": worker.flat.data, **named, **_hook_states(worker)}


def _hook_states(worker: Worker) -> dict[str, Tensor]:
    """Return, by name, the tensors that hold what hooks learned, on this rank."""
    hooks = by_name(worker.config.hooks)
    return {f"hooks/{kind}/{name}": x for kind, hook in hooks.items() for name, x in hook.state().items()}


def _differing(worker: Worker) -> Arrays:
    """Return, by name, this rank's hook states that are not the same on all ranks. Collective: call on all ranks."""
    own = {name: tensor.detach().cpu().numpy() for name, tensor in _hook_states(worker).items()}
    facts = {name: (x.dtype.str, x.shape, zlib.crc32(x.tobytes())) for name, x in own.items()}
    of_ranks = worker.ranks.gather_all(facts)
    return {name: array for name, array in own.items() if any(x.get(name) != facts[name] for x in of_ranks)}


def _local_state(worker: Worker) -> Arrays:
    """Return, by name, what belongs to this rank alone: its episodes in progress and its random states."""
    return {
        "observations": worker.storage.observations[0].copy(),
        "discounted_returns": worker.reward_normalizer.returns.copy(),
        **torch_states(worker.device),
        **{f"environments/{name}": array for name, array in worker.environments.progress().items()},
    }


def _progress(worker: Worker) -> Facts:
    """Return how far the run is, for JSON."""
    return {
        "total_steps": worker.total_steps,
        "iteration": worker.iteration,
        "ranks": worker.ranks.size,
        "environments": worker.config.environments_per_rank,
        "learning_rates": {name: float(rate) for name, rate in worker.learning_rates.items()},  # hooks use any number
        "reports": worker.reports.state(),
        "keywords": _keywords(worker),
    }


def _keywords(worker: Worker) -> Facts:
    """Return, for JSON, the keywords for rates and coefficients, whose values change during training."""
    config = worker.config
    switches = ("anneal_lr", "anneal_clip_ratio", "anneal_entropy_coef")
    annealed = any(getattr(config, name) for name in switches)
    return {
        **{name: getattr(config, name) for name in ("pi_lr", "vf_lr", *switches)},
        "total_steps": config.total_steps if annealed else None,  # it decides how fast they fall
        **config.coefficients,
    }


def _description(worker: Worker) -> Facts:
    """Return, for JSON, what a run must have in common with a checkpoint: spaces, normalization, parameters."""
    named = zip(worker.flat.names(worker.actor_critic), worker.flat.parameters(), strict=True)
    return {
        "observation spaces": describe_space(worker.environments.observation_space),
        "action spaces": describe_space(worker.environments.action_space),
        "normalized observations": worker.config.normalize_observations,
        "parameters": [[name, list(parameter.shape)] for name, parameter in named],
    }


def _changed(worker: Worker, facts: Facts) -> list[str]:
    """Return which keywords for rates and coefficients differ from those of the run that wrote a checkpoint."""
    if "keywords" not in facts:  # written by an earlier version
        return []
    before, now = facts["keywords"], _keywords(worker)
    return [name for name in now if name not in before or before[name] != now[name]]


def _check_same(mine: Facts, facts: Facts) -> None:
    """Raise `ConfigurationError` if a checkpoint has other spaces or other parameters, even if equally many."""
    for name, wanted in mine.items():
        found: Any = facts.get(name, wanted)  # an earlier version did not write all
        if found != wanted:
            if name == "parameters":
                found, wanted = next(pair for pair in itertools.zip_longest(found, wanted) if pair[0] != pair[1])
            raise ConfigurationError(
                f"resume: the checkpoint's {name} are not this run's ({found} instead of {wanted}): "
                "it belongs to another network, space or normalization; choose another save_location, or resume=False"
            )


def _fill(state: dict[str, Tensor], arrays: Arrays) -> None:
    """Copy arrays into the tensors of the same names, all or none."""
    for name, tensor in state.items():
        found = f"the checkpoint's has shape {arrays[name].shape}" if name in arrays else "the checkpoint has none"
        if name not in arrays or arrays[name].shape != tuple(tensor.shape):
            raise ConfigurationError(
                f"resume: this run's {name} has shape {tuple(tensor.shape)}, but {found}: it belongs to another "
                "network, space, normalization or hook"
            )
    for name, tensor in state.items():
        tensor.detach().copy_(torch.as_tensor(arrays[name]))


def _of_rank(arrays: Arrays, rank: int) -> Arrays:
    prefix = f"rank{rank}/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _coefficients(worker: Worker, changed: list[str]) -> Arrays:
    """Return, named as in a checkpoint, the coefficients whose keywords have changed since."""
    named = {name.removeprefix("anneal_") for name in changed}
    return {f"coefficients/{name}": np.array(x) for name, x in worker.config.coefficients.items() if name in named}


def _continue_schedules(worker: Worker, changed: list[str], rates: dict[str, float]) -> None:
    """Set the learning rates to a checkpoint's, unless keywords that decide them have changed since."""
    if changed:
        worker.learner.anneal(worker.total_steps)
        worker.reports.tell(f"{', '.join(changed)} changed: the new values apply from here on")
    of_both = {"anneal_lr", *(["total_steps"] if worker.config.anneal_lr else [])}
    for name, keyword in (("policy", "pi_lr"), ("value", "vf_lr")):
        if not {keyword, *of_both}.intersection(changed):
            worker.learning_rates[name] = rates[name]


def _continue_episodes(worker: Worker, own: Arrays) -> None:
    """Continue a rank's episodes and random numbers from its `_local_state`. Collective: call on all ranks."""
    worker.reward_normalizer.returns[:] = own["discounted_returns"]
    episodes = {name.removeprefix("environments/"): x for name, x in own.items() if name.startswith("environments/")}
    lost = worker.environments.resume(episodes, own["observations"], worker.storage.observations[0])
    restore_torch(own, worker.device)  # now: environments that are played again may have drawn from it
    worker.reward_normalizer.returns[lost] = 0.0
    count = sum(worker.ranks.gather_all(len(lost)))
    anew = f": {count} environments cannot be restored and begin new episodes" if count else ""
    worker.reports.tell(f"resumed at {worker.total_steps:,} steps{anew}")


def _begin_episodes(worker: Worker, facts: Facts, arrays: Arrays) -> None:
    """Begin new episodes, because ranks or their environments are more or fewer than before."""
    begun = np.concatenate([x for name, x in arrays.items() if name.endswith("environments/episodes")])
    worker.environments.reset(worker.storage.observations[0], int(begun.max()) + 1)
    if worker.ranks.rank < facts["ranks"]:
        restore_torch(_of_rank(arrays, worker.ranks.rank), worker.device)
    else:  # its own state: with equal ones, two ranks would draw the same
        seed_torch(worker.config.seed, worker.first_global_index, worker.iteration)
    was = f"{facts['ranks']} ranks x {facts['environments']} environments"
    samples = worker.config.minibatch_size * worker.ranks.size
    worker.reports.tell(f"resumed from {was}: episodes begin anew, updates average over {samples} samples from now on")
