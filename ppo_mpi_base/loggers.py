# SPDX-License-Identifier: MIT
"""More loggers for a run's numbers, as hooks: Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.provenance import plain_keywords

if TYPE_CHECKING:
    from ppo_mpi_base.worker import Worker


class WeightsAndBiases(Hooks):
    """Send each row of the logs to Weights & Biases: `PPO(hooks=[WeightsAndBiases("my-project")])`; last in the list.

    A resumed run continues in the same W&B run. Without internet access, set WANDB_MODE=offline.

    Args:
        project: the project's name.
        **init: further keywords of `wandb.init`, such as `group` or `mode="offline"`.

    Raises:
        ConfigurationError: the package wandb is not installed.
    """

    def __init__(self, project: str, **init: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigurationError("WeightsAndBiases needs the package wandb: pip install wandb") from error
        self._wandb, self._init = wandb, {"project": project, **init}
        self._run: Any = None  # on rank 0 only

    def on_start(self, worker: Worker) -> None:
        """Begin a W&B run with all keywords, as in settings.json, or resume the one of these logs."""
        if not worker.ranks.is_root:
            return
        logs = Path(worker.config.log_directory)
        logs.mkdir(parents=True, exist_ok=True)
        note = logs / "wandb_run_id"
        if worker.config.resume == "auto" and worker.checkpoints.found and note.exists():
            self._init = {"id": note.read_text(), "resume": "allow", **self._init}
        self._run = self._wandb.init(
            dir=str(logs), config={**plain_keywords(worker.config), "ranks": worker.ranks.size}, **self._init
        )
        note.write_text(self._run.id)

    def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
        """Send a row."""
        if self._run is not None:
            self._run.log(statistics, step=worker.total_steps, commit=True)

    def on_end(self, worker: Worker) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            self._run.finish()
