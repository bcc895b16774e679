# SPDX-License-Identifier: MIT
"""The learning curve of a run, drawn from its progress.csv."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import write_whole
from ppo_mpi_base.logger import read_progress

BLUE = "#0072B2"  # of Okabe and Ito's palette: told from its other colours by readers of any colour vision
DARK, LIGHT = "#333333", "#E5E5E5"
FEW = 30  # up to so many points get dots: the line between two of them was not measured


def learning_curve(csv_path: str | Path, png_path: str | Path) -> Path:
    """Draw the episode return against the agent steps, unsmoothed: each row of the file is a point of the curve.

    Rows without a return (NaN: no episode has ended yet) are left blank. Where no row has one, the figure says so.

    Args:
        csv_path: a progress.csv with the columns total_steps and episode_return; a run may be writing it.
        png_path: the file to write, whole or not at all. Its ending chooses the format; papers want .pdf.

    Returns:
        The path of the figure.

    Raises:
        ConfigurationError: csv_path cannot be read or lacks a column, or png_path cannot be written.
    """
    steps, returns = _read(Path(csv_path))
    path = Path(png_path)
    # Figure instead of pyplot.figure: it needs no display, and the user's own figures and backend stay as they are.
    # Text stays text in PDF and SVG files: journals refuse Matplotlib's default Type 3 fonts.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        _draw(figure.add_subplot(), steps, returns)
        picture = io.BytesIO()
        try:
            figure.savefig(picture, dpi=200, format=path.suffix[1:] or "png")
            write_whole(path, picture.getvalue())
        except (OSError, ValueError) as error:  # ValueError: an ending that is no format
            raise ConfigurationError(f"png_path={str(path)!r} cannot be written ({error})") from error
    return path


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and returns, each (rows,) float64, with NaN for whatever return is not finite."""
    try:
        _, rows = read_progress(path)
        table = np.array([(row["total_steps"], row["episode_return"]) for row in rows], dtype=np.float64)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"csv_path={str(path)!r} is no progress.csv with numbers under total_steps and episode_return ({error!r})"
        ) from error
    steps, returns = table.reshape(-1, 2).T
    return steps, np.where(np.isfinite(returns), returns, np.nan)


def _draw(axes: Axes, steps: np.ndarray, returns: np.ndarray) -> None:
    known = np.isfinite(returns)
    padded = np.pad(known, 1)
    beside_known = padded[:-2] | padded[2:]
    dots = known & (~beside_known | (known.sum() <= FEW))  # a point between gaps has no line, and would not be seen
    (curve,) = axes.plot(steps, returns, color=BLUE, linewidth=1.4, marker="o", markersize=3.5, clip_on=False)
    curve.set_markevery(np.flatnonzero(dots).tolist())
    axes.set_xlim(0, steps.max(initial=1.0))
    axes.set_xlabel("Agent steps", color=DARK)
    axes.set_ylabel("Episode return (mean of last 100)", color=DARK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands_or_millions(steps.max(initial=1.0))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")))
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=DARK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(DARK)
    if not known.any():
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no episode has ended yet", color=DARK, ha="center", va="center", transform=axes.transAxes)


def _thousands_or_millions(largest: float) -> Callable[[float, int], str]:
    """Return what labels a tick: one unit for the whole axis, fit for its largest value."""
    size, unit = next((size, unit) for size, unit in [(1e9, "B"), (1e6, "M"), (1e3, "k"), (0.0, "")] if largest >= size)
    return lambda value, _: f"{value / (size or 1.0):g}{unit if value else ''}"
