# SPDX-License-Identifier: MIT
"""Tests of progress.csv, TensorBoard's events and the console line."""

import contextlib
import io
import math
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import threading
import time
from fcntl import ioctl

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from ppo_mpi_base import logger as logger_module
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.logger import Logger, read_progress
from tests.mpi.launch import environment


def write_run(directory, steps, **keywords):
    log = Logger(directory, total_steps=1000, quiet=True, **keywords)
    for total_steps in steps:
        log.log({"total_steps": total_steps, "episode_return": total_steps / 8})
    log.close()


def scalars(directory):
    """Read what TensorBoard shows: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(autouse=True)
def files_of_one_second_in_order(monkeypatch):
    """Count TensorBoard's files from 100: it reads those of one second by name, where number 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@contextlib.contextmanager
def disk_full_after(size):
    """Let no file grow beyond so many bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_each_row_is_in_the_file_before_the_run_ends(tmp_path):
    log = Logger(tmp_path / "made" / "here", total_steps=1000, quiet=True)
    path = tmp_path / "made" / "here" / "progress.csv"
    log.log({"total_steps": 100.0, "episode_return": math.nan, "kl": np.float32(0.5)})
    assert path.read_text() == "total_steps,episode_return,kl\n100,nan,0.5\n"
    log.log({"total_steps": np.int64(200), "episode_return": np.float64(-1.25), "kl": torch.tensor(2.0)})
    assert path.read_text() == "total_steps,episode_return,kl\n100,nan,0.5\n200,-1.25,2\n"
    log.close()
    log.close()


def test_numbers_survive_the_file_exactly(tmp_path):
    values = [0.1, 1 / 3, -1e-300, 123456789.123456789, math.pi * 1e20, math.inf]
    log = Logger(tmp_path, total_steps=1000, quiet=True)
    for value in values:
        log.log({"total_steps": 1, "x": value})
    log.close()
    assert [float(row["x"]) for row in read_progress(tmp_path / "progress.csv")[1]] == values


def test_a_later_name_becomes_a_column_and_a_missing_one_is_nan(tmp_path):
    log = Logger(tmp_path, total_steps=1000, quiet=True)
    log.log({"total_steps": 1, "a": 0.5})
    log.log({"total_steps": 2, "a": 1.5, "user's, own": 7})
    log.log({"total_steps": 3, "user's, own": 8})
    log.close()
    assert read_progress(tmp_path / "progress.csv") == (
        ["total_steps", "a", "user's, own"],
        [
            {"total_steps": "1", "a": "0.5", "user's, own": "nan"},
            {"total_steps": "2", "a": "1.5", "user's, own": "7"},
            {"total_steps": "3", "a": "nan", "user's, own": "8"},
        ],
    )
    assert not list(tmp_path.glob(".*"))


def test_a_line_being_written_is_not_read(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("total_steps,kl\n100,0.5\n200,0.12")
    assert read_progress(path)[1] == [{"total_steps": "100", "kl": "0.5"}]


def test_a_new_run_keeps_the_former_ones_file(tmp_path):
    for run in (1, 2, 3):
        write_run(tmp_path, [run])
    steps = {path.name: read_progress(path)[1][0]["total_steps"] for path in tmp_path.glob("*.csv")}
    assert steps == {"progress.1.csv": "1", "progress.2.csv": "2", "progress.csv": "3"}


def test_a_run_that_logged_nothing_leaves_no_file_to_keep(tmp_path):
    write_run(tmp_path, [])
    write_run(tmp_path, [1])
    assert [path.name for path in tmp_path.glob("*.csv")] == ["progress.csv"]


def test_resuming_cuts_back_to_the_checkpoint_and_appends(tmp_path):
    write_run(tmp_path, [100, 200, 300, 400])
    write_run(tmp_path, [300, 450], resume_from_steps=200)
    rows = [(row["total_steps"], row["episode_return"]) for row in read_progress(tmp_path / "progress.csv")[1]]
    assert rows == [("100", "12.5"), ("200", "25"), ("300", "37.5"), ("450", "56.25")]
    assert [path.name for path in tmp_path.glob("*.csv")] == ["progress.csv"]


def test_resuming_drops_a_line_that_a_kill_cut_off(tmp_path):
    write_run(tmp_path, [100])
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("15")  # of "1500,...": as a number it would be kept
    write_run(tmp_path, [200], resume_from_steps=1000)
    assert (tmp_path / "progress.csv").read_text() == "total_steps,episode_return\n100,12.5\n200,25\n"


def test_resuming_without_a_file_begins_one(tmp_path):
    write_run(tmp_path, [300], resume_from_steps=200)
    assert (tmp_path / "progress.csv").read_text() == "total_steps,episode_return\n300,37.5\n"


def test_a_disk_that_fills_up_while_cutting_back_leaves_the_file_as_it_was(tmp_path):
    write_run(tmp_path, range(500))
    former = (tmp_path / "progress.csv").read_bytes()
    with disk_full_after(1000), pytest.raises(ConfigurationError, match="^log_directory=.*File too large"):
        Logger(tmp_path, total_steps=1000, quiet=True, resume_from_steps=400)
    assert (tmp_path / "progress.csv").read_bytes() == former


@pytest.mark.parametrize("text", ["time,loss\n1,2\n", "total_steps,loss\nmany,2\n", "total_steps,loss\n\n,\n"])
def test_a_foreign_file_is_not_continued(tmp_path, text):
    (tmp_path / "progress.csv").write_text(text)
    with pytest.raises(ConfigurationError, match="log_directory='.*'.*progress.csv") as caught:
        Logger(tmp_path, total_steps=1000, quiet=True, resume_from_steps=200)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "progress.csv").read_text() == text


@pytest.mark.parametrize("below", ["", "logs"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, below):
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / below
    with pytest.raises(ConfigurationError) as caught:
        Logger(directory, total_steps=1000)
    assert str(caught.value).startswith(f"log_directory={str(directory)!r} cannot be written (")
    assert "\n" not in str(caught.value)


def test_tensorboard_gets_every_known_number_in_its_group(tmp_path):
    log = Logger(tmp_path, total_steps=1000, quiet=True)
    log.log({"total_steps": 100, "episode_return": math.nan, "kl": 0.5, "time_rest": 0.25, "mine/x": 3, "mine": 4})
    log.log({"total_steps": 200, "episode_return": 7.0, "kl": 0.75})
    log.close()
    assert scalars(tmp_path) == {
        "charts/episode_return": [(200, 7.0)],
        "losses/kl": [(100, 0.5), (200, 0.75)],
        "time/rest": [(100, 0.25)],
        "mine/x": [(100, 3.0)],
        "charts/mine": [(100, 4.0)],
    }


def test_a_row_is_one_event_whatever_it_holds(tmp_path):
    with contextlib.closing(Logger(tmp_path, total_steps=1000, quiet=True)) as log:
        log.log({"total_steps": 100, "x": math.inf, "y": 1, "z": 2})
        log.log({"total_steps": 200, "x": math.nan})
    (path,) = tmp_path.glob("events.out*")
    events = list(EventFileLoader(str(path)).Load())
    assert [[value.tag for value in event.summary.value] for event in events if event.step == 100] == [
        ["charts/x", "charts/y", "charts/z"]
    ]
    assert scalars(tmp_path)["charts/x"] == [(100, math.inf)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends by it
def test_a_full_disk_is_told_and_the_rows_come_later(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=1000)
    with disk_full_after(1000):
        for steps in range(400):
            log.log({"total_steps": steps, "x": steps})
    assert "steps failed (File too large): training goes on" in capsys.readouterr().out
    for steps in (400, 401):  # the first one may still learn that TensorBoard's thread has ended
        log.log({"total_steps": steps, "x": steps})
    log.close()
    _, rows = read_progress(tmp_path / "progress.csv")
    assert [float(row["x"]) for row in rows] == list(range(402))
    assert scalars(tmp_path)["charts/x"][-1] == (401, 401.0)


@pytest.mark.parametrize("written", [0, 2])
def test_a_file_that_was_removed_begins_again_with_its_header(tmp_path, written):
    log = Logger(tmp_path, total_steps=100, quiet=True)
    for steps in range(written):
        log.log({"total_steps": steps, "x": steps})
    (tmp_path / "progress.csv").unlink()
    for steps in (2, 3):
        log.log({"total_steps": steps, "x": steps})
    log.close()
    assert (tmp_path / "progress.csv").read_text() == "total_steps,x\n2,2\n3,3\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends by it
def test_a_column_that_a_full_disk_kept_out_comes_later(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=100, quiet=True)
    log.log({"total_steps": 1, "x": 1})
    with disk_full_after(0):
        log.log({"total_steps": 2, "x": 2, "seldom": 5})
    log.log({"total_steps": 3, "x": 3})
    log.close()
    _, rows = read_progress(tmp_path / "progress.csv")
    assert [(row["x"], row["seldom"]) for row in rows] == [("1", "nan"), ("2", "5"), ("3", "nan")]


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path):
    write_run(tmp_path, [100, 200, 300, 400])
    write_run(tmp_path, [350], resume_from_steps=200)
    assert scalars(tmp_path) == {"charts/episode_return": [(100, 12.5), (200, 25.0), (350, 43.75)]}


def test_tensorboard_shows_the_newest_of_two_runs_in_a_directory(tmp_path):
    write_run(tmp_path, [100, 200, 300])
    time.sleep(1)  # TensorBoard sorts its files by the second, and within one as text: the tenth before the ninth
    write_run(tmp_path, [150])
    assert scalars(tmp_path) == {"charts/episode_return": [(150, 18.75)]}


def test_a_training_does_not_begin_by_loading_what_draws_at_its_end_or_for_rank_0():
    code = "import sys, ppo_mpi_base.ppo; sys.exit(bool({'torch.utils.tensorboard', 'matplotlib'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_terminal_the_first_and_the_last_row_are_lines(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 8, "episode_return": math.nan, "fps": 1234.4})
    log.log({"total_steps": 500, "episode_return": 1, "fps": 1})
    log.message("saved [bold]")
    log.log({"total_steps": 996, "episode_return": -20.75, "fps": 98765.4})
    log.close()
    log.close()
    first, message, last = capsys.readouterr().out.splitlines()
    assert first == "    8/1,000 steps   0%  return      -   1,234 FPS        - left"
    assert message == "saved [bold]"
    assert last == "  996/1,000 steps  99%  return -20.75  98,765 FPS  0:00:00 left"


def test_without_a_terminal_lines_come_at_most_once_in_an_interval(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logger_module, "PLAIN_INTERVAL", 0.2)
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 1})  # the first row imports TensorBoard, which may take a second
    started = time.monotonic()
    while time.monotonic() - started < 0.9:
        log.log({"total_steps": 1})
        time.sleep(0.01)
    log.close()
    assert 2 <= len(capsys.readouterr().out.splitlines()) <= 6  # 5, and the last


def test_the_time_left_does_not_count_the_start(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=60_400, resume_from_steps=50_000)
    time.sleep(1.0)
    log.log({"total_steps": 50_100})
    time.sleep(0.3)
    log.log({"total_steps": 50_400})
    log.close()
    minutes, seconds = re.findall(r"0:(\d\d):(\d\d) left", capsys.readouterr().out)[0]
    # 300 steps in 0.3 s, 10,000 to go: 10 s. With the start it would be 300 in 1.3 s, 43 s.
    assert 10 <= 60 * int(minutes) + int(seconds) <= 35


def test_more_steps_than_asked_are_100_percent(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 500})
    time.sleep(0.6)
    log.log({"total_steps": 100_000})
    log.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("100,000/1,000 steps 100%") and line.endswith("0:00:00 left")


@pytest.mark.parametrize(
    "value, text",
    [(0.01234, "0.01234"), (-20.75, "-20.75"), (499.96, "500"), (5234.7, "5,235"), (-1e6, "-1,000,000"), (0.0, "0")],
)
def test_returns_of_any_magnitude_are_readable(tmp_path, capsys, value, text):
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 1, "episode_return": value})
    log.close()
    assert f"return {text:>6}  " in capsys.readouterr().out


def test_output_that_a_full_disk_does_not_take_ends_no_run(tmp_path):
    script = f"""
