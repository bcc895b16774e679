# SPDX-License-Identifier: MIT
"""Observations in several parts, from a Dict space: rows of numbers for the run, dicts of tensors for networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, TrainingError

Path: TypeAlias = tuple[str, ...]


class Parts(Box):
    """Rows of numbers (n,) that represent the observations of a Dict space: one part after another, in its order.

    All parts fit into their dtype; a Discrete part is one-hot, in bytes.

    Args:
        parts: Box of any shape, Discrete, or Dict again.

    Raises:
        ConfigurationError: a part is none of these, or there are no parts.
    """

    def __init__(self, parts: Dict) -> None:
        self._leaves = list(_leaves(parts, ()))
        bounds = [_bounds(part) for _, part in self._leaves]
        low, high = (np.concatenate([x.ravel() for x in of_all]) for of_all in zip(*bounds, strict=True))
        super().__init__(low, high, dtype=np.result_type(low, high).type)
        self.parts = parts
        # Without the spaces, for `split`, which `torch.compile` traces.
        self._shapes = [(path, x.shape) for (path, _), (x, _) in zip(self._leaves, bounds, strict=True)]
        self._sizes = [math.prod(shape) for _, shape in self._shapes]

    def __eq__(self, other: object, /) -> bool:
        """Return whether these are rows of the same parts, in the same order."""
        return isinstance(other, Parts) and self.parts == other.parts and [*self.parts] == [*other.parts]

    def __repr__(self) -> str:
        return repr(self.parts)

    def join(self, observation: Any) -> np.ndarray:
        """Return an observation of the Dict space as a row.

        Raises:
            TrainingError: a part is missing, has another shape, or has values outside its space's dtype or choices.
        """
        pieces = [_piece(part, np.asarray(_found(self.parts, observation, path)), path) for path, part in self._leaves]
        return np.concatenate(pieces, dtype=self.dtype)

    def split(self, rows: Tensor) -> dict[str, Any]:
        """Return rows (B, n) as a dict of their parts: (B, *shape) for a Box, (B, values) for a Discrete space."""
        seen: dict[str, Any] = {}
        for ((*above, name), shape), own in zip(self._shapes, rows.split(self._sizes, dim=1), strict=True):
            inside = seen
            for outer in above:
                inside = inside.setdefault(outer, {})
            inside[name] = own.reshape(own.shape[0], *shape)
        return seen


def with_rows(space: gymnasium.Space, source: str = "env_fn") -> gymnasium.Space:
    """Return the space of the rows that represent a Dict space; any other space unchanged.

    Raises:
        ConfigurationError: a part is not supported; the message begins with `source`, the space's keyword.
    """
    try:
        return Parts(space) if isinstance(space, Dict) else space
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from None


def _leaves(parts: Dict, above: Path) -> Iterator[tuple[Path, Box | Discrete]]:
    """Yield the parts that are not dicts, in order, each with its path, or raise `ConfigurationError`."""
    if not parts.spaces:
        raise ConfigurationError(
            f"the observation space{f' of {_named(above)}' if above else ''} is Dict(), which has no parts"
        )
    for name, part in parts.spaces.items():
        path = (*above, name)
        if isinstance(part, Dict):
            yield from _leaves(part, path)
        elif isinstance(part, Box | Discrete):
            yield path, part
        else:
            raise ConfigurationError(
                f"the part {_named(path)} of the observation space is {part}, but must be a Box, a Discrete or a Dict"
            )


def _bounds(part: Box | Discrete) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest numbers that represent a part, in its shape."""
    if isinstance(part, Discrete):
        return np.zeros(int(part.n), np.uint8), np.ones(int(part.n), np.uint8)
    return part.low, part.high


def _found(space: gymnasium.Space, observation: Any, path: Path) -> Any:
    """Return the part of an observation at a path, or raise `TrainingError`."""
    for k, name in enumerate(path):
        assert isinstance(space, Dict)
        if not isinstance(observation, Mapping):
            raise TrainingError(
                f"{_told(path[:k])} is not a dict, but {type(observation).__name__}; its space is {space}"
            )
        if name not in observation:
            there = ", ".join(map(repr, observation))
            raise TrainingError(f"{_told(path[:k])} has the parts {there}, but lacks {name!r}")
        space, observation = space[name], observation[name]
    return observation


def _piece(part: gymnasium.Space, x: np.ndarray, path: Path) -> np.ndarray:
    """Return the numbers (size,) that represent one part."""
    if x.shape != part.shape:
        raise TrainingError(f"{_told(path)} is of shape {x.shape}, but its space is {part}")
    if x.dtype != part.dtype and np.dtype(part.dtype).kind != "f":
        lost = x[x.astype(part.dtype) != x] if x.dtype.kind in "iub" else x
        if lost.size:
            raise TrainingError(f"{_told(path)} is of dtype {x.dtype}, with {lost.flat[0]} in it; its space is {part}")
    if not isinstance(part, Discrete):
        return np.reshape(x, -1).astype(part.dtype, copy=False)
    k = int(x) - int(part.start)
    if not 0 <= k < int(part.n):
        raise TrainingError(f"{_told(path)} is {x}, but its space is {part}")
    one_hot = np.zeros(int(part.n), np.uint8)
    one_hot[k] = 1
    return one_hot


def _told(path: Path) -> str:
    return f"the part {_named(path)} of an observation" if path else "an observation"


def _named(path: Path) -> str:
    return repr(".".join(map(str, path)))
