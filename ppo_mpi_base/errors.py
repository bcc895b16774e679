# SPDX-License-Identifier: MIT
"""The two ways a run can go wrong that the package itself reports."""

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """What the user asked for cannot work: one line that names the argument, its value and what would be right."""


class TrainingError(RuntimeError):
    """The run itself went wrong: one line that names the rank, the environment, the step and the source."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one that is most like it, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
