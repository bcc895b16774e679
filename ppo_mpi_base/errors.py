# SPDX-License-Identifier: MIT
"""The two ways a run can go wrong that the package itself reports."""


class ConfigurationError(ValueError):
    """What the user asked for cannot work: one line that names the argument, its value and what would be right."""


class TrainingError(RuntimeError):
    """The run itself went wrong: one line that names the rank, the environment, the step and the source."""
