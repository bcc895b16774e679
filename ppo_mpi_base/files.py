# SPDX-License-Identifier: MIT
"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

from ppo_mpi_base.errors import ConfigurationError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, force it to the disk and rename it: a kill leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


def write_output(argument: str, path: Path, content: bytes) -> None:
    """Write a file whole, and its directory where that is missing.

    Raises:
        ConfigurationError: it cannot be written; the message names the argument that gave the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ConfigurationError(f"{argument}={str(path)!r} cannot be written ({error.strerror})") from error


def set_aside(path: Path) -> None:
    """Rename a file or directory to the first free one of name.1.ending, name.2.ending, ...: nothing is lost."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    path.rename(next(name for name in names if not name.exists()))


def make_directory(argument: str, path: str) -> None:
    """Make a directory where it is missing, and write a file there once.

    Raises:
        ConfigurationError: it cannot be made or written; the message names the argument.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{argument}={path!r} cannot be written ({error.strerror}): choose another directory"
        ) from error
