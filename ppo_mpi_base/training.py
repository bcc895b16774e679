# SPDX-License-Identifier: MIT
"""What surrounds the loop of `ppo.PPO`, from start to exit status: ranks begin, fail and end together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ppo_mpi_base import builders
from ppo_mpi_base.config import Config
from ppo_mpi_base.envs import Environments
from ppo_mpi_base.failing import About, fail_together, forget_exit, meet
from ppo_mpi_base.gradients import LossFunction
from ppo_mpi_base.interruption import REQUEUE, SAME_REQUEST, Interruption
from ppo_mpi_base.mpi import world
from ppo_mpi_base.worker import Worker

CLOSING = 5.0
"""Seconds that environments have to close after an error, which must still be reported."""


@contextmanager
def training(config: Config, loss_fn: LossFunction) -> Iterator[Worker]:
    """Build a worker for a `with` block in which an error on one rank ends all ranks. Collective: call on all ranks."""
    ranks = world()
    forget_exit()
    with fail_together(ranks), ExitStack() as held:
        meet(About.TRAINING)
        builders.checked_together(ranks, lambda: builders.check_equal_keywords(config, ranks))
        held.enter_context(ranks.watched(config.stall_seconds))
        stopped = REQUEUE if config.save_location is not None else 1  # nothing to continue from
        interruption = held.enter_context(Interruption(config.max_seconds, config.stop_deadline, stopped))
        worker = Worker(config, ranks, loss_fn, interruption, held)
        try:
            yield worker
        except BaseException:
            _close_for_a_while(worker.environments)
            raise
        else:
            _close(worker)
            if worker.interrupted and (interruption.signalled or ranks.size > 1):
                time.sleep(SAME_REQUEST)  # the same signal may still reach this rank or others
        finally:
            worker.reports.close()
    if worker.interrupted:
        worker.reports.tell(f"stopped at {worker.total_steps:,} steps; {worker.checkpoints.outlook()}")
        raise SystemExit(stopped)
    if worker.checkpoints.failed:
        worker.reports.tell_failure(f"the end of the run was not saved; {worker.checkpoints.outlook()}")
        raise SystemExit(1)


def _close(worker: Worker) -> None:
    """Close environments; a failure is reported, but changes neither the run's end nor its exit status."""
    try:
        worker.environments.close()
    except Exception as error:  # for example, if the signal has ended their processes too
        worker.reports.tell_failure(f"environments did not close ({type(error).__name__}: {error})")


def _close_for_a_while(environments: Environments) -> None:
    """Close environments, waiting `CLOSING` seconds: an AsyncVectorEnv waits forever if one of its processes died."""

    def close() -> None:
        with suppress(Exception):  # the error being raised says more
            environments.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(CLOSING)
