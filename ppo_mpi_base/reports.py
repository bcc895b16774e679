# SPDX-License-Identifier: MIT
"""What a run tells: episodes and times gathered over ranks, the best score, and the rows of the logs."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np

from ppo_mpi_base.config import Config
from ppo_mpi_base.envs import Episode
from ppo_mpi_base.logger import Logger
from ppo_mpi_base.mpi import Communicator

WINDOW = 100


class Reports:
    """Episodes and phase times of all ranks; rank 0 writes the logs.

    Attributes:
        episode_return: mean over the last 100 training episodes of all ranks; NaN before the first.
        best_return: the highest `episode_return` of any iteration.
        seconds: phase name -> seconds that this rank spent in it since the last row.
    """

    def __init__(self, config: Config, ranks: Communicator) -> None:
        self.ranks = ranks
        self.directory = Path(config.log_directory)
        self.logger = Logger(config.log_directory, config.total_steps, quiet=config.quiet) if ranks.is_root else None
        self.recent: deque[Episode] = deque(maxlen=WINDOW)
        self.episodes = 0
        self.best_return = -np.inf
        self.seconds = dict.fromkeys(("environments", "inference", "learning", "communication", "waiting"), 0.0)
        self.started = self.row_started = time.perf_counter()
        self.steps_at_row = 0

    @property
    def episode_return(self) -> float:
        """Mean return of the last 100 training episodes."""
        return float(np.mean([episode.return_ for episode in self.recent])) if self.recent else float("nan")

    def add_episodes(self, ended: list[Episode]) -> bool:
        """Gather the episodes that ended on any rank, and say whether the mean return is a new best one.

        Collective: call on all ranks.
        """
        gathered = [episode for of_rank in self.ranks.gather_all(ended) for episode in of_rank]
        self.recent.extend(gathered)
        self.episodes += len(gathered)
        if not gathered or self.episode_return <= self.best_return:
            return False
        self.best_return = self.episode_return
        return True

    def times(self, total_steps: int) -> dict[str, float]:
        """Return FPS and the fraction of time in each phase, averaged over ranks. Collective: call on all ranks."""
        now = time.perf_counter()
        passed = now - self.row_started
        mine = np.array([*self.seconds.values()]) / passed
        busy = mine[:3].sum()
        self.ranks.mean_(mine)
        row = {f"time_{phase}": float(share) for phase, share in zip(self.seconds, mine, strict=True)}
        slowest = int(np.argmax(self.ranks.gather_all(float(busy))))
        fps = (total_steps - self.steps_at_row) / passed
        self.row_started, self.steps_at_row = now, total_steps
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return {
            "fps": fps,
            "seconds": now - self.started,
            **row,
            "time_rest": 1 - float(mine.sum()),
            "slowest_rank": slowest,
        }

    def episode_row(self) -> dict[str, float]:
        """Return what is known of the last 100 episodes."""
        lengths = [episode.length for episode in self.recent]
        return {
            "episode_return": self.episode_return,
            "episode_length": float(np.mean(lengths)) if lengths else float("nan"),
            "episodes": self.episodes,
        }
