# SPDX-License-Identifier: MIT
"""Observations of several parts, those of a Dict space: rows of numbers for the run, dicts of tensors for networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, flatten_space
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space, iterate
from gymnasium.wrappers import TransformObservation
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, TrainingError

Layout: TypeAlias = dict[str, tuple[int, Any]]
"""By name: how many numbers stand for a part, and its shape, or the layout of a dict."""


class Parts(Box):
    """Rows of numbers (n,), which stand for the observations of a Dict space: one part after another.

    Their dtype is the one that all parts fit into; a Discrete part is one-hot.

    Args:
        parts: Box of any shape, Discrete, or Dict again.

    Raises:
        ConfigurationError: a part is none of these, or there is none.
    """

    def __init__(self, parts: Dict) -> None:
        _check(parts)
        flat = flatten_space(parts)
        assert isinstance(flat, Box)
        assert flat.dtype is not None
        super().__init__(flat.low, flat.high, dtype=flat.dtype.type)
        self.parts = parts
        self._layout = _layout(parts)

    def __eq__(self, other: object, /) -> bool:
        """Say whether these are rows of the same parts, in the same order."""
        return isinstance(other, Parts) and self.parts == other.parts and [*self.parts] == [*other.parts]

    def __repr__(self) -> str:
        return repr(self.parts)

    def join(self, observation: dict[str, Any]) -> np.ndarray:
        """Return an observation of the Dict space as a row.

        Raises:
            TrainingError: a part is missing, has another shape, or is no value of its Discrete space.
        """
        return np.concatenate(_pieces(self.parts, observation))

    def split(self, rows: Tensor) -> dict[str, Any]:
        """Return rows (B, n) as a dict of their parts: (B, *shape) of a Box, (B, values) of a Discrete space."""
        return _split(self._layout, rows)


def with_rows(environment: gymnasium.Env) -> gymnasium.Env:
    """Return an environment whose observations are the rows of its Dict space; any other as it is."""
    if not isinstance(environment.observation_space, Dict):
        return environment
    rows = Parts(environment.observation_space)
    return TransformObservation(environment, rows.join, rows)


def with_rows_of_all(vector: VectorEnv) -> VectorEnv:
    """Return a vector environment whose observations are the rows of its Dict space; any other as it is."""
    return _Rows(vector) if isinstance(vector.single_observation_space, Dict) else vector


class _Rows(VectorWrapper):
    """Does what `TransformObservation` does, for a vector environment (Gymnasium's own refuses SAME_STEP)."""

    def __init__(self, vector: VectorEnv) -> None:
        super().__init__(vector)
        assert isinstance(vector.single_observation_space, Dict)
        self._parts = self.single_observation_space = Parts(vector.single_observation_space)
        self.observation_space = batch_space(self._parts, vector.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin episodes."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._rows(observations), infos

    def step(self, actions: Any) -> tuple[np.ndarray, Any, Any, Any, dict[str, Any]]:
        """Take one step."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = [None if final is None else self._parts.join(final) for final in infos["final_obs"]]
        return self._rows(observations), rewards, terminated, truncated, infos

    def _rows(self, observations: Any) -> np.ndarray:
        return np.stack([self._parts.join(x) for x in iterate(self.env.observation_space, observations)])


def _check(parts: Dict) -> None:
    if not parts.spaces:
        raise ConfigurationError("env_fn: the observation space Dict() has no part")
    for name, part in parts.spaces.items():
        if isinstance(part, Dict):
            _check(part)
        elif not isinstance(part, Box | Discrete):
            raise ConfigurationError(
                f"env_fn: the part {name!r} of the observation space is {part}, and no Box, Discrete or Dict"
            )


def _pieces(parts: Dict, observation: Any) -> list[np.ndarray]:
    """Return the numbers that stand for each part of an observation, see `Parts.join`."""
    pieces = []
    for name, part in parts.spaces.items():
        if not isinstance(observation, Mapping) or name not in observation:
            raise TrainingError(f"an observation lacks the part {name!r} that is in its space: {observation!r}")
        x = observation[name]
        if isinstance(part, Dict):
            pieces += _pieces(part, x)
            continue
        fits = np.shape(x) == part.shape
        if not fits or (isinstance(part, Discrete) and not 0 <= int(x) - int(part.start) < int(part.n)):
            found = repr(x) if fits else f"of shape {np.shape(x)}"
            raise TrainingError(f"the part {name!r} of an observation is {found}, but its space is {part}")
        if isinstance(part, Discrete):
            one_hot = np.zeros(int(part.n), part.dtype)
            one_hot[int(x) - int(part.start)] = 1
            x = one_hot
        pieces.append(np.reshape(x, -1))
    return pieces


def _layout(parts: Dict) -> Layout:
    """Return what `_split` has to know, as plain numbers, which `torch.compile` can follow."""
    layout: Layout = {}
    for name, part in parts.spaces.items():
        if isinstance(part, Dict):
            of_part = _layout(part)
            layout[name] = sum(size for size, _ in of_part.values()), of_part
        else:
            shape = (int(part.n),) if isinstance(part, Discrete) else tuple(map(int, part.shape or ()))
            layout[name] = math.prod(shape), shape
    return layout


def _split(layout: Layout, rows: Tensor) -> dict[str, Any]:
    """Return the parts of rows (B, n), each of its shape, or a dict again."""
    split = zip(layout.items(), rows.split([size for size, _ in layout.values()], dim=1), strict=True)
    return {
        name: _split(form, own) if isinstance(form, dict) else own.reshape(own.shape[0], *form)
        for (name, (_, form)), own in split
    }
