# SPDX-License-Identifier: MIT
"""The two kinds of errors that the package itself reports, and helpers to report them."""

import contextlib
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any


class ConfigurationError(ValueError):
    """What the user asked for cannot work: one line that names the argument, its value and what would be right."""


class TrainingError(RuntimeError):
    """The run itself went wrong: one line that names the rank, the environment, the step and the source."""


def last_words(text: str) -> None:
    """Write to stderr at once; if that fails, as on a full disk, carry on."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the most similar known one, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_takes(name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """Raise `ConfigurationError` if a user's function does not accept the arguments it will be called with.

    Args:
        name: the name by which the user knows the function.
        function: the function; it is not called.
        arguments: names of its positional arguments.
        keywords: its keyword arguments.
    """
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        takes = ", ".join([*arguments, *(f"{key}=..." for key in keywords)])
        raise ConfigurationError(f"{name} must accept the arguments ({takes}), but does not: {error}") from error
    except ValueError:  # a builtin function without a signature
        pass
