# SPDX-License-Identifier: MIT
"""Measure training speed side by side with other libraries: `make bench`, or `python -m benchmarks.run --rounds 5`.

Each contestant is a program in `contestants/` that warms up, measures, and ends with one line of JSON. All take turns,
so that drift of the machine affects all alike; medians count. Peers are installed into `.venv-bench/`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import PEERS, ROOT, install, python_of
from benchmarks.results import launcher
from ppo_mpi_base.threads import processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ROOT / "runs" / "bench"
LONGEST = 300  # seconds a contestant may take


@dataclass(frozen=True)
class Contestant:
    """A program of `contestants/` with its arguments, on some ranks, in a peer's environment or in ours."""

    label: str
    arguments: str
    ranks: int = 1
    peer: str | None = None

    def command(self, seconds: float) -> list[str]:
        """Return the command line."""
        python = python_of(self.peer) if self.peer else Path(sys.executable)
        program, *arguments = self.arguments.split()
        program = f"benchmarks.contestants.{program}"
        return [*launcher(self.ranks), str(python), "-m", program, *arguments, "--seconds", str(seconds)]


ALL = {
    "environments": Contestant("environments alone, 2 processes of 8", "environments"),
    "environments_1": Contestant("environments alone, 1 process of 8", "environments --processes 1"),
    "paper": Contestant("ours, paper's setting, 2 ranks", "ours --setting paper", ranks=2),
    "paper_1_rank": Contestant("ours, paper's setting, 1 rank, same load", "ours --setting paper"),
    "paper_eager": Contestant("ours, paper's setting, 2 ranks, eager", "ours --setting paper --eager", ranks=2),
    "throughput": Contestant("ours, throughput setting, 2 ranks", "ours --setting throughput", ranks=2),
    "throughput_1_rank": Contestant("ours, throughput setting, 1 rank, same load", "ours --setting throughput"),
    "predecessor": Contestant("the predecessor's design, 2 ranks", "predecessor", ranks=2),
    "sb3_8": Contestant(
        "Stable-Baselines3, 8 environments", "stable_baselines stable_baselines3", peer="stable_baselines3"
    ),
    "sb3_1": Contestant(
        "Stable-Baselines3, 1 environment",
        "stable_baselines stable_baselines3 --environments 1",
        peer="stable_baselines3",
    ),
    "sbx_8": Contestant("SBX, 8 environments", "stable_baselines sbx", peer="sbx"),
    "sample_factory": Contestant("Sample Factory, 16 environments", "factory", peer="sample_factory"),
    "pong": Contestant("ours, Pong, 8 games, 2 ranks", "atari", ranks=2),
    "pong_bfloat16": Contestant("ours, Pong, 8 games, 2 ranks, bfloat16", "atari --precision bfloat16", ranks=2),
    "pong_sb3": Contestant("Stable-Baselines3, Pong, 8 games", "atari_stable_baselines", peer="stable_baselines3"),
}


@dataclass(frozen=True)
class Target:
    """A ratio of two contestants' speeds that should be reached or, without a target, that explains another."""

    text: str
    of: str
    to: str
    target: float | None = None


TARGETS = [
    Target("paper's setting / Stable-Baselines3, 8 environments", "paper", "sb3_8", 5),
    Target("paper's setting / Stable-Baselines3, 1 environment", "paper", "sb3_1", 10),
    Target("paper's setting / SBX, 8 environments", "paper", "sbx_8", 4),
    Target("paper's setting / the predecessor's design", "paper", "predecessor", 6.5),
    Target("paper's setting / environments alone", "paper", "environments", 0.38),
    Target("throughput setting / environments alone", "throughput", "environments", 0.7),
    Target("throughput setting / Sample Factory", "throughput", "sample_factory", 4.5),
    Target("two ranks / one rank, same load per rank, paper's setting", "paper", "paper_1_rank", 1.9),
    Target("two ranks / one rank, the throughput setting", "throughput", "throughput_1_rank", 1.9),
    Target("  two processes / one, environments alone", "environments", "environments_1"),
    Target("Pong: ours in bfloat16 / Stable-Baselines3", "pong_bfloat16", "pong_sb3", 5),
    Target("  Pong: ours in float32 / Stable-Baselines3", "pong", "pong_sb3"),
]
COMMUNICATION = {
    "paper": "communication / update, paper's setting (at most)",
    "throughput": "communication / update, the throughput setting (at most)",
}
MOST_COMMUNICATION = 0.1  # of the time of an update, not counting the wait for the other rank

