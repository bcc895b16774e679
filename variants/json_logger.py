# SPDX-License-Identifier: MIT
"""A custom logger: each row of a run's numbers as a line of JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.worker import Worker


class JsonLogger(Hooks):
    """Append the rows to a file: `PPO(hooks=[JsonLogger("rows.jsonl")])`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Write a row, on rank 0; values that are not known yet are null, since JSON has no NaN."""
        if worker.ranks.is_root:
            row = {name: float(value) if math.isfinite(value) else None for name, value in statistics.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
