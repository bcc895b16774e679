# SPDX-License-Identifier: MIT
"""Checks of one argument: its type and range, by its annotation, and whether hooks and devices can be used."""

from __future__ import annotations

import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.hooks import MOMENTS, Hooks


@dataclass(frozen=True)
class Range:
    """The values that a number may take: from `low` to `high`; `above` excludes `low` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """Return whether a number is finite and in the range."""
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        """Describe the range as the end of the sentence 'it must be a number ...'."""
        if self.high != math.inf:
            return f"from {self.low:g} to {self.high:g}"
        return f"above {self.low:g}" if self.above else f"of at least {self.low:g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Finite = Annotated[float, Range(-1e30, 1e30)]


def check_device(device: str | torch.device | None) -> None:
    """Raise `ConfigurationError` if torch does not know a device, or it is not available."""
    if not isinstance(device, str | torch.device | None):
        raise ConfigurationError(f'device={device!r} must be a string or a torch.device, such as "cpu" or "cuda:1"')
    if (default := torch.get_default_device()).type != "cpu":
        raise ConfigurationError(
            f"torch.set_default_device({str(default)!r}) would scatter tensors that belong in host memory: "
            f"leave it out, and give device={str(default)!r}"
        )
    try:
        (torch.zeros(1, device="cpu" if device is None else device) + 1).item()  # a GPU too old for torch fails here
    except (AssertionError, RuntimeError) as error:
        raise ConfigurationError(
            f'device={str(device)!r} cannot be used ({str(error).splitlines()[0]}): choose "cpu", or leave it out'
        ) from error


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return a keyword's value, with whole floats as ints if its annotation is a count.

    Raises:
        ConfigurationError: the value has another type than the annotation, or is out of range.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        hint = options[0] if len(options) == 1 else tuple(options)
    if typing.get_origin(hint) is Annotated:
        kind, allowed = typing.get_args(hint)
        return _number(name, value, kind, allowed)
    origin = typing.get_origin(hint)
    if origin is Literal and not any(value == x and type(value) is type(x) for x in typing.get_args(hint)):
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
    if hint is bool and not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} must be True or False")
    if origin is dict and not isinstance(value, dict):
        raise ConfigurationError(f"{name}={value!r} must be a dict of keywords")
    if origin is Callable and not callable(value):
        such = ", such as lambda: gymnasium.make('CartPole-v1')" if name == "env_fn" else ""
        raise ConfigurationError(f"{name}={value!r} must be a function{such}, but is not callable")
    if hint is str and not isinstance(value, str | os.PathLike):
        raise ConfigurationError(f"{name}={value!r} must be the path of a directory")
    if name == "hooks":
        _check_hooks(value)
    return os.fspath(value) if hint is str else value


def _number(name: str, value: Any, kind: type, allowed: Range) -> int | float:
    """Return a number of the wanted kind within its range."""
    what = "whole number" if kind is int else "number"
    number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else _float(value)
    if number not in allowed or (kind is int and not number.is_integer()):
        raise ConfigurationError(f"{name}={value!r} must be a {what} {allowed}")
    return kind(value)


def _float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer with hundreds of digits
        return math.inf


def _check_hooks(hooks: Any) -> None:
    if isinstance(hooks, Hooks) or not isinstance(hooks, Sequence):
        raise ConfigurationError(f"hooks={hooks!r} must be a list of Hooks objects, such as hooks=[MyHooks()]")
    for hook in hooks:
        if not isinstance(hook, Hooks):
            raise ConfigurationError(f"hooks: {hook!r} is not an instance of ppo_mpi_base.hooks.Hooks")
        if not hook.does_something():
            raise ConfigurationError(f"hooks: {type(hook).__name__} has none of the methods {', '.join(MOMENTS)}")
