# SPDX-License-Identifier: MIT
"""A run's checkpoints on disk: written whole or not at all, and verified before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from ppo_mpi_base import run_state
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import set_aside, write_whole
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.run_state import Arrays, Facts
from ppo_mpi_base.saved_policy import saved_at

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
        found, failed = run_state.collected(worker), False
        try:
            if found is not None:
                self._write(*found)
        except OSError as error:
            failed = True
            goes_on = "" if worker.over else ": training goes on"
            self.tell(f"checkpoint at {worker.total_steps:,} steps failed ({error.strerror}){goes_on}")
        self.failed = self.ranks.max(float(failed)) > 0

    def outlook(self) -> str:
        """Say, on rank 0, how a run that was stopped, or whose end could not be written, can continue."""
        if self.directory is None:
            return "save_location=None saved nothing to continue from"
        if not self.failed:
            return 'resume="auto" continues the run'
        try:
            found = self.newest() if self.ranks.is_root else None
        except ConfigurationError as error:  # what to do about it, at the next start too
            return str(error)
        if found is None:
            return "no checkpoint was written, so there is nothing to continue from"
        return f'resume="auto" continues from {found[0]["total_steps"]:,}'

    def _write(self, described: Facts, arrays: Arrays) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{described['total_steps']:015d}"
        content = safetensors.numpy.save({name: np.array(array, order="C") for name, array in arrays.items()})
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

    def newest(self) -> tuple[Facts, Arrays] | None:
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

    def _with_saved_best(self, found: tuple[Facts, Arrays] | None) -> tuple[Facts, Arrays] | None:
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
        run_state.restore(worker, *found)
        return True


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[Facts, Arrays]:
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
