# SPDX-License-Identifier: MIT
"""Evaluation on several ranks: the same returns as on one, no false alarm, and an error that ends all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ppo_mpi_base.evaluate import evaluate
from tests.evaluating import Drawing, policy_of, rest, rows
from tests.mpi.launch import launch

SCRIPT = """
import json
import sys
import time
from pathlib import Path

import numpy as np

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.evaluate import evaluate
from ppo_mpi_base.mpi import world
from tests.scripted import ScriptedEnv
from tests.evaluating import Drawing, policy_of, state, train

directory, ranks = Path(sys.argv[1]), world()
played = [evaluate(policy_of(), Drawing, episodes=n, deterministic=n == 7) for n in (7, 4, 1)]
found = {"played": [each.as_dict() for each in played]}

# Two iterations; what one rank draws from global states, the other must not miss.
without = train(directory / "without")
found["equal"] = state(train(directory / "with", evaluate_every=32, evaluate_episodes=3)) == state(without)


class Slow(ScriptedEnv):
    # A long episode in which the other rank, which has none, must not take this one for lost.
    def step(self, action):
        time.sleep(0.05)
        return super().step(action)


with ranks.watched(1.0):
    found["slow"] = evaluate(policy_of(), lambda: Slow(horizon=40), episodes=1).returns


def fails_on_one_rank():
    if ranks.rank == 1:
        raise ConfigurationError("env_fn: scripted")
    return Slow(horizon=10**6)


started = time.monotonic()
try:
    evaluate(policy_of(), fails_on_one_rank, episodes=2)
except ConfigurationError as error:
    found["error"] = [str(error), time.monotonic() - started < 3]
(directory / f"{ranks.rank}.json").write_text(json.dumps(found))
"""


def test_two_ranks_play_what_one_does_and_fail_together(tmp_path: Path) -> None:
    finished = launch(SCRIPT, 2, str(tmp_path))
    assert finished.code == 0, finished
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = [evaluate(policy_of(), Drawing, episodes=n, deterministic=n == 7).as_dict() for n in (7, 4, 1)]
    assert first["played"] == alone
    assert first["equal"]
    assert first["slow"] == [40.0]
    assert first["error"] == ["env_fn: scripted", True]
    evaluated, without = rows(tmp_path / "with"), rows(tmp_path / "without")
    np.testing.assert_equal([rest(row) for row in evaluated], [rest(row) for row in without])
    assert [np.isfinite(row["evaluation_return"]) for row in evaluated] == [True, True]
