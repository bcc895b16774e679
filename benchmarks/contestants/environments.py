# SPDX-License-Identifier: MIT
"""The upper limit: processes that only step 8 environments each, and learn nothing."""

import argparse
import json
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import gymnasium
import mujoco
from gymnasium.vector import SyncVectorEnv

ENVIRONMENTS = 8


def step(seed: int, seconds: float, together: Barrier) -> float:
    """Return the steps per second of one process, with actions drawn beforehand."""
    mujoco.set_mju_user_warning(lambda message: None)
    environments = SyncVectorEnv([lambda: gymnasium.make("HalfCheetah-v5")] * ENVIRONMENTS)
    environments.reset(seed=seed)
    environments.action_space.seed(seed)
    actions = [environments.action_space.sample() for _ in range(256)]
    for action in actions:  # warm-up
        environments.step(action)
    together.wait()
    steps, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        for action in actions[:64]:
            environments.step(action)
        steps += 64 * ENVIRONMENTS
    return steps / passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    context = get_context("spawn")
    with context.Manager() as manager, context.Pool(arguments.processes) as pool:
        together = manager.Barrier(arguments.processes)
        rates = pool.starmap(
            step, [(seed, arguments.seconds, together) for seed in range(arguments.processes)], chunksize=1
        )
    print(json.dumps({"steps_per_second": sum(rates)}))
