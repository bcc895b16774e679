# SPDX-License-Identifier: MIT
"""Checkpoints: written whole or not at all, verified before use, and resumed bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import set_aside, write_whole
from ppo_mpi_base.hooks import by_name
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.saved_policy import describe_space, saved_at
from ppo_mpi_base.seeding import restore_torch, seed_torch, torch_states

if TYPE_CHECKING:
    from ppo_mpi_base.worker import Worker

FORMAT = 1
KEPT = 3
"""How many checkpoints stay on disk; older ones are deleted once a newer one is whole."""


class Checkpoints:
    """The checkpoints of a run, in `save_location`/checkpoints: `<total_steps>.safetensors` with a JSON file beside it.

    The JSON file is written last and holds the checksums of both: it makes the checkpoint valid.

    Args:
        save_location: the run's; None writes nothing.
        ranks: the run's.
        seconds: time between two checkpoints.
        tell: prints a line if a checkpoint is damaged or could not be written.

    Attributes:
        failed: whether the last checkpoint could not be written.
    """

    def __init__(
        self, save_location: str | None, ranks: Communicator, seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.directory = None if save_location is None else Path(save_location) / "checkpoints"
        self.ranks, self.seconds, self.tell = ranks, seconds, tell
        self._written_at = time.monotonic()
        self.failed = False

    def begin_anew(self) -> None:
        """Move another run's checkpoints and networks aside, on rank 0, so that no results are lost or mixed."""
        if self.ranks.is_root and self.directory is not None:
            former = [
                self.directory,
                *sorted(self.directory.parent.glob("best.*")),
                *self.directory.parent.glob("latest.*"),
            ]
            set_aside(*(path for path in former if path.name.count(".") < 2))  # not what was moved earlier

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, by this rank's clock."""
        return self.directory is not None and time.monotonic() - self._written_at >= self.seconds

    def save(self, worker: Worker) -> None:
        """Write a checkpoint; a failure is reported, but does not end the run. Collective: call on all ranks."""
        self._written_at = time.monotonic()
        if self.directory is None:
            return
        local = self.ranks.gather({**local_state(worker), **_differing(worker)})
        failed = local is not None and not self._saved(worker, local)
        self.failed = self.ranks.max(float(failed)) > 0

    def _saved(self, worker: Worker, local: list[dict[str, np.ndarray]]) -> bool:
        """Write a checkpoint, on rank 0, given the `local_state` of each rank; return whether it is on disk."""
        tensors = {name: tensor.detach().cpu().numpy() for name, tensor in state(worker).items()}
        for rank, arrays in enumerate(local):
            tensors.update({f"rank{rank}/{name}": array for name, array in arrays.items()})
        try:
            self._write(tensors, {**progress(worker), **description(worker)})
        except OSError as error:
            goes_on = "" if worker.over else ": training goes on"
            self.tell(f"checkpoint at {worker.total_steps:,} steps failed ({error.strerror}){goes_on}")
            return False
        return True

    def outlook(self) -> str:
        """Say, on rank 0, how a run that was stopped, or whose end could not be written, can continue."""
        if not self.failed:
            return 'resume="auto" continues the run'
        try:
            found = self.newest() if self.ranks.is_root else None
        except ConfigurationError as error:  # what to do about it, at the next start too
            return str(error)
        if found is None:
            return "no checkpoint was written, so there is nothing to continue from"
        return f'resume="auto" continues from {found[0]["total_steps"]:,}'

    def _write(self, tensors: dict[str, np.ndarray], described: dict[str, Any]) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{described['total_steps']:015d}"
        content = safetensors.numpy.save({name: np.array(array, order="C") for name, array in tensors.items()})
        facts = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest(), **described}
        write_whole(path.with_suffix(".safetensors"), content)
        write_whole(path.with_suffix(".json"), json.dumps({**facts, "self": _digest(facts)}, indent=1).encode())
        kept = {path.stem for path in self.found[:KEPT]}
        # JSON first: tensors without it are no checkpoint. A kill may have left such tensors, or parts of files.
        for pattern in ("*.json", "*.safetensors", ".*.part"):
            for path in self.directory.glob(pattern):
                if path.stem not in kept:
                    path.unlink()

    @property
    def found(self) -> list[Path]:
        """The JSON files of all checkpoints on disk, whole or damaged, the newest first."""
        return sorted(self.directory.glob("*.json"), reverse=True) if self.directory else []

    def newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the newest whole checkpoint, or None; damaged ones are reported and skipped.

        Raises:
            ConfigurationError: it was written by a newer version of this package, or cannot be read now.
        """
        for path in self.found:
            try:
                return _read(path)
            except ConfigurationError:  # a ValueError, too
                raise
            except (FileNotFoundError, ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
                self.tell(f"checkpoint {path.name} is damaged ({error}): trying the one before")
            except OSError as error:
                raise ConfigurationError(
                    f"resume: checkpoint {path} cannot be read ({error.strerror}), but may be intact: fix that, "
                    "or choose another save_location"
                ) from error
        return None

    def _with_saved_best(
        self, found: tuple[dict[str, Any], dict[str, np.ndarray]] | None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Add the return of the saved networks to a checkpoint: worse ones must not replace better, later ones."""
        if found is not None and self.directory is not None:
            reports = found[0]["reports"]
            reports["saved_return"] = float("nan")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none are saved
                best = self.directory.parent / "best.safetensors"
                if not (saved := saved_at(best.read_bytes())):  # saved by an earlier version
                    saved = json.loads(best.with_suffix(".json").read_bytes())
                reports["saved_return"] = float(saved["episode_return"])
                if saved["total_steps"] > found[0]["total_steps"] and reports["best_return"] is not None:
                    reports["best_return"] = max(reports["best_return"], saved["episode_return"])
        return found

    def restore(self, worker: Worker) -> bool:
        """Continue from the newest whole checkpoint, if there is one. Collective: call on all ranks.

        Raises:
            ConfigurationError: it belongs to other networks, spaces or hooks.
        """
        found: Any = None
        error: ConfigurationError | None = None
        if self.ranks.is_root:
            try:
                found = self._with_saved_best(self.newest())
            except ConfigurationError as reason:
                error = reason
        self.ranks.raise_together(error)
        found = self.ranks.gather_all(found)[0]
        if found is None:
            return False
        facts, arrays = found
        same_ranks = facts["ranks"] == self.ranks.size
        of_hooks = {name: x for name, x in _of_rank(arrays, self.ranks.rank).items() if name.startswith("hooks/")}
        if of_hooks and not same_ranks:
            worker.reports.tell(f"{', '.join(of_hooks)} differed between ranks: all continue with rank 0's")
        try:
            _check_same(description(worker), facts)
            arrays.update(_other_coefficients(worker, facts))
            _fill(state(worker), {**arrays, **(of_hooks if same_ranks else {})})
        except ConfigurationError as reason:
            error = reason
        self.ranks.raise_together(error)
        continue_from(worker, facts, arrays)
        return True


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a checkpoint's facts and arrays, or raise an error that says what is wrong with it."""
    facts = json.loads(path.read_bytes())
    if not isinstance(facts, dict) or facts.pop("self", None) != _digest(facts):
        raise ValueError("its description does not match its checksum")
    if facts["format"] != FORMAT:
        raise ConfigurationError(
            f"resume: checkpoint {path} has format {facts['format']}, but this version reads {FORMAT}: "
            "use the version that wrote it, or another save_location"
        )
    content = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError("its tensors do not match their checksum")
    return facts, safetensors.numpy.load(content)


