# SPDX-License-Identifier: MIT
"""Settings from the command line and from files: the keywords of PPO() with their help, defaults of the task."""

from __future__ import annotations

import dataclasses
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import tyro
from gymnasium.spaces import Discrete

from ppo_mpi_base import presets, run_file, settings, tasks
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.networks import mlp
from tests.mpi.launch import ROOT
from tests.scripted import ScriptedEnv


def parsed(env_id: str, *words: str) -> dict[str, Any]:
    chosen = tyro.cli(settings.flags(settings.for_run(env_id, 2)), args=[env_id, *words])
    return dataclasses.asdict(chosen)


def test_each_keyword_that_is_no_function_has_a_flag_with_its_own_help(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(settings.flags(settings.for_run("CartPole-v1", 1)), args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    functions = {"env_fn", "network_fn", "value_network_fn", "make_vec_env_fn", "loss_fn", "advantage_fn", "hooks"}
    functions |= {"external_update_callback", "rollout_interception_callback", "state_processing_hook"}
    for item in dataclasses.fields(Config):
        flag = f"--{item.name.replace('_', '-')} "
        without = {*functions, "obs_space_override", *settings.ELSEWHERE}
        assert (flag in shown.replace(",", " ")) == (item.name not in without), item.name
    assert "Weight of the entropy bonus. Usual: 0 for MuJoCo, 0.01 for Atari. (default: 0.0)" in shown


def test_defaults_are_the_tasks_and_flags_win() -> None:
    chosen = parsed("CartPole-v1", "--pi-lr", "0.5", "--total-steps", "1e3", "--pi-grad-clip", "None")
    usual = {"total_steps": 1000, **presets.classic_control("CartPole-v1", 2), "pi_lr": 0.5, "pi_grad_clip": None}
    assert {name: chosen[name] for name in usual} == usual
    others = {
        item.name: item.default for item in dataclasses.fields(Config) if item.name in chosen.keys() - usual.keys()
    }
    assert {name: chosen[name] for name in others if name != "env_kwargs"} == {
        name: default for name, default in others.items() if name != "env_kwargs"
    }
    assert parsed("Hopper-v5")["num_environments"] == presets.mujoco(2)["num_environments"]


def test_words_become_what_the_keywords_want() -> None:
    chosen = parsed(
        "CartPole-v1", "--env-kwargs", '{"a": [1]}', "--compile", "False", "--hidden", "8", "4", "--anneal-lr"
    )
    assert chosen["env_kwargs"] == {"a": [1]} and chosen["compile"] is False and chosen["hidden"] == (8, 4)
    assert chosen["anneal_lr"] is True and parsed("CartPole-v1", "--no-anneal-lr")["anneal_lr"] is False
    with pytest.raises(SystemExit):
        parsed("CartPole-v1", "--total-steps", "1.5")


def test_a_file_gives_back_every_setting(tmp_path: Path) -> None:
    nested = '{"x": {"y": 1.5, "z": null}, "list": [null, 1], "mode": "none"}'
    chosen = parsed("CartPole-v1", "--pi-grad-clip", "None", "--env-kwargs", nested, "--resume", "auto")
    (tmp_path / "run.toml").write_text(run_file.document(chosen, ranks=2))
    again = settings.for_run(str(tmp_path / "run.toml"), 2)
    read = tyro.cli(settings.flags(again), args=[str(tmp_path / "run.toml")])
    assert {**dataclasses.asdict(read), "env_id": again["env_id"]} == chosen
    assert run_file.ranks_of(tmp_path / "run.toml") == 2
    facts = tomllib.loads((tmp_path / "run.toml").read_text())["facts"]
    assert facts["ranks"] == 2 and facts["host"]["cores"] >= 1 and facts["command"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert facts["commit"]["package"].rstrip("+") == head
    assert facts["versions"].keys() >= {"python", "torch", "numpy", "gymnasium"}


def test_a_file_by_hand_is_on_top_of_the_tasks_settings(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('env_id = "CartPole-v1"\nlam = 0.5\n')
    assert settings.for_run(str(path), 1) == {**settings.for_run("CartPole-v1", 1), "lam": 0.5}
    assert run_file.ranks_of(path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lam = 0.5", "has no env_id"),
        ('env_id = "CartPole-v1"\nlamda = 0.5', "unknown setting 'lamda'"),
        ("env_id = ", "is not TOML"),
        ('env_id = "FrozenLake-v1"\nenv_kwargs = 3', "env_kwargs=3 must be a dict of keywords"),
        (
            'env_id = "FrozenLake-v1"\nenv_kwargs = {map_name = "9x9"}',
            "env_kwargs={'map_name': '9x9'}: KeyError: '9x9'",
        ),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        settings.for_run(str(path), 1)


@pytest.mark.parametrize("env_id", ["CartPol-v1", "CartPole-v99", "no_such_module:X-v0", "ALE/Pung-v5"])
def test_an_unknown_environment_is_one_clear_line(env_id: str) -> None:
    with pytest.raises(ConfigurationError, match=f"env_id='{env_id}'") as raised:
        tasks.environment(env_id)
    assert "\n" not in str(raised.value)


CLASSIC_CONTROL = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0"]


@pytest.mark.parametrize("env_id", [*CLASSIC_CONTROL, "Taxi-v4"])
def test_any_registered_environment_gets_valid_settings(env_id: str) -> None:
    for ranks in (1, 2, 3):
        Config(env_fn=mlp, network_fn=mlp, **tasks.settings(env_id, ranks))  # type: ignore[arg-type]


def test_each_task_of_classic_control_gets_its_own() -> None:
    chosen = {env_id: tasks.settings(f"{env_id}-v1", 2) for env_id in ("Acrobot", "Pendulum")}
    chosen |= {env_id: tasks.settings(f"{env_id}-v0", 2) for env_id in ("MountainCar", "MountainCarContinuous")}
    steps = [settings["total_steps"] for settings in chosen.values()]
    assert steps == [1_000_000, 100_000, 300_000, 100_000]
    assert {k: v for k, v in chosen["Acrobot"].items() if k != "total_steps"} == presets.discrete(2)
    assert not chosen["Pendulum"]["normalize_observations"]
    assert chosen["MountainCar"]["gamma"] == chosen["MountainCarContinuous"]["gamma"] == 0.999
    assert "initial_log_std" not in chosen["MountainCar"] and chosen["MountainCarContinuous"]["initial_log_std"] == 1


def test_observations_become_vectors() -> None:
    made = tasks.environment("Blackjack-v1")  # a tuple of three numbers
    assert made.observation_space.shape == (32 + 11 + 2,)
    with pytest.raises(ConfigurationError, match="env_id='CartPole-v1'"):
        tasks.environment("CartPole-v1", no_such_keyword=1)


def test_a_game_is_built_by_its_own_functions() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    made = tasks.environment("ALE/Pong-v5", render_mode="rgb_array")
    made.reset(seed=0)
    assert made.observation_space.shape == (4, 84, 84) and made.render().shape == (210, 160, 3)  # type: ignore[union-attr]
    given = tasks.functions("ALE/Pong-v5", (64, 64))
    vector = given["make_vec_env_fn"](given["env_fn"], 2)
    assert vector.num_envs == 2 and "value_network_fn" not in given
    vector.close()


def test_what_an_environment_is_given_decides_its_preset() -> None:
    words = ["train", "FrozenLake-v1", "--seed", "1", "--env-kwargs", '{"is_slippery": false}']
    assert settings.env_kwargs_of(words) == {"is_slippery": False}
    assert settings.env_kwargs_of(["--env_kwargs=" + '{"a": null}']) == {"a": None}
    assert settings.env_kwargs_of(["train", "--env-kwargs"]) is None is settings.env_kwargs_of(["--env-kwargs", "{"])
    gymnasium.register("tests/Turns-v0", entry_point=turning)
    for continuous, preset in ((True, presets.mujoco(1)), (False, presets.discrete(1))):
        found = settings.for_run("tests/Turns-v0", 1, {"continuous": continuous})
        assert found.items() >= preset.items()


def turning(continuous: bool) -> gymnasium.Env:
    return ScriptedEnv(action_space=None if continuous else Discrete(2))


def test_tasks_without_numbers_to_normalize_are_trained_as_they_are() -> None:
    assert settings.for_run("FrozenLake-v1", 1)["normalize_observations"] is False
    assert settings.for_run("Blackjack-v1", 1)["normalize_observations"] is False


def test_seeds_arrive_exactly() -> None:
    assert parsed("CartPole-v1", "--seed", "12345678901234567")["seed"] == 12345678901234567
