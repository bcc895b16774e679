# SPDX-License-Identifier: MIT
"""Where a run's numbers go: progress.csv, TensorBoard and one line on the console."""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

from ppo_mpi_base import provenance
from ppo_mpi_base.errors import ConfigurationError, last_words
from ppo_mpi_base.files import set_aside, write_whole

LOSSES = {"policy_loss", "value_loss", "kl", "clip_fraction", "entropy", "explained_variance"}
PROGRESS, CURVE = "progress.csv", "learning_curve.png"
OF_A_RUN = PROGRESS, provenance.NAME, CURVE
LIVE_INTERVAL = 0.1  # seconds between two drawings of the live line: drawing takes a millisecond or two
PLAIN_INTERVAL = 5.0  # seconds between two printed lines without a terminal


class Logger:
    """Write each row of numbers to progress.csv, to TensorBoard and to the console; for rank 0 only.

    A former run's files in the same directory are renamed to progress.1.csv, settings.1.json, ..., and TensorBoard no
    longer shows that run: the directory always shows one run.

    Args:
        log_directory: created if missing; gets progress.csv and TensorBoard's event files.
        total_steps: agent steps over all ranks at which the run ends, for the percentage and the remaining time.
        quiet: print only failures.
        resume_from_steps: continue the run in this directory from the checkpoint taken at this total_steps; later rows
            are dropped, because they will be written again. None: begin a new run.

    Raises:
        ConfigurationError: log_directory cannot be written, or its progress.csv cannot be continued.
    """

    def __init__(
        self,
        log_directory: str | Path,
        total_steps: int,
        quiet: bool = False,
        resume_from_steps: int | None = None,
    ) -> None:
        directory = Path(log_directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resume_from_steps is None:
                _set_former_run_aside(directory)
            self._csv = _CsvFile(directory / PROGRESS, resume_from_steps)
            # TensorBoard then hides what earlier runs in this directory wrote from this step on.
            purge_step = 0 if resume_from_steps is None else resume_from_steps + 1
            self._tensorboard: SummaryWriter | None = _open_tensorboard(directory, purge_step)
        except OSError as error:
            raise ConfigurationError(
                f"log_directory={str(directory)!r} cannot be written ({error.strerror}): choose another directory"
            ) from error
        self._directory = directory
        self._console = None if quiet else _Console(int(total_steps), resume_from_steps or 0)

    def log(self, row: Mapping[str, SupportsFloat]) -> None:
        """Write one row; progress.csv has it when this returns.

        If the disk is full, a line says so, training goes on, and progress.csv gets the row with a later one.

        Args:
            row: scalars by name, NaN if unknown (TensorBoard gets no point, the console shows "-"). `total_steps` must
                be among them and is the x axis. A name that earlier rows lack becomes a new column, with NaN in those
                rows. TensorBoard groups names into charts/, losses/ and time/, unless they already contain a "/".
        """
        # Tensors and numpy scalars become numbers. Whole ones are written as integers: 2048, not 2048.0.
        numbers = {key: float(value) for key, value in row.items()}
        numbers = {key: int(value) if value.is_integer() else value for key, value in numbers.items()}
        try:
            self._csv.append(numbers)
            self._to_tensorboard(numbers)
        except OSError as error:
            self._tensorboard = None  # its thread may have ended; a later row opens another file
            self.message(f"logs at {numbers['total_steps']:,} steps failed ({error.strerror}): training goes on", True)
        if self._console:
            self._console.show(numbers)

    def sync(self) -> None:
        """Force progress.csv to the disk, before a checkpoint: a run resumed from it continues after these rows."""
        with contextlib.suppress(OSError):  # a failing disk is reported with the next row
            self._csv.sync()

    def _to_tensorboard(self, numbers: Mapping[str, float]) -> None:
        # Imported here, as in `_open_tensorboard`.
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        steps = int(numbers["total_steps"])
        self._tensorboard = self._tensorboard or _open_tensorboard(self._directory, steps)
        known = ((_tag(key), value) for key, value in numbers.items() if key != "total_steps" and not math.isnan(value))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in known])
        # One event for the row: with `add_scalar`, the points take seven times as long, while all ranks wait.
        events: Any = self._tensorboard.file_writer
        events.add_summary(summary, steps)

    def message(self, text: str, failed: bool = False) -> None:
        """Print a line above the live one; a quiet run prints only what has `failed`, to stderr."""
        if self._console:
            self._console.message(text)
        elif failed:
            last_words(f"{text}\n")

    def close(self) -> None:
        """Show the last row, release the terminal and close the files. Messages can follow, but no rows."""
        if self._console:
            self._console.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # reported already
                self._tensorboard.close()


def _set_former_run_aside(directory: Path) -> None:
    progress = directory / PROGRESS
    if progress.exists() and progress.stat().st_size == 0:
        progress.unlink()  # from a run that wrote no row
    set_aside(*(directory / name for name in OF_A_RUN))


def read_progress(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a progress.csv, even while a run writes it.

    Returns:
        The names of the columns, and the rows: the cells as written, by column. A last line without a newline is left
        out: a kill cut it off, or it is still being written.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))
        rows = list(reader)
    return list(reader.fieldnames or []), rows


