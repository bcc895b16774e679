# SPDX-License-Identifier: MIT
"""Write files so that they appear whole or not at all."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path

from ppo_mpi_base.errors import ConfigurationError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, force it to disk and rename it: a kill leaves the old file or the new one."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes]) -> None:
    """Do the same for files that belong together: if the disk has no room for one of them, all stay as they were."""
    beside = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, content in contents.items():
            with beside[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in beside.items():
            part.replace(path)
    except OSError:
        for part in beside.values():
            part.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


def without_ending(path: Path | str, endings: Container[str]) -> Path:
    """Return a path without its ending, if that is one of `endings`, which will be added to it.

    Raises:
        ConfigurationError: the path does not end in a name; the message calls it `output`.
    """
    path = Path(path)
    check_name("output", path)
    return path.with_suffix("") if path.suffix in endings else path


def check_name(argument: str, path: Path) -> None:
    """Raise `ConfigurationError` if a path does not end in a name that a file can have."""
    if path.name in ("", ".."):
        raise ConfigurationError(f"{argument}={str(path)!r} must end in the name of a file")


def write_output(argument: str, path: Path, content: bytes) -> None:
    """Write a file whole, and create its directory if missing.

    Raises:
        ConfigurationError: it cannot be written; the message names the argument that gave the path.
    """
    check_name(argument, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ConfigurationError(f"{argument}={str(path)!r} cannot be written ({error.strerror})") from error


PATIENCE = 10.0
"""Seconds that a run waits for a directory: the processes of a killed run may take some time to end."""


_held: set[int] = set()  # file descriptors of directories


def hold(argument: str, path: str, until: ExitStack) -> None:
    """Create a directory if it is missing, and lock it until the stack `until` is closed.

    No lock file is left there, and the kernel releases the lock when the process ends, however it ends. File systems
    without such locks, such as NFS, let everyone in.

    Raises:
        ConfigurationError: it cannot be written, or another run holds it; the message names the argument.
    """
    make_directory(argument, path)
    directory = os.open(path, os.O_RDONLY)
    _held.add(directory)
    until.callback(_let_go, directory)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise ConfigurationError(
                    f"{argument}={path!r} is in use by another run, and they would overwrite each other's files: "
                    "choose another directory, or end that run"
                ) from error
            time.sleep(0.1)
        except OSError:
            return
        else:
            return


def _let_go(directory: int) -> None:
    if directory in _held:  # not in a child, which never held it
        _held.remove(directory)
        fcntl.flock(directory, fcntl.LOCK_UN)  # also for a child's copy
        os.close(directory)


def _let_go_in_child() -> None:
    """Close a forked child's copies: they share the lock, and the child may outlive the run."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def set_aside(*paths: Path) -> None:
    """Rename those files and directories that exist to name.1.ending, or name.2.ending, ..., so that nothing is lost.

    The number is the first that is free for all of them, so that files that belong together share it.
    """
    for number in itertools.count(1):
        names = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path in paths]
        if not any(name.exists() for name in names):
            break
    for path, name in zip(paths, names, strict=True):
        if path.exists():
            path.rename(name)


def make_directory(argument: str, path: str) -> None:
    """Create a directory if it is missing, and test that files can be written there.

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