def _check_same(mine: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise `ConfigurationError` if a checkpoint has other spaces or other parameters, even if equally many."""
    for name, wanted in mine.items():
        if (found := facts.get(name, wanted)) != wanted:  # an earlier version did not write all
            if name == "parameters":
                found, wanted = next(pair for pair in itertools.zip_longest(found, wanted) if pair[0] != pair[1])
            raise ConfigurationError(
                f"resume: the checkpoint's {name} are not this run's ({found} instead of {wanted}): "
                "it belongs to another network, space or normalization; choose another save_location, or resume=False"
            )


def _other_coefficients(worker: Worker, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return, named as in a checkpoint, the coefficients whose keywords have changed since."""
    changed = _changed(worker, facts)
    changed += [name.removeprefix("anneal_") for name in changed if name.startswith("anneal_")]
    return {f"coefficients/{name}": np.array(x) for name, x in worker.config.coefficients.items() if name in changed}


def _changed(worker: Worker, facts: dict[str, Any]) -> list[str]:
    """Return which keywords for rates and coefficients differ from those of the run that wrote a checkpoint."""
    if "keywords" not in facts:  # written by an earlier version
        return []
    before, now = facts["keywords"], keywords(worker)
    return [name for name in now if name not in before or before[name] != now[name]]


def _fill(state: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> None:
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
    return {"parameters": worker.flat.data, **named, **hook_states(worker)}


def hook_states(worker: Worker) -> dict[str, Tensor]:
    """Return, by name, the tensors that hold what hooks learned, on this rank."""
    hooks = by_name(worker.config.hooks)
    return {f"hooks/{kind}/{name}": x for kind, hook in hooks.items() for name, x in hook.state().items()}


def _differing(worker: Worker) -> dict[str, np.ndarray]:
    """Return, by name, this rank's hook states that are not the same on all ranks. Collective: call on all ranks."""
    own = {name: tensor.detach().cpu().numpy() for name, tensor in hook_states(worker).items()}
    facts = {name: (x.dtype.str, x.shape, zlib.crc32(x.tobytes())) for name, x in own.items()}
    of_ranks = worker.ranks.gather_all(facts)
    return {name: array for name, array in own.items() if any(x.get(name) != facts[name] for x in of_ranks)}


def local_state(worker: Worker) -> dict[str, np.ndarray]:
    """Return, by name, what belongs to this rank alone: its episodes in progress and its random states."""
    return {
        "observations": worker.storage.observations[0].copy(),
        "discounted_returns": worker.reward_normalizer.returns.copy(),
        **torch_states(worker.device),
        **{f"environments/{name}": array for name, array in worker.environments.progress().items()},
    }


def progress(worker: Worker) -> dict[str, Any]:
    """Return how far the run is, for JSON."""
    return {
        "total_steps": worker.total_steps,
        "iteration": worker.iteration,
        "ranks": worker.ranks.size,
        "environments": worker.config.environments_per_rank,
        "learning_rates": {name: float(rate) for name, rate in worker.learning_rates.items()},  # hooks use any number
        "reports": worker.reports.state(),
        "keywords": keywords(worker),
    }


def keywords(worker: Worker) -> dict[str, Any]:
    """Return, for JSON, the keywords for rates and coefficients, whose values change during training."""
    config = worker.config
    switches = ("anneal_lr", "anneal_clip_ratio", "anneal_entropy_coef")
    annealed = any(getattr(config, name) for name in switches)
    return {
        **{name: getattr(config, name) for name in ("pi_lr", "vf_lr", *switches)},
        "total_steps": config.total_steps if annealed else None,  # it decides how fast they fall
        **config.coefficients,
    }


def description(worker: Worker) -> dict[str, Any]:
    """Return, for JSON, what a run must have in common with a checkpoint: spaces, normalization, parameters."""
    named = zip(worker.flat.names(worker.actor_critic), worker.flat.parameters(), strict=True)
    return {
        "observation spaces": describe_space(worker.environments.observation_space),
        "action spaces": describe_space(worker.environments.action_space),
        "normalized observations": worker.config.normalize_observations,
        "parameters": [[name, list(parameter.shape)] for name, parameter in named],
    }


def _of_rank(arrays: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    prefix = f"rank{rank}/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def continue_from(worker: Worker, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Continue a run whose `state` is already restored; `arrays` holds the `local_state` of each of its ranks.

    Collective: call on all ranks.
    """
    worker.total_steps, worker.iteration = facts["total_steps"], facts["iteration"]
    worker.reports.restore(facts["reports"])
    tell = worker.reports.tell
    if changed := _changed(worker, facts):
        worker.learner.anneal(worker.total_steps)
        tell(f"{', '.join(changed)} changed: the new values apply from here on")
    of_both = {"anneal_lr", *(["total_steps"] if worker.config.anneal_lr else [])}
    for name, keyword in (("policy", "pi_lr"), ("value", "vf_lr")):
        if not {keyword, *of_both}.intersection(changed):
            worker.learning_rates[name] = facts["learning_rates"][name]
    if (facts["ranks"], facts["environments"]) != (worker.ranks.size, worker.config.environments_per_rank):
        episodes = np.concatenate([x for name, x in arrays.items() if name.endswith("environments/episodes")])
        worker.environments.reset(worker.storage.observations[0], int(episodes.max()) + 1)
        if worker.ranks.rank < facts["ranks"]:
            restore_torch(_of_rank(arrays, worker.ranks.rank), worker.device)
        else:  # its own state: with equal ones, two ranks would draw the same
            seed_torch(worker.config.seed, worker.first_global_index, worker.iteration)
        was = f"{facts['ranks']} ranks x {facts['environments']} environments"
        batch = worker.config.minibatch_size * worker.ranks.size
        tell(f"resumed from {was}: episodes begin anew, updates average over {batch} samples from now on")
        return
    mine = _of_rank(arrays, worker.ranks.rank)
    restore_torch(mine, worker.device)
    worker.reward_normalizer.returns[:] = mine["discounted_returns"]
    of_episodes = {
        name.removeprefix("environments/"): x for name, x in mine.items() if name.startswith("environments/")
    }
    lost = worker.environments.resume(of_episodes, mine["observations"], worker.storage.observations[0])
    worker.reward_normalizer.returns[lost] = 0.0
    if (count := sum(worker.ranks.gather_all(len(lost)))) > 0:
        tell(f"resumed at {worker.total_steps:,} steps: {count} environments cannot be restored and begin new episodes")
    else:
        tell(f"resumed at {worker.total_steps:,} steps")