from ppo_mpi_base.logger import Logger
from tests.test_logger import disk_full_after
log = Logger({str(tmp_path)!r}, total_steps=10)
with disk_full_after(10):
    log.message("more than ten letters")
    log.log({{"total_steps": 5}})
log.log({{"total_steps": 10}})
log.close()
"""
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, env=environment(), check=True, timeout=100)
    assert "10/10 steps 100%" in (tmp_path / "out").read_text()


def test_quiet_prints_nothing(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=1000, quiet=True)
    log.log({"total_steps": 1})
    log.message("hello")
    log.close()
    assert capsys.readouterr() == ("", "")
    log.message("no room left", failed=True)
    assert capsys.readouterr() == ("", "no room left\n")


class Terminal:
    """A pseudo-terminal of so many columns as sys.stdout; what was written to it is in `output`."""

    def __init__(self, monkeypatch, columns):
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self._stdout = io.TextIOWrapper(io.FileIO(slave, "w"), encoding="utf-8", write_through=True)
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", self._stdout)

    def _read(self):
        with contextlib.suppress(OSError):  # how Linux says that the other end was closed
            while data := os.read(self._master, 4096):
                self._bytes += data

    def wait_for(self, text):
        deadline = time.monotonic() + 10
        while text not in self._bytes.decode(errors="ignore"):
            assert time.monotonic() < deadline, f"{text!r} never came"
            time.sleep(0.01)
        return self._bytes.decode(errors="ignore")

    def output(self):
        self._stdout.close()
        self._reader.join()
        os.close(self._master)
        return self._bytes.decode()


def shown(output):
    """Return the lines that a terminal shows: of what was rewritten in place, the last."""
    lines = [re.split(r"\r\x1b\[2K", line)[-1] for line in output.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line).strip() for line in lines]


def test_on_a_terminal_there_is_one_live_line_below_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(logger_module, "LIVE_INTERVAL", 0.0)
    terminal = Terminal(monkeypatch, columns=100)
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 100})
    log.message("saved [bold] :warning:")
    log.log({"total_steps": 200, "episode_return": 3.5, "fps": 77})
    print("printed by the user")
    log.log({"total_steps": 996, "episode_return": 4.5, "fps": 88})
    log.close()
    log.close()
    log.message("after")
    output = terminal.output()
    assert "200/1,000" in output and "20%  return    3.5      77 FPS" in output
    first, second, live, after, end = shown(output)
    assert (first, second, after, end) == ("saved [bold] :warning:", "printed by the user", "after", "")
    assert re.fullmatch(r"996/1,000 ━+.* 99%  return    4.5      88 FPS  0:00:00 left", live)


def test_a_killed_run_leaves_the_cursor_visible(tmp_path, monkeypatch):
    terminal = Terminal(monkeypatch, columns=100)
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 100})
    so_far = terminal.wait_for(" 10%")
    log.close()
    terminal.output()
    assert so_far.rfind("\x1b[?25h") > so_far.rfind("\x1b[?25l")


def test_open_mpis_pseudo_terminal_without_columns_gets_plain_lines(tmp_path, monkeypatch):
    terminal = Terminal(monkeypatch, columns=0)
    log = Logger(tmp_path, total_steps=1000)
    log.log({"total_steps": 100})
    log.close()
    output = terminal.output()
    assert "\x1b" not in output and output.startswith("  100/1,000 steps  10%")
