# SPDX-License-Identifier: MIT
"""Sample Factory from its own command line: 16 environments; minibatches of 1,024 and 2 epochs, its defaults."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

MODULE = "sf_examples.mujoco.train_mujoco"
OPTIONS = ["--env=mujoco_halfcheetah", "--device=cpu", "--num_workers=2", "--num_envs_per_worker=8"]
SPLITS = "--worker_num_splits=2"
WARM_SECONDS = 10
FRAMES = re.compile(r"Total num frames: (\d+)")
FAILURE = re.compile(r"\w+Error: ")


def measure(lines: Iterable[str], seconds: float, clock: Iterable[float]) -> float:
    """Return steps per second between Sample Factory's reports, from the first one after the warm-up on.

    Args:
        lines: what Sample Factory prints.
        seconds: how long to measure.
        clock: the time at which each line arrived.
    """
    first: tuple[float, int] | None = None
    begun: float | None = None
    for line, now in zip(lines, clock, strict=False):
        if FAILURE.match(line):  # it would wait forever
            raise SystemExit(f"Sample Factory failed: {line.strip()}")
        if not (found := FRAMES.search(line)) or (frames := int(found[1])) == 0:
            continue
        begun = now if begun is None else begun
        if first is None and now - begun >= WARM_SECONDS:
            first = now, frames
        elif first is not None and now - first[0] >= seconds:
            return (frames - first[1]) / (now - first[0])
    raise SystemExit("Sample Factory ended too early")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", MODULE, *OPTIONS, SPLITS, f"--train_dir={directory}", "--experiment=speed"]
        process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert process.stdout is not None
        try:
            rate = measure(process.stdout, seconds, iter(time.perf_counter, None))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(json.dumps({"steps_per_second": rate}))
