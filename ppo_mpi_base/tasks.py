# SPDX-License-Identifier: MIT
"""What is known about a Gymnasium id: how to build the environment, and which networks and settings learn it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import FlattenObservation

from ppo_mpi_base import presets
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.networks import mlp, shared_nature_cnn

STEPS_OF_CLASSIC_CONTROL = {"Acrobot": 1_000_000, "MountainCar": 300_000}  # the others take 100,000


def specification(env_id: str) -> EnvSpec:
    """Return what is registered under an id, such as "Hopper-v5", "ALE/Pong-v5" or "module:Name-v0".

    Raises:
        ConfigurationError: nothing is registered; the message is Gymnasium's, which suggests similar ids.
    """
    with contextlib.suppress(ImportError):  # registers its games; without it, the message below says so
        import ale_py  # noqa: F401
    try:
        module, _, name = env_id.rpartition(":")
        if module:
            __import__(module)
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise _unfit(env_id, error) from error


def environment(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Build the environment of an id; a game with `atari.atari_env`.

    Observations other than vectors and Discrete ones are flattened, except a game's.

    Raises:
        ConfigurationError: it is unknown, needs a missing package, or does not accept the keywords.
    """
    package = _package(env_id)
    if package == "gymnasium.envs.mujoco":
        _silence_mujoco()
    try:
        if package.startswith("ale_py"):
            from ppo_mpi_base.atari import atari_env

            return atari_env(specification(env_id).id, **kwargs)
        made = gymnasium.make(specification(env_id), **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise _unfit(env_id, error) from error
    except Exception as error:  # any error in the environment's own code
        if not kwargs:
            raise
        raise ConfigurationError(
            f"env_id={env_id!r}, env_kwargs={kwargs!r}: {type(error).__name__}: {error}"
        ) from error
    space = made.observation_space
    plain = isinstance(space, Discrete) or (isinstance(space, Box) and len(space.shape) == 1)
    return made if plain else FlattenObservation(made)


def settings(env_id: str, ranks: int, env_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return keywords of `PPO()`, including `total_steps`, to learn an environment on this many ranks.

    They may depend on the environment's own keywords, `env_kwargs`.
    """
    package = _package(env_id)
    if package == "gymnasium.envs.classic_control":
        name = specification(env_id).id
        steps = STEPS_OF_CLASSIC_CONTROL.get(name.split("-")[0], 100_000)
        return {"total_steps": steps, **presets.classic_control(name, ranks)}
    if package.startswith("ale_py"):
        return {"total_steps": 10_000_000, **presets.atari(ranks)}
    made = environment(env_id, **(env_kwargs or {}))
    preset = presets.mujoco(ranks) if isinstance(made.action_space, Box) else presets.discrete(ranks)
    if not isinstance(made.observation_space, Box) or made.observation_space.dtype.kind != "f":
        preset["normalize_observations"] = False
    made.close()
    return {"total_steps": 1_000_000, **preset}


def functions(env_id: str, hidden: Sequence[int]) -> dict[str, Any]:
    """Return the functions that `PPO()` needs for an environment, with tanh networks of these hidden layer widths.

    Games have one Nature network for policy and value, and are stepped by ale_py's vector environment.
    """
    if _package(env_id).startswith("ale_py"):
        from ppo_mpi_base.atari import atari_vector_env

        vector = partial(atari_vector_env, env_id=specification(env_id).id)
        return {"env_fn": partial(environment, env_id), "make_vec_env_fn": vector, "network_fn": shared_nature_cnn}
    network = partial(mlp, hidden=tuple(hidden))
    return {"env_fn": partial(environment, env_id), "network_fn": network, "value_network_fn": network}


def _package(env_id: str) -> str:
    """Return the package of an environment's class, such as "gymnasium.envs.mujoco"."""
    entry_point = specification(env_id).entry_point
    where = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return ".".join(where.split(":")[0].split(".")[:3])


def _silence_mujoco() -> None:
    """Suppress MuJoCo 4's warning about an attribute in Gymnasium's own models, shown once for each environment."""
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None if "settotalmass" in message else print(message))


def _unfit(env_id: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"env_id={env_id!r}: {' '.join(str(error).split())}")
