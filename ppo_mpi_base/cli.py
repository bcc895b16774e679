# SPDX-License-Identifier: MIT
"""The command `ppo-mpi`, also `python -m ppo_mpi_base`: train, evaluate, plot, compare, video and export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"ppo-mpi: {missing.name} is missing: pip install -e '.[cli]' in this package's clone"
    ) from missing

from ppo_mpi_base import run_file, settings, tasks
from ppo_mpi_base.builders import checked_together
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.evaluate import evaluate as evaluate_policy
from ppo_mpi_base.export import export_policy
from ppo_mpi_base.failing import fail_together
from ppo_mpi_base.files import check_name, hold, without_ending, write_output
from ppo_mpi_base.mpi import world
from ppo_mpi_base.plot import COMPARED, compare_runs, plot_runs
from ppo_mpi_base.ppo import PPO
from ppo_mpi_base.runs import RETURN
from ppo_mpi_base.saved_policy import load_actor_critic
from ppo_mpi_base.video import record_video

DESCRIPTION = """Proximal policy optimization: train, evaluate, compare and export policies.

`mpiexec -n 8 ppo-mpi train ...` trains on 8 ranks."""
Run = Annotated[Path, Positional, arg(metavar="RUN", help="A run's directory.")]
Runs = Annotated[tuple[Path, ...], arg(metavar="RUN", help="Run directories, or directories with several seeds' runs.")]
Against = Annotated[
    tuple[Path, ...], arg(metavar="RUN", help='Runs of the other idea, after "--", which stands for this flag.')
]
Which = Annotated[Literal["best", "latest"], arg(help="The networks with the best mean return, or the latest.")]
TELL_EVERY = 5.0
"""Seconds between progress lines of an evaluation."""
_usual_format = warnings.formatwarning
EnvId = Annotated[str | None, arg(help="The environment's Gymnasium id, for a run that `ppo-mpi train` did not make.")]


def command() -> None:
    """Run the command with the arguments of the process, and report an error in them in one line."""
    warnings.formatwarning = _one_line
    sys.path.insert(0, "")  # like `python -m ppo_mpi_base`, for ids such as my_module:Mine-v0
    try:
        main()
    except ConfigurationError as error:
        raise SystemExit(f"ppo-mpi: {error}") from error


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning: one of this package without its place in the code, which means nothing to the user."""
    if Path(filename).parent == Path(__file__).parent:
        return f"ppo-mpi: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process.

    Raises:
        ConfigurationError: an argument is invalid, or does not fit the files it names.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    separators = sum(word.split("=")[0] in ("--", "--against") for word in given)
    if given[:1] == ["compare"] and separators != 1 and not {"-h", "--help"} & set(given):
        raise ConfigurationError(
            "compare: give two groups of runs with one -- between them: ppo-mpi compare RUN_A... -- RUN_B..."
        )
    ranks = world()
    ended: SystemExit | None = None
    with fail_together(ranks):
        if given[:1] == ["train"]:
            settings.check_flags(given)
        defaults = settings.for_run(_named(given), ranks.size, settings.env_kwargs_of(given))
        if ranks.is_root:
            _tell_other_ranks(_named(given), ranks.size)
        commands: dict[str, Callable[..., Any]] = {
            "train": settings.flags(defaults),
            "evaluate": evaluate,
            **{function.__name__: _on_rank_0(function) for function in (plot, compare, video, export)},
        }
        try:
            with warnings.catch_warnings():
                # About defaults from a TOML file, such as 100.0 for a whole number: `Config` checks them.
                warnings.filterwarnings("ignore", module=r"tyro\b")
                chosen = tyro.extras.subcommand_cli_from_dict(
                    commands,
                    prog="ppo-mpi",
                    description=DESCRIPTION,
                    args=["--against" if word == "--" else word for word in given],
                    console_outputs=ranks.is_root,
                )
        except SystemExit as leaving:  # help, or a wrong flag: rank 0 has said why, and all ranks exit
            ended = leaving
    if ended is not None:
        ranks.barrier()
        sys.exit(ended.code)
    if chosen is not None:
        train({**dataclasses.asdict(chosen), "env_id": defaults["env_id"]})


