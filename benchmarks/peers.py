# SPDX-License-Identifier: MIT
"""The libraries that this one is measured against, each in its own environment below `.venv-bench/`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-bench"
PEERS = {
    "stable_baselines3": [
        "stable-baselines3==2.9.2",
        "gymnasium[mujoco]==1.4.0",
        "mujoco==4.0.0",
        "ale-py==0.12.1",
        "opencv-python-headless==5.0.0.93",
    ],
    "sbx": ["sbx-rl==0.28.0", "stable-baselines3==2.9.2", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"],
    "sample_factory": [
        "sample-factory==2.1.1",
        "gymnasium==0.29.1",
        "mujoco==3.1.6",
        "imageio==2.38.1",
        "numpy==1.26.4",
    ],
}
TORCH = "torch==2.13.0"


def python_of(peer: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return ENVIRONMENTS / peer / "bin" / "python"


def install(peer: str) -> bool:
    """Install a peer into its own environment, once; if that fails, print why in one line and return False."""
    directory = ENVIRONMENTS / peer
    stamp, wanted = directory / ".installed", " ".join([TORCH, *PEERS[peer]])
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    print(f"installing {peer} into {directory.relative_to(ROOT)}", flush=True)
    pip = [str(python_of(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch by itself first: the version of our own environment, of which PIP_EXTRA_INDEX_URL chooses the build.
    for command in ([sys.executable, "-m", "venv", str(directory)], [*pip, TORCH], [*pip, TORCH, *PEERS[peer]]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
            print(f"{peer} is left out, its installation failed: {lines[-1]}", flush=True)
            return False
    stamp.write_text(wanted)
    return True
