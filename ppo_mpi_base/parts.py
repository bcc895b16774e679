# SPDX-License-Identifier: MIT
"""Observations of several parts, those of a Dict space: rows of numbers for the run, dicts of tensors for networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from ppo_mpi_base.errors import ConfigurationError, TrainingError

Layout: TypeAlias = dict[str, tuple[int, Any]]
"""By name: how many numbers stand for a part, and its shape, or the layout of a dict."""


class Parts(Box):
    """Rows of numbers (n,), which stand for the observations of a Dict space: one part after another, in its order.

    Their dtype is the one that all parts fit into; a Discrete part is one-hot, in bytes.

    Args:
        parts: Box of any shape, Discrete, or Dict again.

    Raises:
        ConfigurationError: a part is none of these, or there is none.
    """

    def __init__(self, parts: Dict) -> None:
        leaves = list(_leaves(parts))
        low, high = (np.concatenate(bounds) for bounds in zip(*map(_bounds, leaves), strict=True))
        super().__init__(low, high, dtype=np.result_type(low, high).type)
        self.parts = parts
        self._layout = _layout(parts)

    def __eq__(self, other: object, /) -> bool:
        """Say whether these are rows of the same parts, in the same order."""
        return isinstance(other, Parts) and self.parts == other.parts and [*self.parts] == [*other.parts]

    def __repr__(self) -> str:
        return repr(self.parts)

    def join(self, observation: Any) -> np.ndarray:
        """Return an observation of the Dict space as a row.

        Raises:
            TrainingError: a part is missing, has another shape, or is not one of those that its space has.
        """
        return np.concatenate(_pieces(self.parts, observation, ""), dtype=self.dtype)

    def split(self, rows: Tensor) -> dict[str, Any]:
        """Return rows (B, n) as a dict of their parts: (B, *shape) of a Box, (B, values) of a Discrete space."""
        return _split(self._layout, rows)


def with_rows(space: gymnasium.Space) -> gymnasium.Space:
    """Return the space of the rows that stand for a Dict space; any other as it is."""
    return Parts(space) if isinstance(space, Dict) else space


def _leaves(parts: Dict, above: str = "") -> Iterator[Box | Discrete]:
    """Yield the parts that are no dicts, in order, or raise `ConfigurationError`."""
    if not parts.spaces:
        raise ConfigurationError(f"the observation space{f' of {above!r}' if above else ''} is Dict(), without a part")
    for name, part in parts.spaces.items():
        path = f"{above}.{name}" if above else str(name)
        if isinstance(part, Dict):
            yield from _leaves(part, path)
        elif isinstance(part, Box | Discrete):
            yield part
        else:
            raise ConfigurationError(
                f"the part {path!r} of the observation space is {part}, and must be a Box, a Discrete or a Dict"
            )


def _bounds(part: Box | Discrete) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest numbers that stand for a part."""
    if isinstance(part, Discrete):
        return np.zeros(int(part.n), np.uint8), np.ones(int(part.n), np.uint8)
    return part.low.ravel(), part.high.ravel()


def _pieces(parts: Dict, observation: Any, above: str) -> list[np.ndarray]:
    """Return the numbers that stand for each part of an observation, see `Parts.join`."""
    if not isinstance(observation, Mapping):
        raise TrainingError(f"{_told(above)} is no dict, but {type(observation).__name__}; its space is {parts}")
    pieces = []
    for name, part in parts.spaces.items():
        path = f"{above}.{name}" if above else str(name)
        if name not in observation:
            raise TrainingError(f"{_told(above)} has the parts {', '.join(map(repr, observation))}, and lacks {name!r}")
        if isinstance(part, Dict):
            pieces += _pieces(part, observation[name], path)
        else:
            pieces.append(_piece(part, np.asarray(observation[name]), path))
    return pieces


def _piece(part: gymnasium.Space, x: np.ndarray, path: str) -> np.ndarray:
    """Return the numbers (size,) that stand for one part."""
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


def _told(path: str) -> str:
    return f"the part {path!r} of an observation" if path else "an observation"


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
