# SPDX-License-Identifier: MIT
"""A run's file, run.toml: the settings it was started with, and the facts of where and with which code it ran."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.export import SUFFIXES
from ppo_mpi_base.files import set_aside, write_whole
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.provenance import facts

if TYPE_CHECKING:
    from ppo_mpi_base.rollout import Rollout
    from ppo_mpi_base.worker import Worker

NAME = "run.toml"
FACTS = "facts"
NONE, NONE_WITHIN = "none", "<None>"
"""Words for Python's None, which TOML lacks: as a setting, and inside one, where "none" may be an ordinary word."""
EVALUATION, VIDEO, POLICY = "evaluation.json", "video.mp4", "policy"
OUTPUTS = (EVALUATION, VIDEO, *(POLICY + suffix for suffix in SUFFIXES.values()))
"""What `ppo-mpi evaluate`, `video` and `export` write next to a run's file by default."""


class KeepRunFile(Hooks):
    """Writes a run's file after its first rollout, so that a run that fails earlier leaves a former run's file alone.

    A run resumed with the same settings keeps the facts of its earlier processes in `facts.before`. Otherwise an
    existing file is set aside and, if a new run begins, so are the `OUTPUTS` made from the former run's networks.

    Args:
        path: path of the file.
        settings: the settings given to `ppo-mpi train`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self._kept = path, settings, False

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        """Write the file, on rank 0."""
        if self._kept or not worker.ranks.is_root:
            return
        self._kept = True
        try:
            self._write(worker.ranks.size, goes_on=worker.iteration > 0)  # "resume" may have found no checkpoint
        except OSError as error:
            worker.reports.tell_failure(f"{self.path} could not be written ({error.strerror}): training goes on")

    def _write(self, ranks: int, goes_on: bool) -> None:
        same_run = goes_on and self.path.exists() and same(self.path, self.settings)
        before = _beginnings(self.path) if same_run else []
        # Without "resume": the file is for starting the same run again, not for continuing this one.
        text = document({**self.settings, "resume": False}, ranks, before)
        if not same_run:  # only now: `document` waits for git, and a run without its file is hard to continue
            set_aside(self.path, *([] if goes_on else map(self.path.with_name, OUTPUTS)))
        write_whole(self.path, text.encode())


def document(settings: dict[str, Any], ranks: int, before: Sequence[dict[str, Any]] = ()) -> str:
    """Return the text of a run's file: settings, facts of this process, and those of the processes before it."""
    written = {name: NONE if value is None else _without_none(value) for name, value in settings.items()}
    header = "# `ppo-mpi train` with this file as ENV_ID starts the same run again, on the same number of ranks.\n"
    told = {**facts(ranks), **({"before": list(before)} if before else {})}
    return header + tomli_w.dumps({**written, FACTS: told})


def read(path: Path) -> dict[str, Any]:
    """Return the settings of a file written by `KeepRunFile`, or by hand, with an "env_id" among them.

    Raises:
        ConfigurationError: the file is missing, not TOML, or has no env_id.
    """
    content = _content(path)
    content.pop(FACTS, None)
    if not isinstance(content.get("env_id"), str):
        raise ConfigurationError(f'{path} has no env_id, such as env_id = "CartPole-v1"')
    return {name: None if value == NONE else _with_none(value) for name, value in content.items()}


def same(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether a file holds these settings, apart from whether and how to resume the run.

    Raises:
        ConfigurationError: the file is missing, not TOML, or has no env_id.
    """
    held = tomllib.loads(tomli_w.dumps({name: _without_none(value) for name, value in settings.items()}))
    found, wanted = read(path), {name: _with_none(value) for name, value in held.items()}
    return {**found, "resume": None} == {**wanted, "resume": None}


def ranks_of(path: Path) -> int | None:
    """Return how many ranks the run of a file had; None for a file written by hand, which does not say.

    Raises:
        ConfigurationError: the file is missing or not TOML.
    """
    noted = _content(path).get(FACTS)
    ranks = noted.get("ranks") if isinstance(noted, dict) else None
    return ranks if isinstance(ranks, int) else None


def _beginnings(path: Path) -> list[dict[str, Any]]:
    """Return the facts of all processes that have worked on the run of a file so far, the first one first."""
    noted = _content(path).get(FACTS)
    if not isinstance(noted, dict):
        return []
    return [*noted.pop("before", []), noted]


def _without_none(value: Any) -> Any:
    """Replace None in a value, at any depth of tables and lists, so that TOML can hold it."""
    if isinstance(value, dict):
        return {name: _without_none(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(x) for x in value]
    return NONE_WITHIN if value is None else value


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_none(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_with_none(x) for x in value]
    return None if value == NONE_WITHIN else value


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