Figures = dict[str, float]
Rounds = Mapping[str, list[Figures | None]]
"""Measurements of each contestant, round by round; None where it failed."""


def measure(contestant: Contestant, seconds: float) -> Figures | None:
    """Run a contestant once; return its figures and memory, or print in one line how it failed."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            contestant.command(seconds),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
            cwd=ROOT,
            start_new_session=True,
        )
        peaks: dict[int, float] = {}
        try:
            limit = time.monotonic() + LONGEST
            while process.poll() is None and time.monotonic() < limit:
                peaks.update(memory(process.pid))
                time.sleep(0.5)
        finally:
            if failed := process.poll() != 0:
                end_group(process)
        output.seek(0)
        lines = output.read().splitlines()
    found = next((line for line in reversed(lines) if line.startswith('{"steps_per_second"')), None)
    if failed or found is None:
        print(f"{contestant.label} failed: {lines[-1] if lines else 'no output'}", flush=True)
        return None
    return {**json.loads(found), "peak_rss_mb": max(peaks.values(), default=float("nan"))}


def end_group(process: subprocess.Popen) -> None:
    """End a contestant and all processes it started: first so that they can clean up, then by force."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sent)
            process.wait(10)


def memory(process: int) -> dict[int, float]:
    """Return the peak resident memory so far, in MB, of a process and all its descendants; Linux only."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        started = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return {}
    peak = next((float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
    peaks = {} if peak is None else {process: peak}
    for child in started:
        peaks.update(memory(int(child)))
    return peaks


def medians(measured: Rounds) -> dict[str, Figures]:
    """Return the median of each figure of each contestant that was measured."""
    found = {name: [figures for figures in rounds if figures] for name, rounds in measured.items()}
    return {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for name, rounds in found.items()
        if rounds
    }


def ratios(of: list[Figures | None], to: list[Figures | None]) -> list[float]:
    """Return the ratio of two contestants' speeds in each round that both finished."""
    return [x["steps_per_second"] / y["steps_per_second"] for x, y in zip(of, to, strict=True) if x and y]


def table(measured: Rounds) -> list[dict[str, str]]:
    """Return a row for each target with both sides measured.

    The median of the rounds' ratios counts, since a shared machine may drift, but hardly within a round.
    """
    median, rows = medians(measured), []
    for target in TARGETS:
        sides = [measured[name] for name in (target.of, target.to) if name in measured]
        if len(sides) == 2 and (each := ratios(*sides)):
            of, to = (f"{median[name]['steps_per_second']:.0f}" for name in (target.of, target.to))
            rows.append(_row(target.text, of, to, each, target.target, lambda ratio, least: ratio >= least))
    for name, text in COMMUNICATION.items():
        if name in median:
            parts = [figures["communication_of_update"] for figures in measured[name] if figures]
            rows.append(_row(text, "", "", parts, MOST_COMMUNICATION, lambda part, most: part < most))
    return rows


def _row(
    text: str, of: str, to: str, each: list[float], target: float | None, reaches: Callable[[float, float], bool]
) -> dict[str, str]:
    ratio = statistics.median(each)
    verdict = "" if target is None else "yes" if reaches(ratio, target) else "NO"
    figures = {"steps_per_second": of, "other": to, "ratio": f"{ratio:.3g}", "rounds": _listed(each)}
    return {"comparison": text, **figures, "target": "" if target is None else f"{target:g}", "reached": verdict}


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def show(median: Mapping[str, Figures], rows: list[dict[str, str]]) -> None:
    """Print speeds and memory, then the table of ratios."""
    print(f"\n{'':46}{'steps/s':>9}{'peak MB of a process':>22}")
    for name, figures in median.items():
        print(f"{ALL[name].label:46}{figures['steps_per_second']:9.0f}{figures['peak_rss_mb']:22.0f}")
    print(f"\n{'':56}{'ratio':>8}{'target':>8}  {'reached':9}each round")
    for row in rows:
        print(f"{row['comparison']:56}{row['ratio']:>8}{row['target']:>8}  {row['reached']:9}{row['rounds']}")


