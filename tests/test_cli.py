# SPDX-License-Identifier: MIT
"""The command ppo-mpi from end to end: train, the same run again from its file, and all that can be done with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import safetensors.torch
import torch

from ppo_mpi_base import cli, provenance, run_file, tasks
from ppo_mpi_base.atari import LostLifeEnds
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.evaluate import evaluate
from ppo_mpi_base.mpi import world
from ppo_mpi_base.saved_policy import load_actor_critic
from tests.mpi.launch import launch

TINY = ["--total-steps", "2048", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """Two seeds of CartPole."""
    directory = tmp_path_factory.mktemp("runs") / "CartPole-v1"
    for seed in range(2):
        cli.main(["train", "CartPole-v1", *TINY, "--seed", str(seed), "--directory", str(directory / f"seed{seed}")])
    return directory


def networks(run_directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((run_directory / "saved_model" / "latest.safetensors").read_bytes())


def test_a_run_leaves_its_file_which_starts_it_again(trained: Path, tmp_path: Path) -> None:
    first = trained / "seed1"
    assert {path.name for path in first.iterdir()} >= {"run.toml", "logs", "saved_model"}
    cli.main(["train", str(first / "run.toml"), "--directory", str(tmp_path)])
    again, was = networks(tmp_path), networks(first)
    assert again.keys() == was.keys() and all(torch.equal(again[name], was[name]) for name in was)
    assert not torch.equal(networks(trained / "seed0")["network.1.weight"], was["network.1.weight"])
    for name in ("evaluation.json", "policy.onnx"):
        (tmp_path / name).write_text("of the first run's networks")
    cli.main(["train", str(first / "run.toml"), "--directory", str(tmp_path), "--seed", "5"])
    assert (tmp_path / "evaluation.1.json").exists() and (tmp_path / "policy.1.onnx").exists()
    assert not (tmp_path / "evaluation.json").exists() and not (tmp_path / "policy.onnx").exists()
    # The file of a run that was to go on where it was begins anew all the same.
    cli.main(["train", "CartPole-v1", *TINY, "--resume", "auto", "--directory", str(tmp_path / "auto")])
    cli.main(["train", str(tmp_path / "auto" / "run.toml")])
    assert (tmp_path / "auto" / "run.1.toml").exists() and (tmp_path / "auto" / "logs" / "progress.1.csv").exists()
    assert "seed = 5" in (tmp_path / "run.toml").read_text() and "seed = 1\n" in (tmp_path / "run.1.toml").read_text()


def test_on_other_ranks_it_is_not_the_same_run_and_a_line_says_so(trained: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text((trained / "seed0" / "run.toml").read_text())
    cli.main(["train", str(file), "--directory", str(tmp_path / "same")])
    assert "not the same run" not in capsys.readouterr().err
    file.write_text(file.read_text().replace("ranks = 1", "ranks = 2"))
    cli.main(["train", str(file), "--directory", str(tmp_path / "other")])
    told = [line for line in capsys.readouterr().err.splitlines() if "not the same run" in line]
    assert len(told) == 1 and "had 2 ranks, this one has 1" in told[0]


def test_without_tyro_one_line_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['tyro'] = None; import ppo_mpi_base.cli"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ppo-mpi: tyro is missing: pip install -e '.[cli]' in this package's clone\n"


def test_a_wrong_value_leaves_a_former_runs_file_alone(trained: Path) -> None:
    file = trained / "seed0" / "run.toml"
    before = file.read_text()
    with pytest.raises(ConfigurationError, match="pi_lr=-1.0"):
        cli.main(["train", "CartPole-v1", "--pi-lr", "-1", "--directory", str(trained / "seed0")])
    assert file.read_text() == before and not (trained / "seed0" / "run.1.toml").exists()


def test_progress_ends_with_the_last_whole_iteration(tmp_path: Path, capsys: Any) -> None:
    for total_steps, end in (("1000", "1,024"), ("1100", "1,536")):  # iterations of 512 steps
        cli.main(
            ["train", "CartPole-v1", "--resume", "auto", "--total-steps", total_steps, "--directory", str(tmp_path)]
        )
        shown = capsys.readouterr().out
        assert f"{end}/{end} steps 100%" in shown


def test_evaluate(trained: Path, tmp_path: Path, capsys: Any) -> None:
    run_directory = trained / "seed0"
    cli.main(["evaluate", str(run_directory), "--episodes", "3", "--which", "latest"])
    shown = capsys.readouterr().out
    found = json.loads((run_directory / "evaluation.json").read_text())
    assert len(found["returns"]) == 3 and str(run_directory / "evaluation.json") in shown
    # A run of a script has no run.toml: the environment is named.
    output = tmp_path / "own.json"
    saved = str(run_directory / "saved_model")
    with pytest.raises(ConfigurationError, match="--env-id"):
        cli.main(["evaluate", saved])
    arguments = ["--which", "latest", "--env-id", "CartPole-v1", "--output", str(output)]
    cli.main(["evaluate", saved, "--episodes", "3", *arguments])
    assert json.loads(output.read_text())["returns"] == found["returns"]
    for ending in ("json", "safetensors"):  # of a run in which no episode ended there are no best networks
        shutil.copy(run_directory / "saved_model" / f"latest.{ending}", tmp_path)
    cli.main(["evaluate", str(tmp_path), "--episodes", "1", "--env-id", "CartPole-v1", "--output", str(output)])
    assert json.loads(output.read_text())["which"] == "latest"
    cart_pole = partial(gymnasium.make, "CartPole-v1")
    description = json.loads((tmp_path / "latest.json").read_text())
    (tmp_path / "latest.json").write_text(json.dumps({**description, "state_processing_hook": True}))
    with pytest.raises(ConfigurationError, match="but the policy was trained with one"):
        cli.main(["evaluate", str(tmp_path), "--episodes", "1", "--env-id", "CartPole-v1", "--output", str(output)])
    with pytest.raises(ConfigurationError, match="but the policy was trained with one"):
        evaluate(tmp_path, cart_pole, episodes=3)
    hooked = evaluate(tmp_path, cart_pole, episodes=3, state_processing_hook=lambda observation: observation)
    assert list(hooked.returns) == found["returns"]
    best = evaluate(saved, cart_pole, episodes=2)
    assert best == evaluate(load_actor_critic(saved).actor_critic, cart_pole, episodes=2)


def test_an_evaluation_that_takes_long_tells_how_far_it_is(
    trained: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cli, "TELL_EVERY", 0.0)
    monkeypatch.setattr("ppo_mpi_base.evaluate.SLICE", 0.0)
    cli.main(["evaluate", str(trained / "seed0"), "--episodes", "3", "--output", str(tmp_path / "found.json")])
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("2 of 3 episodes, 0:00:0")] and "3 of 3" not in "".join(told)


def test_an_id_with_its_module_learns_by_the_same_settings() -> None:
    for bare, module in (("Pendulum-v1", "gymnasium.envs.classic_control"), ("ALE/Pong-v5", "ale_py")):
        assert tasks.settings(f"{module}:{bare}", 2) == tasks.settings(bare, 2)
        tasks.environment(f"{module}:{bare}").close()


def test_plot_and_compare(trained: Path, tmp_path: Path, capsys: Any) -> None:
    cli.main(
        ["plot", str(trained), str(trained / "seed0"), "--output", str(tmp_path / "new" / "curves"), "--axis", "time"]
    )
    assert {path.suffix for path in tmp_path.glob("new/curves.*")} == {".png", ".svg"}
    a, b = str(trained / "seed0"), str(tmp_path / "elsewhere")  # whose task is known from its run.toml
    shutil.copytree(trained / "seed1", b)
    cli.main(["compare", a, "--", b, "--output", str(tmp_path / "comparison")])
    shown = capsys.readouterr().out
    assert "CartPole-v1" in shown and "seed0" in shown and "elsewhere" in shown
    written = sorted(tmp_path.glob("comparison.*"))
    assert len(written) == 3 and all(str(path) in shown for path in written)


def test_video(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    run_directory = str(trained / "seed0")
    cli.main(["video", run_directory, "--output", str(tmp_path / "film.gif")])
    assert (tmp_path / "film.gif").read_bytes()[:3] == b"GIF"


def test_export(trained: Path, tmp_path: Path) -> None:
    cli.main(["export", str(trained / "seed0"), "--output", str(tmp_path / "policy"), "--formats", "torch"])
    assert list(tmp_path.glob("policy.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CartPol-v1"], "env_id='CartPol-v1'"),
        (["train", "CartPole-v1", "--gamma", "2"], "gamma=2.0 must be a number from 0 to 1"),
        (["evaluate", "nowhere"], "RUN: there is no directory nowhere"),
        (["plot"], "RUN: name a run's directory, or several: ppo-mpi plot runs/"),
        (["compare", "seeds", "seeds"], r"compare: .* ppo-mpi compare RUN_A... -- RUN_B..."),
        (["compare", "seeds", "--", "seeds", "--", "seeds"], "compare: give two groups of runs with one -- between"),
        (["plot", "nowhere"], "nowhere"),
        (["export", "seeds"], "seeds holds several runs"),
        (["evaluate", "seeds", "--env-id", "CartPole-v1"], "seeds holds several runs"),
        (["evaluate", "seeds"], "seeds holds several runs: name one of them, seed0, seed1"),
        (["evaluate", "seeds/seed0"], "run.toml has no env_id, such as env_id"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in ("seed0", "seed1"):
        (tmp_path / "seeds" / seed).mkdir(parents=True)
        (tmp_path / "seeds" / seed / "run.toml").touch()
    with pytest.raises(ConfigurationError, match=message):
        cli.main(arguments)


def test_the_module_is_the_command_and_two_ranks_speak_once() -> None:
    done = subprocess.run([sys.executable, "-m", "ppo_mpi_base", "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and all(word in done.stdout for word in ("train", "evaluate", "compare", "export"))
    assert "Train a policy" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "ppo_mpi_base", "train", "CartPol-v1"], capture_output=True, text=True, timeout=100
    )
    assert wrong.returncode == 1 and wrong.stderr.startswith("ppo-mpi: env_id='CartPol-v1'")
    assert len(wrong.stderr.splitlines()) == 1
    failed = launch("from ppo_mpi_base.cli import main; main()", 2, "train", "CartPole-v1", "--no-such-flag", "1")
    assert failed.code != 0 and failed.stderr.count("no-such-flag") == 1


def test_the_environment_comes_before_flags() -> None:
    for arguments in (["--seed", "1", "Pendulum-v1"], ["--seed", "1", "--total-steps", "512"]):
        with pytest.raises(ConfigurationError, match="the environment comes before all flags"):
            cli.main(["train", *arguments])


def test_flags_of_other_libraries_are_told_by_what_they_are_called_here() -> None:
    for flag, meant in {"--learning-rate=1": "--pi-lr and --vf-lr", "--n_envs": "--num-environments"}.items():
        with pytest.raises(ConfigurationError, match=f"here it is {meant}$"):
            cli.main(["train", "CartPole-v1", flag, "1"])


COMMAND = "from ppo_mpi_base.cli import command; command()"


@pytest.mark.timeout(300)
def test_two_ranks_end_together_whatever_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = {
        ("train", "CartPole-v1", "--directory", str(tmp_path / "file" / "run")): "directory=",
        ("train", "CartPole-v1", "--gamma", "2"): "gamma=2.0",
    }
    for arguments, text in told.items():
        failed = launch(COMMAND, 2, *arguments, timeout=60)
        assert failed.code == 1 and failed.stderr.count(text) == 1 and "Traceback" not in failed.stderr, failed
    helped = launch(COMMAND, 2, "train", "--help", timeout=60)
    assert helped.code == 0 and helped.stdout.count("usage: ppo-mpi train") == 1 and not helped.stderr, helped


def test_what_an_evaluation_found_is_told_even_if_it_cannot_be_written(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    run = str(trained / "seed0")
    cli.main(["evaluate", run, "--episodes", "2", "--output", str(tmp_path / "made" / "here.json")])
    assert json.loads((tmp_path / "made" / "here.json").read_text())["episodes"] == 2
    capsys.readouterr()
    with pytest.raises(ConfigurationError, match="output=.*cannot be written"):
        cli.main(["evaluate", run, "--episodes", "2", "--output", str(tmp_path / "made" / "here.json" / "x.json")])
    assert "mean return" in capsys.readouterr().out


def test_keywords_of_a_game_fit_training_and_evaluation() -> None:
    for lost_life_ends in (True, False):
        game = tasks.environment("ALE/Breakout-v5", life_loss_ends=lost_life_ends)
        assert isinstance(game, LostLifeEnds) == lost_life_ends
        game.close()


def test_a_run_that_cannot_go_on_leaves_the_file_of_the_one_that_is_there(tmp_path: Path) -> None:
    cli.main(["train", "CartPole-v1", *TINY, "--directory", str(tmp_path)])
    before = (tmp_path / "run.toml").read_text()
    with pytest.raises(ConfigurationError, match="^resume: "):
        cli.main(["train", "CartPole-v1", *TINY, "--directory", str(tmp_path), "--resume", "auto", "--hidden", "9"])
    with pytest.raises(ConfigurationError, match="env_id='CartPole-v1'.*typo"):
        cli.main(["train", "CartPole-v1", *TINY, "--directory", str(tmp_path), "--env-kwargs", '{"typo": 1}'])
    assert (tmp_path / "run.toml").read_text() == before
    cli.main(["train", str(tmp_path / "run.toml"), "--directory", str(tmp_path), "--resume", "auto"])
    assert (tmp_path / "run.toml").read_text() == before, "nothing was left to train"
    assert len(list(tmp_path.glob("run*.toml"))) == 1


def test_a_run_that_goes_on_remembers_its_beginnings(tmp_path: Path) -> None:
    class Begin:
        ranks, iteration = world(), 0

    class GoOn(Begin):
        iteration = 5

    settings, rollout = {"env_id": "CartPole-v1", "resume": "auto"}, None
    for iteration in range(3):
        kept = run_file.KeepRunFile(tmp_path / "run.toml", settings)
        kept.on_rollout(GoOn() if iteration else Begin(), rollout)  # type: ignore[arg-type]
        if iteration == 0:
            text = (tmp_path / "run.toml").read_text()
            (tmp_path / "run.toml").write_text(text.replace("ranks = 1", "ranks = 7"))
    facts = tomllib.loads((tmp_path / "run.toml").read_text())["facts"]
    assert [each["ranks"] for each in facts["before"]] == [7, 1] and facts["ranks"] == 1
    assert run_file.read(tmp_path / "run.toml") == {**settings, "resume": False}
    run_file.KeepRunFile(tmp_path / "run.toml", {**settings, "seed": 1}).on_rollout(GoOn(), rollout)  # type: ignore[arg-type]
    assert (tmp_path / "run.1.toml").exists() and "before" not in (tmp_path / "run.toml").read_text()


def test_a_run_that_found_no_checkpoint_leaves_the_formers_outputs_aside(tmp_path: Path) -> None:
    command = ["train", "CartPole-v1", *TINY, "--resume", "auto", "--directory", str(tmp_path)]
    cli.main(command)
    (tmp_path / "evaluation.json").write_text("of the former one")
    shutil.rmtree(tmp_path / "saved_model" / "checkpoints")
    cli.main(command)
    assert not (tmp_path / "evaluation.json").exists()
    assert (tmp_path / "evaluation.1.json").read_text() == "of the former one"
    assert (tmp_path / "run.1.toml").exists() and "before" not in (tmp_path / "run.toml").read_text()


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_that_is_no_file_is_told_before_the_work(tmp_path: Path, output: str) -> None:
    cli.main(["train", "CartPole-v1", *TINY, "--directory", str(tmp_path / "run")])
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    shutil.copytree(run, other)
    for command in (["evaluate", run], ["plot", run], ["compare", run, "--", other], ["export", run]):
        with pytest.raises(ConfigurationError, match=r"^output='[./]+' must end in the name of a file$"):
            cli.main([*command, "--output", output])


def test_a_directory_named_as_toml_writes_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="^directory='none' stands for None in run.toml: use './none'"):
        cli.main(["train", "CartPole-v1", *TINY, "--directory", "none"])


def test_versions_are_those_that_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "first"
    (first / "numpy-0.0.1.dist-info").mkdir(parents=True)
    (first / "numpy-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    (first / "left_over-1.dist-info").mkdir()  # of an uninstallation that was interrupted
    monkeypatch.syspath_prepend(first)
    assert provenance.facts(1)["versions"]["numpy"] == "0.0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden = 64", r"hidden=64 must be whole numbers of at least 1"),
        ("hidden = [64.5]", "hidden=.*64.5.* must be whole numbers"),
        ("hidden = [0]", "hidden=.*0.* must be whole numbers of at least 1"),
        ("directory = 5", "directory=5 must be the path"),
        ("env_id = 5", "has no env_id"),
    ],
)
def test_settings_of_a_file_are_looked_at(tmp_path: Path, text: str, message: str) -> None:
    own = {line.split(" = ")[0]: line for line in ('env_id = "CartPole-v1"', "total_steps = 512", text)}
    (tmp_path / "run.toml").write_text("\n".join(own.values()))
    with pytest.raises(ConfigurationError, match=message):
        cli.main(["train", str(tmp_path / "run.toml"), "--quiet"])


def test_an_environment_of_ones_own_is_found_where_one_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')"
    )
    command = [str(Path(sys.executable).with_name("ppo-mpi")), "train", "mine:Mine-v0", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine:Mine-v0" / "seed0" / "run.toml").exists()


def test_a_kept_file_starts_its_run_again() -> None:
    kept = list((Path(__file__).parent.parent / "results").rglob("*.toml"))
    assert len(kept) > 100 and [path for path in kept if run_file.read(path)["resume"]] == []
