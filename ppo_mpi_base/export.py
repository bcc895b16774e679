# SPDX-License-Identifier: MIT
"""Export a saved policy for other programs: one function observations -> actions, in ONNX or torch's own format."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.files import without_ending, write_whole
from ppo_mpi_base.policies import ActorCritic, Categorical
from ppo_mpi_base.saved_policy import load_actor_critic

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
"""Absolute and relative tolerance for differences between exported and original actions or logits."""

Actions = Callable[[Tensor], Tensor]


def export_policy(
    directory: str | Path,
    output: str | Path,
    *,
    which: Literal["best", "latest"] = "best",
    formats: Sequence[str] = ("onnx", "torch"),
    network_fn: Callable[..., nn.Module] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
) -> list[Path]:
    """Write a saved policy as a function of observations alone, with the normalization inside, in each format.

    The function takes `observations` (B, *shape) in the observation space's dtype, for any B >= 1; after a training
    with `state_processing_hook`, these are what the hook returns. It returns `actions` (B, ...): the most probable
    ones, as the environment takes them, computed in float32. Before anything is written, each exported function is
    tested on random observations (the ONNX one only if onnxruntime is installed).

    Args:
        directory: the `save_location` that was given to `PPO()`.
        output: the files' common path; ".onnx" and ".pt2" are appended.
        which: the networks that earned the best mean return, or the latest.
        formats: "onnx" (needs onnx and onnxscript), "torch" (for `torch.export.load(path).module()`), or both.
        network_fn: builds the policy network, if `load_policy` needs it.
        policy_kwargs: keyword arguments of `network_fn`.

    Returns:
        The files' paths, in the order of `formats`.

    Raises:
        ConfigurationError: there is no such policy or format, a package is missing, the network cannot be exported for
            every B, or an exported function acts differently (nothing is written then); or the files cannot be written.
    """
    if not formats or not set(formats) <= set(SUFFIXES):
        raise ConfigurationError(f"formats={tuple(formats)!r} must be one or more of {', '.join(map(repr, SUFFIXES))}")
    saved = load_actor_critic(directory, which, network_fn=network_fn, policy_kwargs=policy_kwargs)
    actor_critic = saved.actor_critic.eval().requires_grad_(False)
    actor_critic.precision = "float32"  # other programs may lack bfloat16
    program = _program(actor_critic)
    contents = {}
    for name in formats:
        contents[name], exported = _onnx(program) if name == "onnx" else _torch(program)
        if exported is not None:
            _check(name, exported, actor_critic)
    base = without_ending(output, SUFFIXES.values())
    paths = [base.with_name(base.name + SUFFIXES[name]) for name in formats]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for path, name in zip(paths, formats, strict=True):
            write_whole(path, contents[name])
    except OSError as error:
        raise ConfigurationError(f"output={str(output)!r} cannot be written ({error.strerror})") from error
    return paths


class _Actor(nn.Module):
    """The most probable actions of a policy, as the environment takes them."""

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__()
        self.actor_critic = actor_critic

    def forward(self, observations: Tensor) -> Tensor:
        return self.actor_critic.to_environment(self.actor_critic.policy(observations).mode())


def _program(actor_critic: ActorCritic) -> torch.export.ExportedProgram:
    """Return the policy's graph, for any number of observations."""
    dynamic_shapes = {"observations": {0: torch.export.Dim("batch", min=1)}}
    try:
        # Two observations: torch would treat a batch size of 1 as a constant.
        return torch.export.export(
            _Actor(actor_critic), (_observations(actor_critic, 2),), dynamic_shapes=dynamic_shapes
        )
    except Exception as error:  # of many classes, some of them torch's private ones
        raise ConfigurationError(f"network_fn: torch.export cannot export this network: {_line(error)}") from error


def _torch(program: torch.export.ExportedProgram) -> tuple[bytes, Actions]:
    """Return the file's content, and the function loaded from it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _onnx(program: torch.export.ExportedProgram) -> tuple[bytes, Actions | None]:
    """Return the file's content, and the function that onnxruntime loads from it, None if that is not installed."""
    try:
        import onnx  # noqa: F401 (torch's exporter needs both, and says so only at its end)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"formats: 'onnx' needs a package that is missing ({error}): pip install onnx onnxscript onnxruntime"
        ) from error
    try:
        with _silent():
            model = torch.onnx.export(
                program,
                (),
                input_names=["observations"],
                output_names=["actions"],
                dynamic_shapes={"observations": {0: "batch"}},
                dynamo=True,
                verbose=False,
            )
        assert model is not None
        content = model.model_proto.SerializeToString()
    except Exception as error:  # of many classes, most of them the exporter's private ones
        raise ConfigurationError(f"network_fn: this network cannot be expressed in ONNX: {_line(error)}") from error
    try:
        import onnxruntime
    except ImportError:
        return content, None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.as_tensor(session.run(["actions"], {"observations": x.numpy()})[0])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the exporter's messages about its internals, and about torchvision if that is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check(name: str, exported: Actions, actor_critic: ActorCritic) -> None:
    """Raise `ConfigurationError` unless an exported function acts like the policy."""
    for batch in (1, 64):
        observations = _observations(actor_critic, batch)
        distribution = actor_critic.policy(observations)
        wanted = actor_critic.to_environment(distribution.mode())
        try:
            found = exported(observations)
        except Exception as error:  # from whichever runtime
            raise ConfigurationError(f"formats: the policy exported to {name!r} fails: {_line(error)}") from error
        same = found.shape == wanted.shape and found.dtype == wanted.dtype
        if same and isinstance(distribution, Categorical):
            # If two actions are equally probable up to rounding, either is right.
            start = wanted[:1] - distribution.mode()[:1]
            logits = distribution.logits
            found, wanted = logits.gather(-1, (found - start).unsqueeze(-1)), logits.max(-1, keepdim=True).values
        if not same or not torch.allclose(found, wanted, TOLERANCE, TOLERANCE, equal_nan=True):
            raise ConfigurationError(f"formats: the policy exported to {name!r} acts differently from the original")


def _observations(actor_critic: ActorCritic, batch: int) -> Tensor:
    """Return random observations (batch, *shape), spread as the normalization expects, if there is one."""
    space = actor_critic.observation_space
    if actor_critic.normalize_observations:
        mean, std = actor_critic.observation_mean, actor_critic.observation_std
        noise = np.random.default_rng(0).standard_normal((batch, *mean.shape))
        return torch.as_tensor((mean.numpy() + 2 * std.numpy() * noise).astype(space.dtype))
    space.seed(0)
    return torch.as_tensor(np.stack([space.sample() for _ in range(batch)]))


def _line(error: Exception) -> str:
    """Return the first line of an error's message: torch's are pages long."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
