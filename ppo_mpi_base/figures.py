# SPDX-License-Identifier: MIT
"""What all figures share: colours and markers that differ even in greyscale, axes, legend, note, and saving."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ppo_mpi_base.comparison import References
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import write_output

BLUE = "#0072B2"  # from Okabe and Ito's palette, whose colours differ to readers with any colour vision
DARK, LIGHT = "#333333", "#E5E5E5"
# That palette, dark next to light, so neighbours differ in greyscale too; without its yellow, too pale for lines.
COLORS = (BLUE, "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2.5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TIME_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


@contextmanager
def open_figure(size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure of this size in inches, to be drawn and saved inside the context."""
    # Figure instead of pyplot.figure: it needs no display, and the user's own figures and backend stay as they are.
    # Text stays text in PDF and SVG files: journals refuse Matplotlib's default Type 3 fonts.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        yield Figure(figsize=size, layout="constrained")


def save_figure(figure: Figure, path: Path, argument: str, dpi: int) -> None:
    """Write a figure in the format of the path's ending; an error names the argument that gave the path."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=dpi, format=path.suffix[1:] or "png")
    except ValueError as error:  # the ending is not a format
        raise ConfigurationError(f"{argument}={str(path)!r} cannot be written ({error})") from error
    write_output(argument, path, picture.getvalue())


def save_png_and_svg(figure: Figure, output: Path) -> list[Path]:
    """Write a figure in both formats, and return the paths."""
    paths = [output.with_name(output.name + ending) for ending in (".png", ".svg")]
    for path in paths:
        save_figure(figure, path, "output", dpi=300)
    return paths


def label_steps(axes: Axes, largest: float, ticks: int) -> None:
    """Label the x axis with agent steps up to the largest, with about this many ticks."""
    axes.set_xlim(0, largest)
    axes.set_xlabel("Agent steps", color=DARK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands_or_millions(largest)))


def label_time(axes: Axes, largest: float, ticks: int) -> None:
    """Label the x axis, in seconds up to the largest, with the unit that suits them."""
    size, unit = next((size, unit) for size, unit in TIME_UNITS if largest >= 2 * size or size == 1)
    axes.set_xlim(0, largest)
    axes.set_xlabel(f"Wall-clock time ({unit})", color=DARK)
    locator = MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10])
    axes.set_xticks([tick * size for tick in locator.tick_values(0, largest / size) if tick * size <= largest])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))


def style_axes(axes: Axes) -> None:
    """Draw a light grid, a bottom line and nothing else around the curves."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")))
    axes.grid(color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=DARK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(DARK)


def _thousands_or_millions(largest: float) -> Callable[[float, int], str]:
    """Return a tick formatter: one unit for the whole axis, chosen by its largest value."""
    size, unit = next((size, unit) for size, unit in [(1e9, "B"), (1e6, "M"), (1e3, "k"), (0.0, "")] if largest >= size)
    return lambda value, _: f"{value / (size or 1.0):g}{unit if value else ''}"


def look(number: int) -> dict[str, Any]:
    """Return a group's colour, dashes and marker by its number; no two of the first 35 are alike."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        "linewidth": 1.5,
    }


def shrink_text(axes: Axes) -> None:
    """Make the text of one of several panels smaller."""
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)


def draw_legend(figure: Figure, labels: Sequence[str], seeds: Sequence[Sequence[int]], joined: bool = True) -> None:
    """Draw a legend above the panels: each group's look, name and number of seeds."""
    handles = [Line2D([], [], **{**look(n), **({} if joined else {"linestyle": "none"})}) for n in range(len(labels))]
    texts = [f"{plain_text(label)} ({_seeds(counts)})" for label, counts in zip(labels, seeds, strict=True)]
    letter, line = 0.065, 0.65  # inches
    texts = [textwrap.fill(text, int((figure.get_figwidth() - line) / letter)) for text in texts]
    longest = max(len(row) for text in texts for row in text.splitlines())
    width = figure.get_figwidth() / (letter * longest + line)
    figure.legend(
        handles,
        texts,
        loc="outside upper center",
        ncols=max(1, min(len(texts), int(width))),
        frameon=False,
        fontsize=8,
        handlelength=3.2 if joined else 1.5,
    )


def _seeds(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' * (low > 1)}" if low == high else f"{low}\N{EN DASH}{high} seeds"


def plain_text(label: str) -> str:
    """Keep Matplotlib from reading a label as a formula."""
    return label.replace("$", r"\$")


def draw_note(figure: Figure, text: str, normalized: bool, references: References | None) -> None:
    """Write below the panels what they show, so that the picture can stand alone."""
    if normalized and references is None:
        text += " Normalized by task: 0 is the lowest initial return, 1 the highest score."
    elif normalized:
        text += " Normalized: 0 and 1 are the given reference scores."
    wide = int(figure.get_figwidth() * 17)  # letters
    figure.supxlabel(textwrap.fill(text, wide), fontsize=7, color=DARK)