class _CsvFile:
    """A CSV file that contains each row as soon as it is appended, and that can gain columns."""

    def __init__(self, path: Path, resume_from_steps: int | None) -> None:
        columns: list[str] = []
        rows: list[dict[str, str]] = []
        if resume_from_steps is not None and path.exists() and path.stat().st_size > 0:
            columns, rows = _read_up_to(path, resume_from_steps)
        self._path = path
        self._unwritten: list[Mapping[str, float]] = []
        self._rewrite(columns, rows)

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row, after those that could not be written before."""
        self._unwritten.append(row)
        new = [key for key in dict.fromkeys(itertools.chain(*self._unwritten)) if key not in self._columns]
        there = self._path.exists()  # someone may have removed it
        if new or len(self._unwritten) > 1 or not there:  # then the last line in the file may be torn
            before = read_progress(self._path)[1] if there else []
            self._rewrite(self._columns + new, [*before, *self._unwritten])
        else:
            with self._path.open("ab", buffering=0) as file:
                line = _text(self._columns, [row]).encode()
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten.clear()

    def sync(self) -> None:
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _rewrite(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        header = [dict(zip(columns, columns, strict=True))] if columns else []
        write_whole(self._path, _text(columns, [*header, *rows]).encode())
        self._columns = columns


def _text(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="nan", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _open_tensorboard(directory: Path, purge_step: int) -> SummaryWriter:
    # Imported here: it takes seconds, and every rank imports this module but only rank 0 needs a Logger.
    from torch.utils.tensorboard import SummaryWriter

    # Room for many rows, in case its thread lags: while the queue is full, all ranks wait. Flushed often: an MPI_Abort
    # ends the process at once, and loses what was not flushed.
    return SummaryWriter(str(directory), purge_step=purge_step, max_queue=200, flush_secs=10)


def _read_up_to(path: Path, total_steps: int) -> tuple[list[str], list[dict[str, str]]]:
    try:
        columns, rows = read_progress(path)
        return columns, [row for row in rows if float(row["total_steps"]) <= total_steps]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"log_directory={str(path.parent)!r} has a {path.name} that no run wrote, so no run can be continued "
            "there: choose another directory, or move that file away"
        ) from error


def _tag(key: str) -> str:
    """Return TensorBoard's name for a column; the part before the slash is its group of charts."""
    if "/" in key:
        return key
    if key.startswith("time_"):
        return key.replace("time_", "time/", 1)
    return f"losses/{key}" if key in LOSSES else f"charts/{key}"


class _Console:
    """One live line on a terminal, plain lines elsewhere, drawn at most once per interval."""

    def __init__(self, total_steps: int, steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None  # steps and time of the first row: the speed excludes start-up
        self._pending: Mapping[str, float] | None = None  # the last row, if not drawn yet
        self._drawn_at = -math.inf
        self._live = _live_line() if _is_terminal() else None
        if self._live:
            text_steps, text = self._describe({"total_steps": steps})
            self._task = self._live.add_task(text, total=total_steps, completed=steps, steps=text_steps)
            self._live.start()
            # Rich hides the cursor until stop(), which a killed run never reaches.
            self._live.console.show_cursor(True)

    def show(self, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._first = self._first or (int(row["total_steps"]), now)
        self._pending = row
        if now - self._drawn_at >= (LIVE_INTERVAL if self._live else PLAIN_INTERVAL):
            self._drawn_at = now
            self._draw()

    def message(self, text: str) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._live.console.print(Text(text), soft_wrap=True)  # Text: its brackets are not markup
        else:
            _print(text)

    def close(self) -> None:
        self._draw()
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()

    def _draw(self) -> None:
        if self._pending is None:
            return
        steps, text = self._describe(self._pending)
        if self._live:
            completed = self._pending["total_steps"]
            with contextlib.suppress(OSError):
                self._live.update(self._task, completed=completed, steps=steps, description=text, refresh=True)
        else:
            _print(f"{steps} steps {text}")
        self._pending = None

    def _describe(self, row: Mapping[str, float]) -> tuple[str, str]:
        """Return the texts before and after the bar."""
        steps = int(row["total_steps"])
        percent = min(100, 100 * steps // self._total_steps)  # rounded down: 100% means the end
        episode_return = _number(row.get("episode_return", math.nan))
        fps = _number(row.get("fps", math.nan), whole=True)
        left = self._time_left(steps)
        total = f"{self._total_steps:,}"
        return (
            f"{steps:>{len(total)},}/{total}",
            f"{percent:3}%  return {episode_return:>6}  {fps:>6} FPS  {left:>7} left",
        )

    def _time_left(self, steps: int) -> str:
        first_steps, first_time = self._first or (steps, 0.0)
        if steps <= first_steps:
            return "-"
        seconds_per_step = (time.monotonic() - first_time) / (steps - first_steps)
        return str(datetime.timedelta(seconds=round(seconds_per_step * max(0, self._total_steps - steps))))


def _print(text: str) -> None:
    """Print a line at once, because mpiexec gives us a pipe; drop it if the output is a file on a full disk."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _is_terminal() -> bool:
    # Open MPI runs each rank on a pseudo-terminal of its own, even if the output then goes to a file. That terminal has
    # 0 columns; without the check, log files would fill with escape codes.
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return os.get_terminal_size(sys.stdout.fileno()).columns > 0


def _live_line() -> Progress:
    return Progress(
        TextColumn("{task.fields[steps]}"),
        BarColumn(bar_width=None, table_column=Column(max_width=40)),
        TextColumn("{task.description}"),
        auto_refresh=False,  # drawn when there is something new; a thread would take the interpreter from the training
        # The user's prints appear above the line. Errors that go to a file must still go there.
        redirect_stderr=sys.stderr.isatty(),
    )


def _number(value: float, whole: bool = False) -> str:
    """Format a number of any magnitude in about 5 characters."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if whole or abs(value) >= 1000 else f"{value:.4g}"
