# SPDX-License-Identifier: MIT
"""The clock of contestants that learn one iteration per call; it needs only Python, to run in any environment."""

import json
import time
from collections.abc import Callable


def measure(learn: Callable[[], object], steps: int, warm: int, seconds: float) -> None:
    """Call `learn`, of `steps` steps, first to warm up and then for `seconds` seconds; print steps per second."""
    for _ in range(warm):
        learn()
    iterations, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        learn()
        iterations += 1
    print(json.dumps({"steps_per_second": iterations * steps / passed}))
