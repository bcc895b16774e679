# SPDX-License-Identifier: MIT
"""Evaluations during training: when one is due, and what it adds to the logs."""

from __future__ import annotations

from collections.abc import Callable

from ppo_mpi_base.builders import checked_together
from ppo_mpi_base.config import Config
from ppo_mpi_base.evaluate import check_environments, evaluate
from ppo_mpi_base.interruption import Interruption
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.policies import ActorCritic


class _Abandoned(Exception):  # noqa: N818 (no error)
    """Raised to end an evaluation when no time is left for it."""


class PeriodicEvaluation:
    """Evaluates the policy each time training reaches a multiple of `evaluate_every` steps.

    Collective: call the constructor and `columns` on all ranks.

    Args:
        config: all keywords.
        actor_critic: the networks, left unchanged.
        ranks: the ranks that share the episodes.
        interruption: once it is `pressing`, an evaluation is abandoned.
        tell: called with a line about each evaluation.

    Raises:
        ConfigurationError: `evaluate_every` is set, and `env_fn` is unsuitable for evaluation.
    """

    def __init__(
        self,
        config: Config,
        actor_critic: ActorCritic,
        ranks: Communicator,
        interruption: Interruption,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._actor_critic, self._ranks = config, actor_critic, ranks
        self._interruption, self._tell = interruption, tell
        if config.evaluate_every is not None:
            of_env_fn = config.env_fn, config.env_kwargs, config.state_processing_hook
            checked_together(ranks, lambda: check_environments(actor_critic, *of_env_fn))

    def columns(self, before: int, total_steps: int) -> dict[str, float]:
        """Return extra columns for an iteration's row: none, unless its steps contain a multiple of `evaluate_every`.

        Args:
            before: agent steps over all ranks at the start of the iteration.
            total_steps: the same at its end.
        """
        config, every = self._config, self._config.evaluate_every
        if every is None or total_steps // every == before // every:
            return {}
        try:
            evaluation = evaluate(
                self._actor_critic,
                config.env_fn,
                env_kwargs=config.env_kwargs,
                episodes=config.evaluate_episodes,
                seed=config.seed,
                max_ep_len=config.max_ep_len,
                state_processing_hook=config.state_processing_hook,
                ranks=self._ranks,
                progress=self._abandon_if_pressing,
            )
        except _Abandoned:
            self._tell(f"evaluation at {total_steps:,} steps skipped: no time is left before the end")
            return {}
        self._tell(f"evaluation at {total_steps:,} steps: {evaluation}")
        return {"evaluation_return": evaluation.mean, "evaluation_length": evaluation.mean_length}

    def _abandon_if_pressing(self, episodes: int) -> None:
        if self._ranks.max(float(self._interruption.pressing)):
            raise _Abandoned