def _named(arguments: list[str]) -> str:
    """Return the id or file given to `train`, which decides the defaults of its flags."""
    if arguments[:1] != ["train"] or len(arguments) < 2 or {"-h", "--help"} & set(arguments[1:2]):
        return "CartPole-v1"  # shown by `train --help`
    if arguments[1].startswith("-"):
        raise ConfigurationError(
            "train: the environment comes before all flags, as in ppo-mpi train CartPole-v1 --seed 1"
        )
    return arguments[1]


def _tell_other_ranks(env_id_or_file: str, ranks: int) -> None:
    """Print a note if a file's run had a different number of ranks, since its settings are per rank."""
    before = run_file.ranks_of(Path(env_id_or_file)) if env_id_or_file.endswith(".toml") else None
    if before is not None and before != ranks:
        print(
            f"ppo-mpi: the run of {env_id_or_file} had {before} rank{'s' * (before > 1)}, this one has {ranks}; "
            "environments and minibatches are set per rank, so it is not the same run",
            file=sys.stderr,
            flush=True,
        )


def train(chosen: dict[str, Any]) -> None:
    """Train with settings as returned by `settings.for_run`. Collective: call on all ranks."""
    ranks = world()

    def prepare() -> tuple[Path, dict[str, Any]]:
        settings.check_own(chosen)
        directory = Path(chosen["directory"] or f"runs/{chosen['env_id']}/seed{chosen['seed']}")
        keywords = {
            **tasks.functions(chosen["env_id"], chosen["hidden"]),
            "log_directory": str(directory / "logs"),
            "save_location": str(directory / "saved_model"),
            **{name: value for name, value in chosen.items() if name not in settings.OWN and name != "env_id"},
        }
        Config(**keywords)
        if ranks.is_root:
            hold("directory", str(directory), held)
        return directory, keywords

    with contextlib.ExitStack() as held:
        with fail_together(ranks):
            directory, keywords = checked_together(ranks, prepare)
        PPO(**keywords, hooks=[run_file.KeepRunFile(directory / run_file.NAME, chosen)])


def evaluate(
    run: Run,
    episodes: int = 100,
    which: Which = "best",
    sampled: bool = False,
    seed: int = 0,
    env_id: EnvId = None,
    output: Path | None = None,
) -> None:
    """Play episodes with a run's policy in fresh environments, with frozen normalization.

    Args:
        run: A run's directory.
        episodes: Number of episodes, divided among the ranks; the result is the same for any number of ranks.
        which: The networks that earned the best return, or the last ones.
        sampled: Sample actions from the policy instead of taking the most probable one.
        seed: Seed of environments and actions.
        env_id: The environment's Gymnasium id, for a run that `ppo-mpi train` did not make.
        output: The JSON file to write. None: evaluation.json in the run's directory.
    """
    ranks, path = world(), output or run / run_file.EVALUATION
    check_name("output", path)
    saved = _saved(run)
    env_fn, max_ep_len = _environment(run, env_id)
    loaded = load_actor_critic(saved, which)
    loaded.check_hook(None)
    result = evaluate_policy(
        loaded.actor_critic,
        env_fn,
        episodes=episodes,
        seed=seed,
        deterministic=not sampled,
        max_ep_len=max_ep_len,
        ranks=ranks,
        progress=_telling(episodes) if ranks.is_root else None,
    )
    if ranks.is_root:
        print(f"{result}   {path}", flush=True)  # first, so that it is shown even if the file cannot be written
        write_output("output", path, json.dumps({"which": loaded.which, **result.as_dict()}, indent=1).encode())


def plot(
    runs: Annotated[Runs, Positional],
    output: Path = Path("curves"),
    labels: tuple[str, ...] = (),
    axis: Literal["steps", "time"] = "steps",
    column: str = RETURN,
) -> None:
    """Draw learning curves as PNG and SVG: a line for each RUN, with the 95% interval over its seeds.

    Args:
        runs: Directories of runs, or directories with the runs of several seeds.
        output: Path of the pictures, without the ending.
        labels: A name for each RUN; by default, the end of its path, or the directory of several.
        axis: Agent steps, or wall-clock time.
        column: The column of progress.csv to draw, such as kl, entropy or fps.
    """
    if not runs:
        raise ConfigurationError("RUN: name a run's directory, or several: ppo-mpi plot runs/CartPole-v1/seed0")
    _tell_files(plot_runs(runs, output, labels=labels or None, axis=axis, column=column))


