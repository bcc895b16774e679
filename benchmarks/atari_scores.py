# SPDX-License-Identifier: MIT
"""Train games with `ppo-mpi train`, and compare them with the PPO paper's scores.

`python -m benchmarks.atari_scores` trains one at a time, on two ranks. To train seeds in parallel, start it once
per core: under `taskset -c 0` with `--only Pong --ranks 1 --seeds 1`, and so on. Ctrl-C stops it within an iteration;
the same command continues from there. Finished runs leave their progress.csv and run.toml in `results/atari/`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT, launcher, train_and_keep, write_and_draw
from ppo_mpi_base.runs import read_run

RESULTS = ROOT / "results" / "atari"


@dataclass(frozen=True)
class Game:
    """Agent steps, number of seeds, and the score to reach."""

    steps: int
    seeds: int
    target: float


# Pong's score is near the highest possible, the others are the paper's after 10M steps.
GAMES = {
    "Pong": Game(3_000_000, 4, 20.0),
    "Breakout": Game(9_000_000, 1, 274.8),
    "Seaquest": Game(9_000_000, 1, 1204.5),
    "SpaceInvaders": Game(8_000_000, 1, 942.5),
}


def place(game: str, seed: int) -> Path:
    """Return where a finished run's progress.csv is kept."""
    return RESULTS / f"{game}-v5" / f"seed{seed}.csv"


def train(game: str, seed: int, ranks: int, precision: str) -> None:
    """Train a game, or resume it, and keep its log. Ends this script if the run was stopped."""
    print(f"{game}, seed {seed}", flush=True)
    flags = ["--total-steps", str(GAMES[game].steps), "--seed", str(seed), "--precision", precision]
    train_and_keep(place(game, seed), [f"ALE/{game}-v5", *flags], launcher(ranks))


def tabulate() -> None:
    """Write the table of all existing results, and draw their curves."""
    header = ["game", "seed", "last_return", "best_return", "to_reach", "steps", "seconds"]
    rows = []
    for game, known in GAMES.items():
        for seed in range(known.seeds):
            if place(game, seed).exists() and (run := read_run(place(game, seed))) is not None:
                scores = (f"{score:.2f}" for score in (run.score, run.values.max(), known.target))
                rows.append([game, str(seed), *scores, f"{run.steps[-1]:.0f}", f"{run.seconds[-1]:.0f}"])
    if rows:
        write_and_draw(RESULTS, [header, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GAMES, default=list(GAMES), metavar="GAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="of those that a game has; default: all")
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 4, 8], help="that share 8 games")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    seeds = {game: arguments.seeds or range(GAMES[game].seeds) for game in arguments.only}
    for game, chosen in seeds.items():  # before the first game trains for hours
        if unknown := set(chosen).difference(range(GAMES[game].seeds)):
            parser.error(f"--seeds {min(unknown)}: {game} has seeds 0 to {GAMES[game].seeds - 1}")
    for game, chosen in seeds.items():
        for seed in chosen:
            if not place(game, seed).exists():
                train(game, seed, arguments.ranks, arguments.precision)
    tabulate()


if __name__ == "__main__":
    main()
