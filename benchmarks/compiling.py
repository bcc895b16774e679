# SPDX-License-Identifier: MIT
"""Find from how many minibatches on compiling pays: `python benchmarks/compiling.py`.

Runs of two lengths, compiled and not, each in a process of its own, tell what starting costs and what a minibatch
costs. `compilation.WORTHWHILE_MINIBATCHES` is the number for an empty cache, rounded up.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, MINIBATCH, EPOCHS = 1024, 32, 10  # of one rank in the paper's setting, as in contestants/ours.py
LENGTHS = 4, 40  # iterations
RUN = """
import sys, tempfile
from benchmarks.contestants.ours import SETTINGS, keywords
from ppo_mpi_base.ppo import PPO
with tempfile.TemporaryDirectory() as directory:
    PPO(**{**keywords(SETTINGS["paper"], directory, sys.argv[2] == "compiled"), "total_steps": int(sys.argv[1])})
"""


def seconds(iterations: int, how: str, cache: str) -> float:
    """Return what a whole run takes, start included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    started = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(iterations * SAMPLES), how]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    minibatches = SAMPLES // MINIBATCH * EPOCHS  # an iteration
    with tempfile.TemporaryDirectory() as cache:
        empty = seconds(LENGTHS[0], "compiled", cache)
        short, long = ({how: seconds(n, how, cache) for how in ("eager", "compiled")} for n in LENGTHS)
    each = {how: (long[how] - short[how]) / (LENGTHS[1] - LENGTHS[0]) / minibatches for how in short}
    start = {how: short[how] - LENGTHS[0] * minibatches * each[how] for how in short}
    for how in short:
        print(f"{how:10}{start[how]:6.1f} s to start, {1e6 * each[how]:6.0f} us a minibatch with its share of the rest")
    print(f"{'compiled':10}{start['compiled'] + empty - short['compiled']:6.1f} s to start with an empty cache")
    gain = each["eager"] - each["compiled"]
    for name, more in (("a full", 0.0), ("an empty", empty - short["compiled"])):
        worthwhile = (start["compiled"] + more - start["eager"]) / gain
        print(f"compiling pays from {worthwhile:,.0f} minibatches on, with {name} cache")


if __name__ == "__main__":
    main()
