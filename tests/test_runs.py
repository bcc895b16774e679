# SPDX-License-Identifier: MIT
"""Tests of finding and reading runs."""

import numpy as np
import pytest

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.runs import find_runs, on_common_grid, read_columns, read_group, read_groups, read_run


def write_run(path, returns=(1.0, 2.0), steps=None, columns="total_steps,seconds,episode_return"):
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = range(100, 100 * len(returns) + 1, 100) if steps is None else steps
    rows = "".join(f"{s},{s / 50},{r}\n" for s, r in zip(steps, returns, strict=True))
    path.write_text(f"{columns}\n{rows}")
    return path


def test_runs_are_found_beneath_a_directory_without_former_ones(tmp_path):
    paths = [write_run(tmp_path / name / "logs" / "progress.csv") for name in ("a", "b")]
    write_run(tmp_path / "a" / "logs" / "progress.1.csv")
    write_run(tmp_path / "a" / "logs" / "seed0.csv")
    assert find_runs(tmp_path) == paths
    assert find_runs(str(tmp_path / "a")) == paths[:1]
    assert find_runs(tmp_path / "b" / "logs") == find_runs(paths[1]) == paths[1:]
    assert find_runs([tmp_path / "b", tmp_path]) == [paths[1], paths[0]]  # each once


def test_runs_are_found_through_symbolic_links_each_once(tmp_path):
    elsewhere = [write_run(tmp_path / "scratch" / f"seed{seed}" / "logs" / "progress.csv") for seed in range(3)]
    group = tmp_path / "group"
    group.mkdir()
    for seed in range(3):
        (group / f"seed{seed}").symlink_to(tmp_path / "scratch" / f"seed{seed}")
    (group / "again").symlink_to(group)
    found = find_runs(group)
    assert [path.resolve() for path in found] == elsewhere


def test_kept_results_count_where_there_is_no_progress_csv(tmp_path):
    paths = [write_run(tmp_path / "Hopper-v5" / "fast" / f"seed{seed}.csv") for seed in range(2)]
    write_run(tmp_path / "scores.csv")
    assert find_runs(tmp_path) == paths


@pytest.mark.parametrize("name, why", [("", "no progress.csv is beneath it"), ("missing", "no such directory")])
def test_a_path_without_a_run_is_named(tmp_path, name, why):
    with pytest.raises(ConfigurationError, match=f"^runs='.*': {why}") as caught:
        find_runs(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place, task",
    [
        ("ALE/Pong-v5/seed0/logs", "Pong-v5"),
        ("Ant-v4/Hopper-v5/fast", "Hopper-v5"),
        ("Hopper-v5x/fast", ""),
        ("-v5/logs", ""),
        ("Hopper-v5/idea-v2/logs", "Hopper-v5"),
        ("thesis-v2/idea-v1/logs", ""),
    ],
)
def test_the_task_is_the_nearest_directory_named_as_an_environment(tmp_path, place, task):
    assert read_run(write_run(tmp_path / place / "progress.csv")).task == task


@pytest.mark.parametrize(
    "content, task",
    [
        (b'env_id = "ALE/Pong-v5"', "Pong-v5"),
        (b'env_id = "my_module:Mine-v0"', "Mine-v0"),
        (b"seed = 1", "Hopper-v5"),
        (b"\xff\xfe", "Hopper-v5"),
    ],
)
def test_the_task_is_that_of_the_run_file_if_it_names_one(tmp_path, content, task):
    path = write_run(tmp_path / "Hopper-v5" / "seed0" / "logs" / "progress.csv")
    (tmp_path / "Hopper-v5" / "seed0" / "run.toml").write_bytes(content)
    assert read_run(path).task == task


def test_the_task_is_seen_above_the_path_that_is_given(tmp_path, monkeypatch):
    write_run(tmp_path / "Hopper-v5" / "fast" / "progress.csv")
    monkeypatch.chdir(tmp_path / "Hopper-v5" / "fast")
    assert list(read_group(".")) == ["Hopper-v5"]


def test_rows_before_the_first_episode_are_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "progress.csv", [np.nan, 5.0, 7.0]))
    np.testing.assert_array_equal([run.steps, run.seconds, run.values], [[200, 300], [4, 6], [5, 7]])
    assert run.score == 7


def test_runs_are_grouped_by_task(tmp_path):
    for task, seeds in (("Walker2d-v5", 1), ("Hopper-v5", 2)):
        for seed in range(seeds):
            write_run(tmp_path / task / f"{seed}" / "progress.csv", [1.0, seed])
    read = read_group(tmp_path)
    assert {task: [run.score for run in runs] for task, runs in read.items()} == {
        "Hopper-v5": [0, 1],
        "Walker2d-v5": [0],
    }


def test_runs_without_a_task_are_of_the_only_one_that_is_named(tmp_path):
    a = write_run(tmp_path / "CartPole-v1" / "progress.csv", [1.0, 5.0]).parent
    b = write_run(tmp_path / "mine" / "progress.csv", [1.0, 7.0]).parent
    read = read_groups([a, [b, a]])
    assert [{task: [run.score for run in runs] for task, runs in group.items()} for group in read] == [
        {"CartPole-v1": [5]},
        {"CartPole-v1": [7, 5]},
    ]
    other = write_run(tmp_path / "Hopper-v5" / "progress.csv").parent
    assert [list(group) for group in read_groups([a, b, other])] == [["CartPole-v1"], [""], ["Hopper-v5"]]


def test_an_empty_group_is_told():
    with pytest.raises(ConfigurationError, match="^runs: a group is empty"):
        read_groups([[]])


@pytest.mark.parametrize("returns", [(), (np.nan, np.nan)])
def test_an_empty_run_is_skipped_and_said(tmp_path, returns):
    write_run(tmp_path / "a" / "progress.csv")
    empty = write_run(tmp_path / "b" / "progress.csv", returns)
    with pytest.warns(UserWarning, match=f"{empty} is left out"):
        assert len(read_group(tmp_path)[""]) == 1
    with pytest.warns(UserWarning), pytest.raises(ConfigurationError, match="no episode has ended"):
        read_group(empty)


def test_seconds_may_be_missing_but_returns_may_not(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("total_steps,episode_return\n1,2\n")
    assert np.isnan(read_run(path).seconds).all()
    path.write_text("total_steps,seconds\n1,2\n")
    names = "total_steps and episode_return"
    with pytest.raises(ConfigurationError, match=f"^runs='.*' is not a progress.csv with numbers under {names}"):
        read_run(path)
    with pytest.raises(ConfigurationError, match="with numbers under evaluation_return \\("):
        read_columns("runs", path, ("evaluation_return",))


def test_curves_are_interpolated_where_all_are_known():
    x, y = [np.array([0.0, 10.0]), np.array([2.0, 4.0, 6.0])], [np.array([0.0, 100.0]), np.array([1.0, 3.0, -1.0])]
    grid, values = on_common_grid(x, y, 5)
    np.testing.assert_allclose(grid, [2, 3, 4, 5, 6])
    np.testing.assert_allclose(values, [[20, 30, 40, 50, 60], [1, 2, 3, 1, -1]])


@pytest.mark.parametrize("second, points", [([11.0, 12.0], 0), ([10.0, 12.0], 1)])
def test_curves_that_do_not_overlap_have_no_points_in_common(second, points):
    grid, values = on_common_grid([np.array([0.0, 10.0]), np.array(second)], [np.zeros(2), np.ones(2)], 5)
    assert grid.shape == (points,) and values.shape == (2, points)
