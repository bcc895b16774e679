# SPDX-License-Identifier: MIT
"""Derives every random number of a run from its seed, keyed by purpose."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch

NETWORKS, EPISODES, ACTIONS, MINIBATCHES, EVALUATION, LAYERS = range(6)


def seed_sequence(seed: int, purpose: int, *key: int) -> np.random.SeedSequence:
    """Return the seed sequence of one purpose, independent of others; `key` distinguishes environments and the like."""
    return np.random.SeedSequence(seed, spawn_key=(purpose, *key))


def generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """Return NumPy's default generator for one purpose."""
    return np.random.default_rng(seed_sequence(seed, purpose, *key))


def seed_torch(seed: int, *key: int) -> None:
    """Seed torch's own random states, which layers such as dropout and users' functions draw from."""
    torch.manual_seed(int(seed_sequence(seed, LAYERS, *key).generate_state(1, np.uint64)[0]))


def torch_kept(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that preserves torch's random states: the CPU's, and that of the networks' device."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def torch_states(device: torch.device) -> dict[str, np.ndarray]:
    """Return torch's random states, by name: the CPU's, and that of the networks' device."""
    states = {"torch": torch.get_rng_state().numpy()}
    return {**states, "cuda": torch.cuda.get_rng_state(device).numpy()} if device.type == "cuda" else states


def restore_torch(states: dict[str, np.ndarray], device: torch.device) -> None:
    """Restore what `torch_states` returned; a device without a saved state keeps its own."""
    torch.set_rng_state(torch.as_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(torch.as_tensor(states["cuda"]), device)
