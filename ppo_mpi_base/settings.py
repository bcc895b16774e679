# SPDX-License-Identifier: MIT
"""Settings of a command-line run: flags and their help from `config.Config`, defaults from the task."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ppo_mpi_base import run_file, tasks
from ppo_mpi_base.checks import checked
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.keywords import KNOWN_AS, field_docstrings

ENV_ID = "A Gymnasium id, whose preset sets the defaults below, or the file of a run, such as runs/.../run.toml."
OWN: dict[str, tuple[Any, Any, str]] = {
    "hidden": (
        tuple[int, ...],
        (64, 64),
        "Units of each hidden layer of the policy and value networks, which use tanh; not for games.",
    ),
    "directory": (str | None, None, "Where run.toml, logs/ and saved_model/ go. None: runs/ENV_ID/seed<SEED>."),
}
"""Settings of a command-line run that are not keywords of `PPO()`: name -> type, default, help."""
ELSEWHERE = {"policy_kwargs", "critic_kwargs", "loss_coefficients", "log_directory", "save_location"}
"""Keywords of `PPO()` without a flag: other settings decide them, or they belong to a function of the user."""


def for_run(env_id_or_file: str, ranks: int, env_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings that a run starts with unless flags change them.

    Args:
        env_id_or_file: a Gymnasium id, for its preset; or a TOML file with `env_id` and the names of flags as keys,
            which override the preset.
        ranks: R, the number of ranks that share a preset's environments and minibatches.
        env_kwargs: those given by a flag, if any; the environment that they make decides the preset.

    Raises:
        ConfigurationError: there is no such environment or file, or a key of the file is not a setting.
    """
    given: dict[str, Any] = {"env_id": env_id_or_file}
    if env_id_or_file.endswith(".toml"):
        given = run_file.read(Path(env_id_or_file))
    usual = {name: default for name, (_, default, _) in OWN.items()}
    usual |= {name: item.default for name, item in _keywords().items()}
    if unknown := given.keys() - usual.keys() - {"env_id"}:
        raise ConfigurationError(
            f"{env_id_or_file}: unknown setting {min(unknown)!r}; `ppo-mpi train --help` lists all; write _ for -"
        )
    of_environment = given.get("env_kwargs") if env_kwargs is None else env_kwargs
    checked("env_kwargs", of_environment, dict[str, Any] | None)
    return {**usual, **tasks.settings(given["env_id"], ranks, of_environment), **given}


def check_own(chosen: dict[str, Any]) -> None:
    """Raise `ConfigurationError` if a setting that is not a keyword of `PPO()` has an invalid value."""
    hidden, directory = chosen["hidden"], chosen["directory"]
    whole = isinstance(hidden, list | tuple) and all(type(width) is int and width >= 1 for width in hidden)
    if not whole:
        raise ConfigurationError(f"hidden={hidden!r} must be whole numbers of at least 1, such as [64, 64]")
    if not isinstance(directory, str | None):
        raise ConfigurationError(f"directory={directory!r} must be the path of a directory")
    if directory == run_file.NONE:
        raise ConfigurationError(f"directory={directory!r} stands for None in run.toml: use './none' instead")


def flags(defaults: dict[str, Any]) -> type:
    """Return a dataclass for `tyro` of all settings that a command line can express, with these defaults."""
    positional = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID|FILE.toml", help=ENV_ID)]
    settings = [(name, kind, text) for name, (kind, _, text) in OWN.items()]
    settings += [(name, item.kind, item.text) for name, item in _keywords().items()]
    return dataclasses.make_dataclass(
        "Settings",
        [
            ("env_id", positional),
            *(
                (name, Annotated[kind, tyro.conf.arg(help=text)], _field(defaults[name]))
                for name, kind, text in settings
            ),
        ],
        namespace={"__doc__": "Train a policy for an environment, on all ranks."},
    )


@dataclasses.dataclass(frozen=True)
class _Keyword:
    """A field of `Config` on the command line: its type for `tyro`, its default and its help."""

    kind: Any
    default: Any
    text: str


@cache
def _keywords() -> dict[str, _Keyword]:
    """Return the keywords of `PPO()` that a command line can express: numbers, words and tables of them."""
    hints, texts = typing.get_type_hints(Config, include_extras=True), field_docstrings()
    kinds = {name: _kind(hint) for name, hint in hints.items() if name not in ELSEWHERE}
    return {
        item.name: _Keyword(kinds[item.name], _default(item), texts.get(item.name, ""))
        for item in dataclasses.fields(Config)
        if kinds.get(item.name) is not None
    }


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _kind(hint: Any) -> Any:
    """Return the type that `tyro` parses for an annotation of `Config`, without its range; None for a function."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, Union):
        kinds = [part if part is type(None) else _kind(part) for part in parts]
        kinds = [kind for kind in kinds if kind is not None]
        return None if kinds == [type(None)] else Union[tuple(kinds)]  # noqa: UP007 (made at run time)
    if origin is Annotated:
        return _kind(parts[0])
    if hint is int:
        return Annotated[int, _WHOLE]
    if origin is dict:
        return Annotated[dict, _TABLE]
    return hint if hint in (float, bool, str) or origin is Literal else None


def _whole(words: list[str]) -> int:
    if words[0].lstrip("+-").isdecimal():
        return int(words[0])  # exact for any number of digits
    number = float(words[0])
    if not number.is_integer():
        raise ValueError(f"{words[0]} is not a whole number")
    return int(number)


def check_flags(words: list[str]) -> None:
    """Raise `ConfigurationError` for a flag of other libraries that has a different name here."""
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in KNOWN_AS:
            flags = " and ".join(f"--{meant.replace('_', '-')}" for meant in KNOWN_AS[name].split(" and "))
            raise ConfigurationError(f"train: unknown flag --{name.replace('_', '-')}; here it is {flags}")


def env_kwargs_of(words: list[str]) -> dict[str, Any] | None:
    """Return the value of the flag --env-kwargs among a command line's words; None if it is missing or invalid."""
    for k, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") == "--env-kwargs":
            with contextlib.suppress(IndexError, ValueError):  # the parser reports them
                return _table([value or words[k + 1]])
    return None


def _table(words: list[str]) -> dict[str, Any]:
    table = json.loads(words[0])
    if not isinstance(table, dict):
        raise ValueError(f"{words[0]} is not a JSON object")
    return table


_WHOLE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=_whole,  # accepts 1e6 too
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)
_TABLE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=_table,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


def _field(default: Any) -> Any:
    value = tuple(default) if isinstance(default, list) else default  # TOML has no tuples
    return dataclasses.field(default_factory=lambda: value)
