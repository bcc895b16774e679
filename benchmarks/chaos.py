# SPDX-License-Identifier: MIT
"""Kill ranks of a training at random moments, resume each time, and compare: `python -m benchmarks.chaos --kills 50`.

CartPole is trained twice on two ranks, with checkpoints at short intervals: once undisturbed, and once with SIGKILL to
a random rank at random moments. In the end, both must have the same parameters to the last bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gymnasium
import safetensors.numpy

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
CHECKPOINT_SECONDS = 0.05
TENSORS = ("parameters", "adam/first_moment", "adam/second_moment", "observations/mean", "observations/squares")


def train(directory: Path, iterations: int, pause: float) -> None:
    """Train as one rank; an iteration lasts at least `pause` seconds, so that kills hit short runs too."""
    from ppo_mpi_base.hooks import Hooks
    from ppo_mpi_base.mpi import world
    from ppo_mpi_base.networks import mlp
    from ppo_mpi_base.ppo import PPO
    from ppo_mpi_base.worker import Worker

    class Pause(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            time.sleep(pause)

    (directory / f"rank{world().rank}.pid").write_text(str(os.getpid()))
    PPO(
        total_steps=iterations * 64 * 4 * RANKS,
        env_fn=lambda: gymnasium.make("CartPole-v1"),
        network_fn=partial(mlp, hidden=(32, 32)),
        value_network_fn=partial(mlp, hidden=(32, 32)),
        use_vectorized_envs=True,
        num_environments=4,
        rollout_length_per_worker=64,
        train_batch_size=64,
        train_pi_epochs=4,
        train_v_epochs=4,
        normalize_observations=True,
        anneal_lr=True,
        compile=False,
        quiet=True,
        resume="auto",
        checkpoint_seconds=CHECKPOINT_SECONDS,
        hooks=[Pause()],
        log_directory=str(directory / "logs"),
        save_location=str(directory / "saved"),
    )


def start(directory: Path, iterations: int, pause: float) -> subprocess.Popen[bytes]:
    """Start the ranks, after removing the pid files of the former ones, which have ended by then."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.pid"):
        path.unlink()
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [str(mpiexec), "-n", str(RANKS), sys.executable, "-m", "benchmarks.chaos", "--rank-of", str(directory)]
    command += ["--iterations", str(iterations), "--pause", str(pause)]
    with (directory / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def newest(directory: Path) -> Path | None:
    """Return the path of the newest checkpoint's description; None before the first."""
    return max((directory / "saved" / "checkpoints").glob("*.json"), default=None)


def steps(directory: Path) -> int:
    """Return the steps of the newest checkpoint."""
    path = newest(directory)
    return 0 if path is None else int(path.stem)


def kill_once(process: subprocess.Popen[bytes], directory: Path, delay: float, rank: int) -> bool:
    """SIGKILL a rank `delay` seconds after all ranks have started; return whether it was still running."""
    pids = [directory / f"rank{each}.pid" for each in range(RANKS)]
    while process.poll() is None and not all(path.exists() and path.read_text() for path in pids):
        time.sleep(0.02)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        os.kill(int(pids[rank].read_text()), signal.SIGKILL)
        process.wait()  # the launcher ends the other ranks
        return process.returncode != 0


def disturbed(directory: Path, kills: int, iterations: int, pause: float, draw: random.Random) -> int:
    """Train with kills, and after the last one to the end; return the number of kills."""
    began = time.perf_counter()
    start_up = 0.0  # seconds from the start of the ranks to the first new checkpoint; estimated as we go
    killed = 0
    while killed < kills:
        before = steps(directory)
        process = start(directory, iterations, pause)
        # From the first import to well into training, so that kills also hit resuming and saving.
        rank, delay = draw.randrange(RANKS), draw.uniform(0, 1.5 * start_up + 1)
        if not kill_once(process, directory, delay, rank):
            break
        killed += 1
        after = steps(directory)
        if after == before:
            start_up = min(start_up + 1, 60.0)  # no progress: give the next ones longer
        passed = time.perf_counter() - began
        print(
            f"{passed:7.1f} s  kill {killed}: rank {rank} after {delay:.2f} s, {before:,} -> {after:,} steps",
            flush=True,
        )
    if start(directory, iterations, 0.0).wait() != 0:
        raise SystemExit(f"the last part failed: see {directory}/output.txt")
    return killed


def verdict(directory: Path, other: Path) -> list[str]:
    """Return the names of the tensors that differ between the last checkpoints."""
    paths = [newest(each) for each in (directory, other)]
    if None in paths or len({path.stem for path in paths if path}) != 1:
        return [f"steps: {steps(directory):,} and {steps(other):,}"]
    one, two = (safetensors.numpy.load_file(path.with_suffix(".safetensors")) for path in paths if path)
    return [name for name in TENSORS if one[name].tobytes() != two[name].tobytes()]


def main() -> None:
    """Train twice and say whether the kills left a trace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--pause", type=float, default=0.05, help="least seconds of a disturbed iteration")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--directory", type=Path, help="for the two runs, and empty; else a temporary one")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        train(arguments.rank_of, arguments.iterations, arguments.pause)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        draw = random.Random(arguments.seed)
        killed = disturbed(directory / "killed", arguments.kills, arguments.iterations, arguments.pause, draw)
        if start(directory / "undisturbed", arguments.iterations, 0.0).wait() != 0:
            raise SystemExit(f"the undisturbed run failed: see {directory}/undisturbed/output.txt")
        different = verdict(directory / "killed", directory / "undisturbed")
        total = steps(directory / "killed")
    found = f"differ in {', '.join(different)}" if different else "are equal to the last bit"
    print(f"{killed} kills, {total:,} steps: parameters, optimizer and normalizers {found}")
    if different or killed < arguments.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
