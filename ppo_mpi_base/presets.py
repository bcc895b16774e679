# SPDX-License-Identifier: MIT
"""Settings that are known to work, as keywords of `PPO()`: `PPO(**presets.mujoco(world().size), ...)`.

Environments and minibatches are divided among ranks. Each preset is the same algorithm on any number of ranks that
divides them evenly, and nearly the same on others. `results/` has the scores.
"""

from __future__ import annotations

from typing import Any

from ppo_mpi_base.errors import ConfigurationError


def mujoco(ranks: int) -> dict[str, Any]:
    """Return the setting for MuJoCo: 4,096 samples per iteration, updates of 256, 4 epochs; for networks of 64x64.

    Its environments are at different points in their episodes, of 1,000 steps in most of these tasks, and its gamma is
    a little higher than usual. `docs/tried.md` has what else was tried; `results/mujoco/` the scores of nine tasks.
    """
    return {
        **_shared_out(ranks, environments=32, length=128, minibatch=256),
        **_NORMALIZED,
        "train_pi_epochs": 4,
        "train_v_epochs": 4,
        "pi_lr": 1e-3,
        "vf_lr": 1e-3,
        "initial_log_std": -0.5,
        "gamma": 0.993,
        "stagger_episodes": 1000,
    }


def mujoco_paper(ranks: int) -> dict[str, Any]:
    """Return the paper's MuJoCo setting: 2,048 samples per iteration, updates of 64, 10 epochs; networks of 128x128.

    Source: Schulman et al. (2017), arxiv.org/abs/1707.06347, table 3; with the details of Engstrom et al. (2020),
    arxiv.org/abs/2005.12729: normalization, annealing, orthogonal initialization and gradient clipping.
    """
    return {
        **_shared_out(ranks, environments=16, length=128, minibatch=64),
        **_NORMALIZED,
        "train_pi_epochs": 10,
        "train_v_epochs": 10,
        "pi_lr": 3e-4,
        "vf_lr": 3e-4,
    }


def classic_control(env_id: str, ranks: int) -> dict[str, Any]:
    """Return the setting for one of Gymnasium's classic control tasks, such as "CartPole-v1"; networks of 64x64.

    Source: Pendulum's is close to rl-baselines3-zoo's (github.com/DLR-RM/rl-baselines3-zoo), with normalized rewards
    and annealed learning rates; the others are this project's.
    """
    return _CLASSIC_CONTROL.get(env_id.split("-")[0], discrete)(ranks)


def discrete(ranks: int) -> dict[str, Any]:
    """Return a setting for otherwise unknown tasks with few discrete actions; networks of 64x64."""
    return {
        **_shared_out(ranks, environments=16, length=256, minibatch=256),
        **_NORMALIZED,
        "train_pi_epochs": 8,
        "train_v_epochs": 8,
        "pi_lr": 1e-3,
        "vf_lr": 1e-3,
        "entropy_coef": 0.01,
    }


def _cartpole(ranks: int) -> dict[str, Any]:
    return {
        **_shared_out(ranks, environments=8, length=64, minibatch=128),
        "train_pi_epochs": 10,
        "train_v_epochs": 10,
        "pi_lr": 1e-3,
        "vf_lr": 1e-3,
        "gamma": 0.98,
        "lam": 0.9,
        "anneal_lr": True,
        "orthogonal_init": True,
    }


def atari(ranks: int) -> dict[str, Any]:
    """Return the Atari setting: 8 games of 128 steps per iteration, updates of 128, 4 epochs; one network for both.

    Source: Schulman et al. (2017), arxiv.org/abs/1707.06347, table 5, with changes common in later code: 4 epochs, a
    constant clip ratio, half the value loss, gradient clipping and orthogonal initialization (Huang et al. 2022,
    iclr-blog-track.github.io/2022/03/25/ppo-implementation-details). Three are this project's: updates of 128 instead
    of 256, rates of 3e-4 instead of 2.5e-4, and an entropy bonus that falls from 0.02 to 0 instead of a constant 0.01.
    `results/atari/` has the scores of four games; `docs/tried.md` what else was tried.
    """
    return {
        **_shared_out(ranks, environments=8, length=128, minibatch=128),
        "train_pi_epochs": 4,
        "train_v_epochs": 4,
        "pi_lr": 3e-4,
        "vf_lr": 3e-4,
        "anneal_lr": True,
        "clip_ratio": 0.1,
        "entropy_coef": 0.02,
        "anneal_entropy_coef": True,
        "value_coef": 0.5,
        "pi_grad_clip": 0.5,
        "v_grad_clip": 0.5,
        "adam_epsilon": 1e-5,
        "clip_rewards": True,
        "orthogonal_init": True,
    }


def _pendulum(ranks: int) -> dict[str, Any]:
    return {
        **_shared_out(ranks, environments=4, length=1024, minibatch=64),
        **_NORMALIZED,
        "normalize_observations": False,  # with it, some seeds end at -700 instead of -200
        "train_pi_epochs": 10,
        "train_v_epochs": 10,
        "pi_lr": 1e-3,
        "vf_lr": 1e-3,
        "gamma": 0.9,
    }


def _mountain_car(ranks: int) -> dict[str, Any]:
    return {**discrete(ranks), "gamma": 0.999}  # the flag is a hundred or more steps away


def _mountain_car_continuous(ranks: int) -> dict[str, Any]:
    # With the usual noise, no episode reaches the flag; with this much, mostly full throttle to either side, some do.
    return {**_mountain_car(ranks), "initial_log_std": 1.0}


_CLASSIC_CONTROL = {
    "CartPole": _cartpole,
    "Pendulum": _pendulum,
    "MountainCar": _mountain_car,
    "MountainCarContinuous": _mountain_car_continuous,
}

_NORMALIZED: dict[str, Any] = {
    "pi_grad_clip": 0.5,
    "v_grad_clip": 0.5,
    "adam_epsilon": 1e-5,
    "anneal_lr": True,
    "normalize_observations": True,
    "normalize_rewards": True,
    "orthogonal_init": True,
}


def _shared_out(ranks: int, *, environments: int, length: int, minibatch: int) -> dict[str, Any]:
    """Return one rank's share of environments, steps of each, and minibatch, which are given for all ranks together."""
    if not isinstance(ranks, int) or ranks < 1:
        raise ConfigurationError(f"presets: ranks={ranks!r} must be a whole number of at least 1, such as world().size")
    own = max(1, environments // ranks)
    own_length = max(1, environments * length // (own * ranks))
    samples = own * own_length
    # The last update of an epoch gets what is left: at least half as many samples, since its step is just as long.
    sizes = (size for size in range(1, samples + 1) if samples % size == 0 or 2 * (samples % size) >= size)
    return {
        "use_vectorized_envs": True,
        "num_environments": own,
        "rollout_length_per_worker": own_length,
        "train_batch_size": min(sizes, key=lambda size: abs(size - minibatch / ranks)),
    }