def write(directory: Path, measured: Rounds, median: Mapping[str, Figures], rows: list[dict[str, str]]) -> None:
    """Write ratios as CSV, all measurements as JSON, and the picture."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "speed.csv").open("w", newline="") as file:
        columns = ["comparison", "steps_per_second", "other", "ratio", "target", "reached", "rounds"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}",
        "instructions": _instructions(),
        "versions": {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy", "mpi4py")},
        "peers": PEERS,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "measured": measured,
    }
    (directory / "speed.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(directory / "speed.png", measured, median, rows)
    print(f"\n{directory}/speed.csv, .json and .png")


def _instructions() -> str:
    """Return which instructions torch uses here, such as "AVX512", and whether some are for bfloat16."""
    import torch

    from ppo_mpi_base.policies import lacks_bfloat16

    slow = lacks_bfloat16(torch.device("cpu"))
    return f"{torch.backends.cpu.get_cpu_capability()}, {'no bfloat16' if slow else 'bfloat16'}"


def draw(path: Path, measured: Rounds, median: Mapping[str, Figures], rows: list[dict[str, str]]) -> None:
    """Draw a bar for each contestant, with a dot for each round, beside the table of ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = sorted(median, key=lambda name: median[name]["steps_per_second"])
    pong = [name for name in order if name.startswith("pong")]
    others = [name for name in order if name not in pong]
    tasks = {task: names for task, names in (("HalfCheetah", others), ("Pong", pong)) if names}
    figure = plt.figure(figsize=(15, 5.2), layout="constrained")
    heights = [len(names) + 1 for names in tasks.values()]
    grid = figure.add_gridspec(len(tasks), 2, width_ratios=[1.1, 1], height_ratios=heights)
    for place, (task, names) in enumerate(tasks.items()):
        _draw_bars(figure.add_subplot(grid[place, 0]), task, names, measured, median)
    text = figure.add_subplot(grid[:, 1])
    text.axis("off")
    if rows:
        cells = [[row["comparison"], row["ratio"], row["target"], row["reached"]] for row in rows]
        drawn = text.table(
            cells,
            colLabels=["", "ratio", "target", "reached"],
            colWidths=[0.74, 0.09, 0.09, 0.11],
            cellLoc="left",
            loc="center",
            edges="horizontal",
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(9)
        drawn.scale(1, 1.6)
        for (_, column), cell in drawn.get_celld().items():
            cell.PAD = 0.1 if column else 0.02  # a fraction of the column's width, and the first is wide
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Axes, task: str, names: list[str], measured: Rounds, median: Mapping[str, Figures]) -> None:
    """Draw the bars of one task, on a scale of its own."""
    for place, name in enumerate(names):
        ours = ALL[name].label.startswith("ours")
        axes.barh(place, median[name]["steps_per_second"], color="tab:blue" if ours else "0.75")
        speeds = [figures["steps_per_second"] for figures in measured[name] if figures]
        axes.plot(speeds, [place] * len(speeds), "k.", markersize=3)
    axes.set_yticks(range(len(names)), [ALL[name].label for name in names])
    axes.set_xlabel(f"{task}, steps/s on two cores")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each contestant, of which the median counts"
    )
    parser.add_argument("--seconds", type=float, default=12, help="seconds a measurement, after the warm-up")
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=f"some of: {' '.join(ALL)}")
    parser.add_argument("--skip-peers", action="store_true", help="leave out what has to be installed")
    arguments = parser.parse_args()
    chosen = arguments.only or list(ALL)
    needed = dict.fromkeys(peer for name in chosen if (peer := ALL[name].peer))
    installed = {peer for peer in needed if not arguments.skip_peers and install(peer)}
    measured: dict[str, list[Figures | None]] = {
        name: [] for name in ALL if name in chosen and (ALL[name].peer is None or ALL[name].peer in installed)
    }
    for number in range(1, arguments.rounds + 1):
        for name, figures in measured.items():
            figures.append(found := measure(ALL[name], arguments.seconds))
            if found is not None:
                speed = found["steps_per_second"]
                print(f"round {number} of {arguments.rounds}  {ALL[name].label:46}{speed:9.0f} steps/s", flush=True)
    median = medians(measured)
    if not median:
        sys.exit("nothing was measured")
    rows = table(measured)
    show(median, rows)
    # A partial measurement does not replace a complete one.
    write(RESULTS if set(median) == set(ALL) else PARTS, measured, median, rows)


if __name__ == "__main__":
    main()
