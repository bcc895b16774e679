# SPDX-License-Identifier: MIT
"""The arithmetic of the benchmarks; what they measure is too slow to test."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import tyro
from torch import nn

from benchmarks import changes, cost_model, gradient_precision, precision, results, run
from benchmarks.contestants import factory
from ppo_mpi_base import aggregates, settings
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.rollout import Batch
from ppo_mpi_base.runs import Run


def test_sample_factory_is_measured_after_its_warm_up() -> None:
    lines = ["starting", *(f"Fps is (10 sec: 1.0). Total num frames: {n}. " for n in (0, 500, 900, 1000, 1400, 3000))]
    clock = iter([0.0, 1.0, 5.0, 14.0, 16.0, 20.0, 26.0])
    assert factory.measure(lines, 10, clock) == pytest.approx((3000 - 1000) / (26 - 16))


def test_a_ratio_is_the_median_of_the_rounds_and_missing_contestants_are_left_out() -> None:
    ours = [{"steps_per_second": float(x), "communication_of_update": 0.2} for x in (40, 10, 20)]
    alone = [{"steps_per_second": float(x)} for x in (80, 10, 50)]
    ratio, communication = run.table({"paper": ours, "environments": alone, "sbx_8": [None] * 3})
    assert (ratio["comparison"], ratio["ratio"], ratio["reached"]) == (run.TARGETS[4].text, "0.5", "yes")
    assert ratio["rounds"] == "0.5 1 0.4" and (ratio["steps_per_second"], ratio["other"]) == ("20", "50")
    assert (communication["ratio"], communication["reached"]) == ("0.2", "NO")


def test_a_round_that_one_side_failed_has_no_ratio() -> None:
    ours, theirs = ([{"steps_per_second": x} for x in (6.0, 8.0)] for _ in range(2))
    assert run.ratios([*ours, None], [None, *theirs]) == [8.0 / 6.0]


def test_every_target_compares_contestants_that_exist() -> None:
    assert {name for target in run.TARGETS for name in (target.of, target.to)} <= set(run.ALL)
    assert set(run.COMMUNICATION) <= set(run.ALL)


def test_every_study_has_a_score_for_each_source_and_tester() -> None:
    for study in results.STUDIES.values():
        assert all(len(scores) == len(study.sources) for scores in study.published.values())
        assert all(len(scores) == len(study.testers) for scores in study.tested.values())
        for task in study.published:
            assert gymnasium.spec(task) is not None


def test_a_study_without_sources_has_no_verdict(tmp_path: Path) -> None:
    study = results.Study(tmp_path, None, 1, (), {"CartPole-v1": ()}, testers=("Z",), tested={"CartPole-v1": (9,)})
    path = study.place("CartPole-v1", 0)
    path.parent.mkdir()
    path.write_text("total_steps,episode_return,seconds,evaluation_return\n1,5,1,6\n2,7,2,8\n")
    results.tabulate(study)
    results.tabulate_tests(study)
    header, row = (tmp_path / "scores.csv").read_text().splitlines()
    assert header.endswith("seeds,median_seconds") and row == "CartPole-v1,7.0,,7.0,,,1,2"
    header, row = (tmp_path / "tests.csv").read_text().splitlines()
    assert header.endswith("seeds,Z,not_below") and row == "CartPole-v1,8.0,,8.0,2,1,9,"


def test_the_mean_of_new_seeds_leaves_out_those_that_settings_were_chosen_by(tmp_path: Path) -> None:
    study = results.Study(tmp_path, 9, 4, (), {"Hopper-v4": ()}, chosen_by=2)
    for seed in range(4):
        study.place("Hopper-v4", seed).parent.mkdir(exist_ok=True)
        study.place("Hopper-v4", seed).write_text(f"total_steps,episode_return,seconds\n9,{10**seed},1\n")
    results.tabulate(study)
    with (tmp_path / "scores.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["mean"], row["mean_of_new_seeds"]) == ("277.8", "550.0")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_a_contestant_has_started() -> None:
    allocate = "import sys; data = b'x' * 100_000_000; print('ready', flush=True); sys.stdin.read()"
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, allocate], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    peaks = run.memory(process.pid)
    process.communicate("")
    assert len(peaks) == 2
    assert peaks[process.pid] < 90 < max(peaks.values()) < 200


def test_the_model_finds_the_line_through_two_sizes() -> None:
    line = cost_model.Line.through((8, 30.0), (32, 78.0))
    assert (line.call, line.each) == (14.0, 2.0)


def test_the_model_adds_up_an_iteration() -> None:
    line = cost_model.Line
    model = cost_model.Model(line(8, 30), line(16, 1), line(50, 2), line(512, 1), 14.0, 0.5, 32.0, 40_000, 10_000)
    costs = model.per_step((8, 128, 64, 10))
    by_hand = {
        "environments": 31.0,
        "inference": 3.0,
        "work on samples": 25.0,
        "overhead of calls": 10.0,
        "communication": 5.0,
        "iteration": 1.5,
    }
    assert costs == by_hand
    assert cost_model.speed(2, costs) == pytest.approx(2e6 / 75.5)


def test_an_allreduce_costs_two_latencies_a_doubling_and_two_messages() -> None:
    assert cost_model.allreduce(2, 1000, latency=3, bandwidth=100) == pytest.approx(2 * 3 + 10)
    assert cost_model.allreduce(1024, 1000, latency=3, bandwidth=100) == pytest.approx(60 + 2 * 1023 / 1024 * 10)


@pytest.mark.parametrize("change", changes.CHANGES)
def test_a_change_is_one_of_the_preset(change: str) -> None:
    preset, flags = settings.for_run("HalfCheetah-v4", 1), changes.study(change).flags
    chosen = tyro.cli(settings.flags(preset), args=["HalfCheetah-v4", *flags])
    differ = {name for name, value in preset.items() if getattr(chosen, name) != value}
    assert differ == {flag.removeprefix("--").replace("-", "_") for flag in flags[::2]}


def of_scores(*scores: float) -> list[Run]:
    steps = np.array([0.0, 100.0])
    return [Run(Path(), "Ant-v4", steps, steps, np.array([0.0, score])) for score in scores]


def test_a_change_is_compared_with_the_preset() -> None:
    line = changes.row("lambda_0.9", "Ant-v4", of_scores(30, 40), of_scores(10, 10, 10))
    assert line[:4] == ["lambda_0.9", "Ant-v4", "35.0 ± 7.07 (2)", "10.0 ± 0.00 (3)"]
    assert line[4] == "25.0 [20.0, 30.0]" and line[5] == "1.00 [1.00, 1.00]"


def test_the_highest_test_return_is_of_the_mean_over_seeds(tmp_path: Path, capsys: Any) -> None:
    # Not the mean of each seed's highest, 90: at 100 steps the mean is 60, at 200 it is 70, at 300 it is 50. The first
    # seed lacks the test at 400 steps, as a run does that was stopped; the third, of former times, has none.
    task, of_seeds = "HalfCheetah-v4", ((80, 40, 30), (40, 100, 70, 900), ())
    study = results.Study(tmp_path, 300, 2, (), {}, testers=("T", "X"), tested={task: (5784, 69)})
    for seed, returns in enumerate(of_seeds):
        path = study.place(task, seed)
        path.parent.mkdir(exist_ok=True)
        rows = [f"{100 * k},5,{x}\n{100 * k + 50},6,nan\n" for k, x in enumerate(returns, 1)]
        path.write_text("total_steps,episode_return,evaluation_return\n" + "".join(rows))
    results.tabulate_tests(study)
    _, row = (tmp_path / "tests.csv").read_text().splitlines()
    assert row == "HalfCheetah-v4,70.0,42.4,50.0,200,2,5784,69,X"
    assert "HalfCheetah-v4: 1 of 3 runs have no test episodes" in capsys.readouterr().out


def test_the_scores_of_a_run_in_one_precision(tmp_path: Path) -> None:
    rows = [(0, -20, 1), (500_000, -10, 2), (1_000_000, 10, 3)]
    lines = ["total_steps,episode_return,seconds", *(",".join(map(str, row)) for row in rows), ""]
    (tmp_path / "seed0.csv").write_text("\n".join(lines))
    # At half a million, three quarters and one million steps; and the mean of -15 and 0 over halves.
    assert precision.scores(tmp_path / "seed0.csv") == [-10, 0, 10, -7.5]


def test_runs_in_both_precisions_differ_in_nothing_else() -> None:
    assert precision.place("float32", 1) == precision.HERE / "float32" / "Pong-v5" / "seed1.csv"
    first, other = precision.keywords("float32", 0, "here"), precision.keywords("bfloat16", 1, "here")
    assert {name for name in first if repr(other[name]) != repr(first[name])} == {"seed", "precision"}
    assert (other["precision"], other["seed"]) == ("bfloat16", 1)


def test_groups_of_seeds_are_compared_column_by_column() -> None:
    found = {"bfloat16": np.array([[1.0, 5.0], [3.0, 5.0]]), "float32": np.array([[2.0, 4.0], [2.0, 4.0]])}
    value, low, high = precision.differing("difference", aggregates.difference, found)
    assert value == ["difference", "value", "0.00", "1.00"]
    assert (low[2:], high[2:]) == (["-1.00", "1.00"], ["1.00", "1.00"])
    probability, *_ = precision.differing("", aggregates.probability_of_improvement, found)
    assert probability[2:] == ["0.50", "1.00"]


def test_the_gradient_in_each_precision() -> None:
    torch.manual_seed(0)
    space = gymnasium.spaces.Box(-1, 1, (5,))
    networks = nn.Linear(5, 2), nn.Linear(5, 1)
    trained = ActorCritic(*networks, space, gymnasium.spaces.Discrete(2), precision="bfloat16")
    numbers = torch.randn(4, 8)
    batch = Batch(torch.randn(8, 5), torch.randint(2, (8,)), -numbers[0].abs(), *numbers[1:], {})
    coefficients = {"clip_ratio": torch.tensor(9.0), "entropy_coef": torch.tensor(0.0), "value_coef": torch.tensor(1.0)}
    found = {name: gradient_precision.gradient(trained, batch, coefficients, name) for name in ("bfloat16", "float32")}
    assert trained.precision == "bfloat16"
    # Of the value's bias: twice the mean error. It is the last parameter.
    values = networks[1](batch.observations).flatten()
    torch.testing.assert_close(found["float32"][-1], 2 * (values - batch.returns).mean().detach())
    assert not torch.equal(found["bfloat16"], found["float32"])
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.1, atol=0.02)
