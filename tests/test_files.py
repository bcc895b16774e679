# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all, and directories that one run at a time may have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ppo_mpi_base import files
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import hold, make_directory, set_aside, write_together, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_whole(path, "text is refused half-way")  # type: ignore[arg-type]
    assert path.read_bytes() == b"new"


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: b"a", second: b"b"})
    with pytest.raises(FileNotFoundError):
        write_together({first: b"c", tmp_path / "missing" / "second": b"d"})
    assert first.read_bytes() == b"a" and sorted(tmp_path.iterdir()) == [first, second]


def test_what_belongs_together_is_set_aside_under_one_number(tmp_path: Path) -> None:
    for content, *present in (("first", "a.csv", "b.json"), ("second", "b.json"), ("third", "a.csv", "b.json")):
        for name in present:
            (tmp_path / name).write_text(content)
        set_aside(tmp_path / "a.csv", tmp_path / "b.json")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    of_first, of_third = (
        {f"{name}.{k}.{ending}": text for name, ending in (("a", "csv"), ("b", "json"))}
        for k, text in ((1, "first"), (3, "third"))
    )
    assert found == {**of_first, "b.2.json": "second", **of_third}


HOLDING = """
import sys, time
from contextlib import ExitStack
from ppo_mpi_base.files import hold
hold("save_location", sys.argv[1], ExitStack())
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_is_held_by_one_run_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, held = str(tmp_path / "saved"), ExitStack()
    with subprocess.Popen([sys.executable, "-c", HOLDING, place], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        monkeypatch.setattr(files, "PATIENCE", 0.2)
        with pytest.raises(ConfigurationError, match="^save_location=.* is in use by another run.*choose another"):
            hold("save_location", place, held)
        monkeypatch.setattr(files, "PATIENCE", 60.0)
        other.kill()  # while the next one waits, or just before
        hold("save_location", place, held)
        child = os.fork()
        if child == 0:  # which lives on when this run has ended
            time.sleep(30)
            os._exit(0)
        held.close()
        monkeypatch.setattr(files, "PATIENCE", 0.0)
        with held:
            hold("save_location", place, held)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told_by_its_argument(tmp_path: Path) -> None:
    make_directory("log_directory", str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match="log_directory=.*choose another"):
            make_directory("log_directory", str(path))