def compare(
    runs: Annotated[Runs, Positional],
    against: Against,
    output: Path = Path("comparison"),
    labels: tuple[str, str] | None = None,
) -> None:
    """Compare two ideas, each over its seeds: `ppo-mpi compare RUN_A... -- RUN_B...`.

    Args:
        runs: Runs of the first idea.
        against: Runs of the second idea; "--" stands for this flag.
        output: Path of the JSON file and the pictures, without the ending.
        labels: Names of the two ideas; by default, the ends of their paths, or the directories of several.
    """
    print(compare_runs(runs, against, output, labels=labels))
    path = without_ending(output, COMPARED)
    _tell_files([path.with_name(path.name + ending) for ending in COMPARED])


def video(
    run: Run,
    output: Path | None = None,
    episodes: int = 1,
    which: Which = "best",
    sampled: bool = False,
    seed: int = 0,
    max_steps: int | None = None,
    env_id: EnvId = None,
) -> None:
    """Record a video of a run's policy as mp4 or GIF; no display is needed.

    Args:
        run: A run's directory.
        output: The video file, ending in .mp4 or .gif. None: video.mp4 in the run's directory.
        episodes: Number of episodes to record.
        which: The networks that earned the best return, or the last ones.
        sampled: Sample actions from the policy instead of taking the most probable one.
        seed: Seed of environment and actions.
        max_steps: End an episode after this many steps. None: as in training.
        env_id: The environment's Gymnasium id, for a run that `ppo-mpi train` did not make.
    """
    saved = _saved(run)
    env_fn, max_ep_len = _environment(run, env_id)
    record_video(
        saved,
        env_fn,
        output or run / run_file.VIDEO,
        episodes=episodes,
        which=which,
        deterministic=not sampled,
        seed=seed,
        max_steps=max_ep_len if max_steps is None else max_steps,
    )


def export(
    run: Run,
    output: Path | None = None,
    which: Which = "best",
    formats: tuple[Literal["onnx", "torch"], ...] = ("onnx", "torch"),
) -> None:
    """Export a run's policy for other programs: observations -> actions, with the normalization inside.

    Args:
        run: A run's directory.
        output: Path of the files, without the ending. None: policy in the run's directory.
        which: The networks that earned the best return, or the last ones.
        formats: ONNX, a `torch.export` program, or both.
    """
    _tell_files(export_policy(_saved(run), output or run / run_file.POLICY, which=which, formats=formats))


def _telling(episodes: int) -> Callable[[int], None]:
    """Return a callback that, given the number of finished episodes, prints it now and then with the time left."""
    started = told = time.monotonic()

    def tell(over: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_EVERY and over < episodes:
            told = now
            left = f", {timedelta(seconds=round((now - started) / over * (episodes - over)))} left" if over else ""
            print(f"{over} of {episodes} episodes{left}", file=sys.stderr, flush=True)

    return tell


def _on_rank_0(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function to run on rank 0 only; otherwise all ranks would write the same files."""

    @functools.wraps(function)
    def alone(*arguments: Any, **keywords: Any) -> None:
        if world().is_root:
            function(*arguments, **keywords)

    return alone


def _saved(run: Path) -> Path:
    """Return the directory of a run's networks."""
    if not run.is_dir():
        raise ConfigurationError(f"RUN: there is no directory {run}")
    if (run / "saved_model").is_dir():
        return run / "saved_model"
    if several := sorted(path.parent.name for path in run.glob(f"*/{run_file.NAME}")):
        raise ConfigurationError(f"{run} holds several runs: name one of them, {', '.join(several)}")
    return run


def _environment(run: Path, env_id: str | None) -> tuple[Callable[..., Any], int | None]:
    """Return a function that builds a run's environment, and the steps after which episodes were truncated."""
    if env_id is not None:
        return functools.partial(tasks.environment, env_id), None
    if not (run / run_file.NAME).exists():
        raise ConfigurationError(
            f"{run} has no {run_file.NAME}: name the environment with --env-id, such as CartPole-v1"
        )
    chosen = run_file.read(run / run_file.NAME)
    build = functools.partial(tasks.environment, chosen["env_id"], **chosen.get("env_kwargs", {}))
    return build, chosen.get("max_ep_len")


def _tell_files(paths: Sequence[Path]) -> None:
    print("   ".join(map(str, paths)))
