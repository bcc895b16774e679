# SPDX-License-Identifier: MIT
"""Run a Python script on several ranks, as a user does: `mpiexec -n R python script.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The variables of a launcher, under which the tests themselves may run, and those that tests are about.
LAUNCHERS = ("HYDI_", "MV2_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "PPO_MPI_BASE_", "OMP_", "MKL_", "PYTHONUNBUFFERED")


class Finished(NamedTuple):
    """What came of a launch: the exit code, the text of both streams, and how long it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def launch(
    script: str | Path, ranks: int, *arguments: str, timeout: float = 60.0, env: dict[str, str] | None = None
) -> Finished:
    """Run a script, given as its file's Path or as its text, under `mpiexec -n ranks`.

    mpiexec is the one beside the running interpreter; the test is skipped where there is none. `env` adds variables. A
    run that is not over after `timeout` seconds is ended with all its ranks and fails the test.
    """
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: pip install mpich mpi4py")
    return run([str(mpiexec), "-n", str(ranks)], script, *arguments, timeout=timeout, env=env)


def run(
    prefix: list[str], script: str | Path, *arguments: str, timeout: float = 60.0, env: dict[str, str] | None = None
) -> Finished:
    """Run a script by this interpreter behind a command's prefix, otherwise like `launch`."""
    with tempfile.TemporaryDirectory() as directory:
        file = script if isinstance(script, Path) else Path(directory) / "script.py"
        if isinstance(script, str):
            file.write_text(script, encoding="utf-8")
        command = [*prefix, sys.executable, str(file), *arguments]
        start = time.monotonic()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **(env or {})},
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
                stdout, stderr = process.communicate(timeout=10)
                pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{stdout}\n{stderr}")
            finally:
                process.terminate()  # not kill: mpiexec ends its ranks, whatever exception ends this test
    return Finished(process.returncode, stdout, stderr, time.monotonic() - start)


def environment() -> dict[str, str]:
    """Return this process's variables, less a launcher's, with the package on the path and what Open MPI asks for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **kept,
        "PYTHONPATH": path,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
