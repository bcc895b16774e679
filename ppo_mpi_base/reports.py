# SPDX-License-Identifier: MIT
"""What a run reports: episodes and times gathered over ranks, the best score, and the rows of the logs."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import hold
from ppo_mpi_base.logger import CURVE, PROGRESS, Logger
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.provenance import keep_settings
from ppo_mpi_base.steppers import Episode

WINDOW = 100
COLUMNS = (
    *("total_steps", "iteration", "episode_return", "episode_length", "episodes", "explained_variance"),
    *("fps", "seconds", "slowest_rank", "external_loss"),
)
FAMILIES = ("time_", "gradient_norm_", "learning_rate_", "coefficient_", "evaluation_")
"""How columns begin of which there is one for each phase, slice, coefficient and so on."""


class Reports:
    """Episodes and phase times of all ranks; rank 0 writes the logs.

    Attributes:
        episode_return: mean over the last 100 training episodes of all ranks; NaN before the first.
        best_return: the highest `episode_return` of any iteration; once 100 episodes have ended, of any since then,
            because the mean of a few lucky episodes must not stand forever. NaN before the first.
        saved_return: the same over the networks that were saved (fewer if a disk was full), on rank 0.
        worth_saving: whether the latest rollout's networks are better than the saved ones.
        seconds: phase name -> seconds that this rank spent in it since the last row.
        messages: seconds of each gradient reduction since the last row; as many on all ranks that reduce together.
    """

    def __init__(self, config: Config, ranks: Communicator, held: ExitStack) -> None:
        self.ranks = ranks
        self.directory = Path(config.log_directory)
        if ranks.is_root:
            places = {"log_directory": config.log_directory, "save_location": config.save_location}
            once = {os.path.realpath(path): name for name, path in places.items() if path is not None}
            for path, name in once.items():
                hold(name, path, held)
        self.logger: Logger | None = None
        self._config = config
        self._early: list[tuple[str, bool]] = []  # messages from before the logs were open
        self.recent: deque[Episode] = deque(maxlen=WINDOW)
        self.episodes = 0
        self.best_return = self.saved_return = float("nan")
        self.worth_saving = False
        self.seconds = dict.fromkeys(("environments", "inference", "learning", "communication", "waiting"), 0.0)
        self.messages: list[float] = []
        self.started = self.row_started = time.perf_counter()
        self.steps_at_row = 0

    def open(self, resume_from_steps: int | None) -> None:
        """Begin the logs, or continue those up to `resume_from_steps`, on rank 0."""
        if self.ranks.is_root:
            config, done = self._config, resume_from_steps or 0
            # Iterations are whole, so the last one may go past total_steps.
            iteration = config.samples_per_rank * self.ranks.size
            end = done + iteration * math.ceil(max(0, config.total_steps - done) / iteration)
            self.logger = Logger(config.log_directory, end, config.quiet, resume_from_steps)
            try:
                keep_settings(self.directory, config, self.ranks.size, goes_on=resume_from_steps is not None)
            except OSError as error:
                self.tell_failure(f"the settings could not be written ({error.strerror}): training goes on")
            for text, failed in self._early:
                self.logger.message(text, failed)
        self.steps_at_row = resume_from_steps or 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, for JSON."""
        return {
            "recent": [list(episode) for episode in self.recent],
            "episodes": self.episodes,
            "best_return": self.best_return if self.episodes else None,
            "seconds": time.perf_counter() - self.started,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; its `saved_return` is that of the best networks on disk."""
        self.recent.extend(Episode(*episode) for episode in state["recent"])
        self.episodes = state["episodes"]
        self.best_return = float("nan") if state["best_return"] is None else state["best_return"]
        self.saved_return = state["saved_return"]
        self.started -= state["seconds"]

    @property
    def episode_return(self) -> float:
        """Mean return of the last 100 training episodes."""
        return float(np.mean([episode.return_ for episode in self.recent])) if self.recent else float("nan")

    def add_episodes(self, ended: list[tuple[int, Episode]]) -> None:
        """Gather the episodes that ended on any rank, in the order of the rollout steps given with them.

        Collective: call on all ranks.
        """
        gathered = [pair for of_rank in self.ranks.gather_all(ended) for pair in of_rank]
        gathered.sort(key=lambda pair: pair[0])  # else the last 100 would be the last rank's
        self.recent.extend(episode for _, episode in gathered)
        if self.episodes < WINDOW <= self.episodes + len(gathered):
            self.best_return = self.saved_return = float("nan")
        self.episodes += len(gathered)
        if gathered and not self.episode_return <= self.best_return:
            self.best_return = self.episode_return
        self.worth_saving = bool(gathered) and not self.episode_return <= self.saved_return

    def times_row(self, total_steps: int, team: Communicator | None = None) -> dict[str, float]:
        """Return FPS and the fraction of time in each phase, averaged over ranks. Collective: call on all ranks.

        `team`: the ranks that reduced gradients together; None: all.
        """
        now = time.perf_counter()
        passed = now - self.row_started
        # The rank that comes last spends only what a reduction costs; what others spend beyond that is waiting.
        messages = np.array(self.messages)
        (team or self.ranks).min_(messages)
        self.seconds["communication"] += messages.sum()
        self.seconds["waiting"] += sum(self.messages) - messages.sum()
        self.messages.clear()
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

    def episodes_row(self) -> dict[str, float]:
        """Return statistics of the last 100 episodes, and the count of all."""
        lengths = [episode.length for episode in self.recent]
        return {
            "episode_return": self.episode_return,
            "episode_length": float(np.mean(lengths)) if lengths else float("nan"),
            "episodes": self.episodes,
        }

    def write(self, row: dict[str, float]) -> None:
        """Write a row to the logs, on rank 0."""
        if self.logger:
            self.logger.log(row)

    def sync(self) -> None:
        """Force the rows to the disk, on rank 0."""
        if self.logger:
            self.logger.sync()

    def tell(self, text: str, failed: bool = False) -> None:
        """Print a line, on rank 0; in a quiet run, only if it says that something has `failed`."""
        if self.logger:
            self.logger.message(text, failed)
        else:
            self._early.append((text, failed))

    def tell_failure(self, text: str) -> None:
        """Print a line about a failure, on rank 0."""
        self.tell(text, failed=True)

    def close(self) -> None:
        """Close the log files and release the terminal; a second call does nothing."""
        if self.logger:
            self.logger.close()

    def finish(self, save_location: str | None) -> Path:
        """On rank 0, draw the learning curve and print the results and where they are; return the picture's path."""
        picture = self.directory / CURVE
        if self.logger:
            from ppo_mpi_base.plot import learning_curve  # here: only rank 0 loads Matplotlib, and not at the start

            try:
                learning_curve(self.directory / PROGRESS, picture)
            except (OSError, ConfigurationError) as error:
                self.tell_failure(f"the learning curve could not be drawn ({error})")
            minutes, seconds = divmod(round(time.perf_counter() - self.started), 60)
            self.logger.close()
            score = f"return {self.episode_return:.1f} (best {self.best_return:.1f})"
            if self.episodes == 0:
                score = "no episode has ended, so no return is known"
            self.logger.message(f"{score} after {minutes}:{seconds:02}")
            self.logger.message(f"networks: {save_location or 'not saved'}   learning curve: {picture}")
        return picture


def is_column(name: str) -> bool:
    """Return whether the row of an iteration has a column of this name, or may have, that is no loss or statistic."""
    return name in COLUMNS or name.startswith(FAMILIES)
