# SPDX-License-Identifier: MIT
"""Tests of the pictures, read back from the figures that it writes."""

import json
import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.plot import compare_runs, learning_curve, plot_runs
from tests.test_logger import disk_full_after


def write_csv(path, steps, returns):
    rows = "".join(f"{s},0.5,{r}\n" for s, r in zip(steps, returns, strict=True))
    path.write_text(f"total_steps,kl,episode_return\n{rows}")
    return path


def curve(svg):
    """Return the blue lines of an SVG file: a list of arrays (points, 2), y upwards."""
    path = re.search(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: #0072b2; stroke-width: 1.4', svg)
    pieces = path.group(1).split("M")[1:] if path else []
    return [np.array(re.findall(r"([\d.-]+) ([\d.-]+)", piece), dtype=float) * (1, -1) for piece in pieces]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def blue_pixels(png):
    red, green, blue = imread(png)[..., :3].transpose(2, 0, 1)
    return int(((blue > 0.6) & (red < 0.2) & (green < 0.6)).sum())


def test_the_curve_goes_through_every_row(tmp_path):
    steps, returns = [1000, 3000, 4000, 10_000], [-10.0, 30.0, 20.0, 90.0]
    svg = learning_curve(write_csv(tmp_path / "progress.csv", steps, returns), tmp_path / "curve.svg").read_text()
    (points,) = curve(svg)
    # The axes are linear: where a point lies between the first and the last is where its numbers lie.
    relative = (points - points[0]) / (points[-1] - points[0])
    np.testing.assert_allclose(relative, np.transpose([[0, 2 / 9, 3 / 9, 1], [0, 0.4, 0.3, 1]]), atol=1e-5)


def test_unknown_returns_leave_a_gap(tmp_path):
    returns = [np.nan, np.nan, 1.0, 2.0, np.nan, np.inf, 3.0, 4.0, 5.0]
    path = write_csv(tmp_path / "progress.csv", range(9), returns)
    assert [len(piece) for piece in curve(learning_curve(path, tmp_path / "curve.svg").read_text())] == [2, 3]


@pytest.mark.parametrize(
    "last, labels",
    [
        (1_003_520, ["0", "0.2M", "0.4M", "0.6M", "0.8M", "1M"]),
        (8_000, ["0", "2k", "4k", "6k", "8k"]),
        (2_000_000_000, ["0", "0.5B", "1B", "1.5B", "2B"]),
        (40, ["0", "10", "20", "30", "40"]),
    ],
)
def test_steps_are_labelled_in_thousands_or_millions(tmp_path, last, labels):
    path = write_csv(tmp_path / "progress.csv", [last // 2, last], [-2000.0, 3000.0])
    found = texts(learning_curve(path, tmp_path / "curve.svg").read_text())
    assert found[: found.index("Agent steps")] == labels
    assert {"\N{MINUS SIGN}2,000", "0", "3,000", "Episode return (mean of last 100)"} <= set(found)


def test_a_long_noisy_run_is_a_png_of_a_few_hundred_dots_per_inch(tmp_path):
    rng = np.random.default_rng(0)
    returns = np.concatenate([np.full(5, np.nan), 5000 * np.linspace(0, 1, 485) ** 0.5 + rng.normal(0, 100, 485)])
    csv = write_csv(tmp_path / "progress.csv", 2048 * np.arange(1, 491), returns)
    png = learning_curve(csv, tmp_path / "curve.png")
    assert png == tmp_path / "curve.png" and png.read_bytes().startswith(b"\x89PNG")
    assert imread(png).shape[:2] == (620, 1000)
    assert blue_pixels(png) > 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "progress.csv"]


def dots(svg):
    return svg.count('style="fill: #0072b2')


@pytest.mark.parametrize("rows, expected", [(1, 1), (2, 2), (490, 0)])
def test_dots_mark_the_rows_where_they_are_few(tmp_path, rows, expected):
    csv = write_csv(tmp_path / "progress.csv", range(rows), range(rows))
    assert dots(learning_curve(csv, tmp_path / "curve.svg").read_text()) == expected


def test_a_dot_marks_what_lies_between_gaps(tmp_path):
    returns = [*range(50), np.nan, 50, np.nan, *range(50, 100)]
    csv = write_csv(tmp_path / "progress.csv", range(len(returns)), returns)
    assert dots(learning_curve(csv, tmp_path / "curve.svg").read_text()) == 1


@pytest.mark.parametrize(
    "rows", ["", "total_steps,episode_return\n", "total_steps,episode_return\n2048,nan\n4096,nan\n"]
)
def test_a_run_without_an_ended_episode_says_so(tmp_path, rows):
    (tmp_path / "progress.csv").write_text(rows)
    svg = learning_curve(tmp_path / "progress.csv", tmp_path / "curve.svg").read_text()
    assert "no episode has ended yet" in texts(svg)
    assert not curve(svg)


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    path = write_csv(tmp_path / "progress.csv", [1000, 2000, 3000], [1.0, 2.0, 3.0])
    with path.open("a") as file:
        file.write("4000,0.5,4")
    (points,) = curve(learning_curve(path, tmp_path / "curve.svg").read_text())
    assert len(points) == 3


def test_a_path_without_an_ending_is_a_png(tmp_path):
    path = learning_curve(write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0]), tmp_path / "curve")
    assert path == tmp_path / "curve" and path.read_bytes().startswith(b"\x89PNG")


