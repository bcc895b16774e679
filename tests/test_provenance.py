# SPDX-License-Identifier: MIT
"""What a run was made of stays with its logs, and tells runs of one setting from those of others."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from ppo_mpi_base import provenance
from ppo_mpi_base.config import Config
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.plot import plot_runs
from ppo_mpi_base.ppo import ppo_losses
from tests.scripted import ScriptedEnv
from tests.test_worker import train


def settings(directory: Path) -> Any:
    return json.loads((directory / "logs" / provenance.NAME).read_text())


class Nothing(Hooks):
    def on_end(self, worker: Any) -> None:
        pass


def test_a_run_of_a_script_leaves_its_keywords_and_where_it_ran(tmp_path: Path) -> None:
    train(tmp_path, gamma=0.9, loss_fn=ppo_losses, loss_coefficients={"beta": 2.0}, hooks=[Nothing()])
    found = settings(tmp_path)
    keywords = found["keywords"]
    assert keywords.keys() == Config.__dataclass_fields__.keys()
    assert (keywords["gamma"], keywords["seed"], keywords["compile"]) == (0.9, 0, False)
    assert keywords["env_fn"] == "tests.scripted.ScriptedEnv" and keywords["loss_fn"] == "ppo_mpi_base.ppo.ppo_losses"
    small = {"function": "ppo_mpi_base.networks.mlp", "arguments": [], "keywords": {"hidden": [8]}}
    assert keywords["network_fn"] == small and keywords["loss_coefficients"] == {"beta": 2.0}
    assert keywords["hooks"] == ["tests.test_provenance.Nothing"]
    processor, names = found["host"]["processor"], subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    assert processor.split(", ")[0] in names
    assert all(number.rpartition(" ")[2] in names for number in processor.split(", ")[1:])
    assert found["ranks"] == 1 and found["versions"]["python"] == sys.version.split()[0] and "before" not in found


def test_a_run_that_goes_on_keeps_what_it_was_made_of_and_a_new_one_lets_it_lie(tmp_path: Path) -> None:
    for steps, rate in ((32, 1e-3), (64, 1e-4), (96, 1e-5)):
        train(tmp_path, total_steps=steps, pi_lr=rate, resume="auto", checkpoint_seconds=0)
    rates = [each["keywords"]["pi_lr"] for each in (*settings(tmp_path)["before"], settings(tmp_path))]
    assert rates == [1e-3, 1e-4, 1e-5]
    train(tmp_path, pi_lr=1.0)
    assert settings(tmp_path)["keywords"]["pi_lr"] == 1.0 and "before" not in settings(tmp_path)
    assert json.loads((tmp_path / "logs" / "settings.1.json").read_text())["keywords"]["pi_lr"] == 1e-5


def test_runs_of_several_settings_are_not_averaged_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for seed in (0, 1):
        train(tmp_path / "seeds" / str(seed), seed=seed, network_fn=partial(mlp, hidden=(8,)))
    plot_runs([tmp_path / "seeds"], tmp_path / "curves")
    assert not [str(w.message) for w in recwarn if "differ" in str(w.message)]
    for ranks, environments, minibatch in ((1, 4, 8), (2, 2, 4)):  # as a preset shares them out
        keywords = {"use_vectorized_envs": True, "num_environments": environments, "train_batch_size": minibatch}
        train(tmp_path / "shared" / str(ranks), **keywords)
        settings_file = tmp_path / "shared" / str(ranks) / "logs" / "settings.json"
        settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "ranks": ranks}))
    plot_runs([tmp_path / "shared"], tmp_path / "curves")
    assert not [str(w.message) for w in recwarn if "differ" in str(w.message)]
    settings_file.write_text(settings_file.read_text().replace('"ranks": 2', '"ranks": 8'))
    with pytest.warns(UserWarning, match="differ in num_environments over all ranks, train_batch_size over all ranks:"):
        plot_runs([tmp_path / "shared"], tmp_path / "curves")
    space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    for k, other in enumerate(({"gamma": 0.9}, {"env_fn": partial(ScriptedEnv, action_space=space)})):
        train(tmp_path / "several" / str(k), **other)
    with pytest.warns(
        UserWarning, match="2 runs count as seeds of one setting, but differ in env_fn, gamma: give each"
    ):
        plot_runs([tmp_path / "several"], tmp_path / "curves")