def test_pdf_fonts_are_ones_that_journals_take(tmp_path):
    path = learning_curve(write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0]), tmp_path / "curve.pdf")
    assert b"/Type3" not in path.read_bytes() and b"/CIDFontType2" in path.read_bytes()


def test_the_users_own_matplotlib_stays_as_it_is(tmp_path):
    with matplotlib.rc_context({"pdf.fonttype": 3}):
        before = (dict(matplotlib.rcParams), pyplot.get_fignums())
        learning_curve(write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0]), tmp_path / "curve.png")
        assert (dict(matplotlib.rcParams), pyplot.get_fignums()) == before


@pytest.mark.parametrize("text", [None, "total_steps,kl\n1,2\n", "total_steps,episode_return\n1,high\n", "a\n\0\n"])
def test_a_file_that_is_no_progress_csv_is_named(tmp_path, text):
    path = tmp_path / "progress.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match="^csv_path='.*progress.csv' is not a progress.csv") as caught:
        learning_curve(path, tmp_path / "curve.png")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*curve*"))


@pytest.mark.parametrize("name", ["progress.csv/curve.png", "curve.docx"])
def test_a_figure_that_cannot_be_written_is_named(tmp_path, name):
    csv = write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0])
    with pytest.raises(ConfigurationError, match=f"^png_path='.*{name}' cannot be written") as caught:
        learning_curve(csv, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_leaves_the_former_figure(tmp_path):
    csv = write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0])
    former = learning_curve(csv, tmp_path / "curve.png").read_bytes()
    with disk_full_after(1000), pytest.raises(ConfigurationError, match="png_path="):
        learning_curve(csv, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == former


SCORES = {
    "a": {"Hopper-v5": [100.0, 200.0, 300.0], "Walker2d-v5": [50.0, 70.0]},
    "b": {"Hopper-v5": [90.0, 110.0], "Walker2d-v5": [60.0, 80.0, 100.0]},
}


@pytest.fixture
def groups(tmp_path):
    """Write straight curves from 0 to these scores, in 1,000 steps and 7,200 seconds."""
    for group, tasks in SCORES.items():
        for task, scores in tasks.items():
            for seed, score in enumerate(scores):
                write_run(tmp_path / group / task / f"{seed}" / "progress.csv", [0.0, score / 2, score])
    return [tmp_path / "a", tmp_path / "b"]


def write_run(path, returns):
    path.parent.mkdir(parents=True)
    rows = "".join(f"{500 * n},{3600 * n},{value}\n" for n, value in enumerate(returns))
    path.write_text(f"total_steps,seconds,episode_return\n{rows}")
    return path


def lines(svg, color):
    """Return the lines over seeds of a colour: arrays (points, 2), y upwards."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: {color}[^"]*stroke-width: 1.5', svg)
    points = [np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path), dtype=float) * (1, -1) for path in found]
    return [line for line in points if len(line) > 3]  # the legend's have 3


@pytest.mark.parametrize("axis, label", [("steps", "Agent steps"), ("time", "Wall-clock time (h)")])
def test_curves_over_seeds_have_a_panel_a_task_and_one_of_all(tmp_path, groups, axis, label):
    png, svg = plot_runs(groups, tmp_path / "curves", axis=axis, labels=["ours", "$5 _theirs"])
    assert (png, svg) == (tmp_path / "curves.png", tmp_path / "curves.svg")
    assert imread(png).shape[:2] == (840, 2250)
    text = svg.read_text()
    assert text.rstrip().endswith("</svg>")
    found = texts(text)
    assert {"Hopper-v5", "Walker2d-v5", "IQM of 2 tasks", "Episode return", "Normalized return"} <= set(found)
    assert {"ours (2\N{EN DASH}3 seeds)", "$5 _theirs (2\N{EN DASH}3 seeds)"} <= set(found)
    assert found.count(label) == 3


def test_a_line_is_the_mean_over_seeds(tmp_path, groups):
    svg = plot_runs(groups, tmp_path / "curves")[1].read_text()
    ours, theirs = lines(svg, "#0072b2"), lines(svg, "#e69f00")
    assert len(ours) == len(theirs) == 3
    rises = [[line[-1, 1] - line[0, 1] for line in group] for group in (ours, theirs)]
    ratios = np.divide(*rises)
    # 25% trimmed, normalized by 300 and 100: (1/3 + .5 + .7 less both ends) of five each.
    iqm = (np.mean([0.5, 2 / 3, 0.7]), np.mean([110 / 300, 0.6, 0.8]))
    np.testing.assert_allclose(ratios, [200 / 100, 60 / 80, iqm[0] / iqm[1]], rtol=1e-4)


def test_a_single_seed_is_a_line_without_a_band(tmp_path, groups):
    edges = []
    for path in (groups[0] / "Hopper-v5", groups[0] / "Hopper-v5" / "0"):
        svg = plot_runs([path], tmp_path / "curves")[1].read_text()
        edges.append(len(re.findall(r'<path d="M [^>]*stroke: #0072b2[^"]*stroke-width: 0.5', svg)))
        assert len(lines(svg, "#0072b2")) == 1
    assert edges == [2, 0]
    assert "0 (1 seed)" in texts(svg)


def test_a_shorter_run_ends_the_line(tmp_path):
    write_run(tmp_path / "x" / "progress.csv", [0.0, 1.0, 2.0])
    write_run(tmp_path / "y" / "progress.csv", [0.0, 1.0])
    write_run(tmp_path / "whole" / "progress.csv", [0.0, 1.0, 2.0])
    pair = [tmp_path / "x", tmp_path / "y"]
    svg = plot_runs([pair, tmp_path / "whole"], tmp_path / "curves")[1].read_text()
    (short,), (whole,) = lines(svg, "#0072b2"), lines(svg, "#e69f00")
    assert np.ptp(short[:, 0]) == pytest.approx(np.ptp(whole[:, 0]) / 2, rel=1e-4)


@pytest.mark.parametrize("rows, drawn", [(3, True), (4, False)])
def test_tasks_of_very_different_lengths_have_no_panel_of_all(tmp_path, rows, drawn):
    write_run(tmp_path / "Hopper-v5" / "progress.csv", [0.0, 1.0])
    write_run(tmp_path / "Walker2d-v5" / "progress.csv", [0.0] * rows)
    found = texts(plot_runs([tmp_path], tmp_path / "curves")[1].read_text())
    assert ("IQM of 2 tasks" in found) is drawn
    assert any("ormalized" in text for text in found) is drawn


def test_any_column_is_drawn_without_the_rows_that_have_no_number_there(tmp_path):
    for task, kls in (("Hopper-v5", [0.01, 0.03]), ("Walker2d-v5", [0.02, 0.02])):
        (tmp_path / task).mkdir()
        rows = "".join(f"{1000 * n},{kl},{-kl}\n" for n, kl in enumerate([np.nan, *kls, np.nan]))
        (tmp_path / task / "progress.csv").write_text(f"total_steps,kl,episode_return\n{rows}")
    svg = plot_runs([tmp_path], tmp_path / "curves", column="kl")[1].read_text()
    rising, level = lines(svg, "#0072b2")
    assert rising[-1, 1] > rising[0, 1] and level[-1, 1] == level[0, 1]
    assert np.ptp(rising[:, 0]) > 0
    found = texts(svg)
    assert "kl" in found and "Episode return" not in found
    assert not [text for text in found if "IQM" in text or "episodes" in text or "ormalized" in text]


def test_a_column_that_is_not_there_is_named(tmp_path, groups):
    message = r"^column='second': .*csv has total_steps, seconds, episode_return; did you mean 'seconds'\?$"
    with pytest.raises(ConfigurationError, match=message):
        plot_runs(groups, tmp_path / "curves", column="second")
    empty = write_run(tmp_path / "c" / "progress.csv", [1.0])
    empty.write_text("total_steps,kl,episode_return\n1,nan,1\n")
    with pytest.warns(UserWarning, match="left out: kl has no number yet"), pytest.raises(ConfigurationError) as caught:
        plot_runs([empty], tmp_path / "curves", column="kl")
    assert "kl has no number yet in any of 1 runs" in str(caught.value)


def test_runs_that_do_not_overlap_are_said(tmp_path):
    write_csv(tmp_path / "progress.csv", [0, 1000], [0.0, 1.0])
    (tmp_path / "later").mkdir()
    write_csv(tmp_path / "later" / "progress.csv", [2000, 3000], [2.0, 3.0])
    pair = [tmp_path / "progress.csv", tmp_path / "later" / "progress.csv"]
    with pytest.warns(UserWarning, match="no curve is drawn: no range of steps is covered by all of .*later"):
        svg = plot_runs([pair], tmp_path / "curves")[1].read_text()
    assert not lines(svg, "#0072b2")


def test_the_comparison_by_hand(tmp_path, groups):
    found = compare_runs(*groups, tmp_path / "ab").to_dict()
    hopper, walker = found["tasks"]
    assert found["labels"] == ["a", "b"] and hopper["task"] == "Hopper-v5"
    assert (hopper["mean_a"]["value"], hopper["mean_b"]["value"], hopper["difference"]["value"]) == (200, 100, 100)
    assert hopper["probability"]["value"] == pytest.approx(5 / 6)  # of 6 pairs only 100 < 110
    assert walker["probability"]["value"] == pytest.approx(1 / 6)
    assert found["probability"]["value"] == pytest.approx(0.5)
    assert hopper["reference"] == [0, 300]
    assert found["iqm_a"]["value"] == pytest.approx(np.mean([0.5, 2 / 3, 0.7]))
    assert json.loads((tmp_path / "ab.json").read_text()) == found


def test_the_comparison_is_a_picture_and_a_table(tmp_path, groups):
    comparison = compare_runs(
        *groups, tmp_path / "ab", labels=("new", "old"), references={"Hopper-v5": (0, 1000), "Walker2d-v5": (0, 1000)}
    )
    assert imread(tmp_path / "ab.png").shape[:2] == (840, 2490)
    shown = set(texts((tmp_path / "ab.svg").read_text()))
    assert {"Hopper-v5", "IQM, normalized", "Probability of improvement", "P(new &gt; old)", "mean of 2 tasks"} <= shown
    table = str(comparison)
    for cell in ("200 ± 100 (3)", "60.0 ± 14.1 (2)", "0.83 [", "0.50 ["):
        assert cell in table
    assert comparison.iqm_a.value == pytest.approx(np.mean([70, 100, 200]) / 1000)


def test_large_numbers_do_not_hide_the_task(tmp_path):
    for name, scores in (("a", (41_382_712.0, 97_382_712.0)), ("b", (31_382_712.0, 87_382_712.0))):
        for seed, score in enumerate(scores):
            write_run(tmp_path / name / "Hopper-v5" / str(seed) / "progress.csv", [0.0, score])
    table = str(compare_runs(tmp_path / "a", tmp_path / "b", tmp_path / "ab"))
    assert "Hopper-v5" in table and "69,382,712 ± 39,597,980 (2)" in table and "…" not in table


def test_small_numbers_are_not_rounded_away(tmp_path):
    for name, score in (("a", 0.00041), ("b", 0.00012)):
        for seed in range(2):
            write_run(tmp_path / name / "Hopper-v5" / str(seed) / "progress.csv", [0.0, score])
    table = str(compare_runs(tmp_path / "a", tmp_path / "b", tmp_path / "ab"))
    assert "0.00041" in table and "0.00012" in table and "0.00029 [0.00029, 0.00029]" in table and "-0.00" not in table


@pytest.mark.parametrize(
    "groups, expected",
    [
        (
            [["mine/Ant-v4/seed0", "mine/Ant-v4/seed1"], ["mine/Hopper-v4/seed0", "mine/Hopper-v4/seed1"]],
            "Ant-v4|Hopper-v4",
        ),
        ([["mine/Ant-v4/0", "mine/Ant-v4/1"], ["base/Ant-v4/0", "base/Ant-v4/1"]], "mine/Ant-v4|base/Ant-v4"),
        ([["a/0", "a/1"], ["a/2", "a/3"]], "0, 1|2, 3"),
        ([["a/0", "b/1"], "c/2"], "0, 1|2"),
        (["a/0", "b/0"], "a/0|b/0"),
    ],
)
def test_groups_are_named_after_what_tells_them_apart(tmp_path, monkeypatch, groups, expected):
    monkeypatch.chdir(tmp_path)
    for path in [path for group in groups for path in ([group] if isinstance(group, str) else group)]:
        write_run(Path(path) / "logs" / "progress.csv", [0.0, 1.0])
    a, b = expected.split("|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no task is named, or none is shared
        _, svg = plot_runs(groups, "curves")
    assert {named[1] for text in texts(svg.read_text()) if (named := re.fullmatch(r"(.*) \(. seeds?\)", text))} == {
        a,
        b,
    }


def test_a_long_name_stays_within_the_picture(tmp_path):
    write_run(tmp_path / "a" / "CartPole-v1" / "progress.csv", [0.0, 1.0])
    _, svg = plot_runs([tmp_path / "a"], tmp_path / "curves", labels=["a name of many words " * 10])
    found = [text for text in texts(svg.read_text()) if "many words" in text]
    assert len(found) > 2 and max(map(len, found)) < 65  # of a picture of 4.5 inches


def test_an_ending_of_the_output_is_not_repeated(tmp_path, groups):
    for ending in (".png", ".json"):
        compare_runs(*groups, tmp_path / f"ab{ending}")
    assert {path.name for path in tmp_path.glob("ab*")} == {"ab.png", "ab.svg", "ab.json"}
    assert plot_runs(groups, tmp_path / "curves.svg") == [tmp_path / "curves.png", tmp_path / "curves.svg"]


def test_of_single_seeds_no_interval_is_told(tmp_path, groups):
    pair = [group / "Hopper-v5" / "0" for group in groups]
    assert "ppo[clip] (A) and a[/b] (B)" in str(compare_runs(*pair, tmp_path / "ab", labels=("ppo[clip]", "a[/b]")))
    found = compare_runs(*pair, tmp_path / "ab", labels=("a", "b"))
    assert found.to_dict()["tasks"][0]["difference"] == {"value": 10, "low": None, "high": None}
    assert "nan" not in str(found) and "100 (1)" in str(found)


def test_runs_of_other_lengths_are_said(tmp_path, groups):
    write_run(tmp_path / "a" / "Hopper-v5" / "9" / "progress.csv", [0.0, 500.0])
    with pytest.warns(UserWarning, match="Hopper-v5: the runs are 500 to 1,000 steps long"):
        compare_runs(groups[0] / "Hopper-v5", groups[1] / "Hopper-v5", tmp_path / "ab")


def test_tasks_of_one_group_only_are_said(tmp_path, groups):
    with pytest.warns(UserWarning, match="only one group has runs of it: Walker2d-v5"):
        compare_runs(groups[0], groups[1] / "Hopper-v5", tmp_path / "ab")
    with pytest.raises(ConfigurationError, match=r"^b: .* Hopper-v5, .* Walker2d-v5: they share no task"):
        compare_runs(groups[0] / "Walker2d-v5", groups[1] / "Hopper-v5", tmp_path / "ab")


def test_runs_whose_task_nobody_knows_are_said_to_be_taken_for_one(tmp_path):
    for name, returns in (("a", [1.0, 2.0]), ("b", [1.0, 3.0])):
        write_run(tmp_path / name / "progress.csv", returns)
    for draw in (lambda a, b: compare_runs(a, b, tmp_path / "ab"), lambda a, b: plot_runs([[a, b]], tmp_path / "ab")):
        with pytest.warns(UserWarning, match="do not name their task and are taken to be of the same one"):
            draw(tmp_path / "a", tmp_path / "b")


def test_a_run_in_both_groups_is_refused(tmp_path, groups):
    with pytest.raises(ConfigurationError, match=r"^runs: .*progress\.csv is in both groups"):
        compare_runs(tmp_path, groups[0], tmp_path / "ab", labels=["all", "one"])


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"labels": ["one"]}, "^labels=.* must be 2"),
        ({"axis": "epochs"}, "^axis='epochs' is not one of"),
        ({"labels": [1, 2]}, "^labels=.* must be 2 labels"),
        (
            {"references": {"Hopper-v5": (0, 1)}},
            "^references: task 'Walker2d-v5' must have its two scores, .* not None",
        ),
        ({"references": {"Hopper-v5": (0,), "Walker2d-v5": (0, 1)}}, r"^references: task 'Hopper-v5' .* not \(0,\)"),
        ({"output": "/dev/null/curves"}, "^output='/dev/null/curves.png' cannot be written"),
    ],
)
def test_wrong_arguments_of_curves_are_named(tmp_path, groups, keywords, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        plot_runs(groups, **{"output": tmp_path / "curves", **keywords})
    assert "\n" not in str(caught.value)


def test_time_needs_its_column(tmp_path):
    path = write_csv(tmp_path / "progress.csv", [1, 2], [1.0, 2.0])
    with pytest.raises(ConfigurationError, match="^axis='time' needs the column seconds"):
        plot_runs([path], tmp_path / "curves", axis="time")
    with pytest.raises(ConfigurationError, match="^groups=.* must be a list of paths"):
        plot_runs(str(path), tmp_path / "curves")
