# SPDX-License-Identifier: MIT
"""Every random number of a run derives from its seed here, keyed by what it is for."""

from __future__ import annotations

import numpy as np

NETWORKS, EPISODES, ACTIONS, MINIBATCHES, EVALUATION = range(5)


def seed_sequence(seed: int, purpose: int, *key: int) -> np.random.SeedSequence:
    """Return the seed sequence of one purpose, independent of others; `key` tells apart environments and the like."""
    return np.random.SeedSequence(seed, spawn_key=(purpose, *key))


def generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """Return NumPy's default generator for one purpose."""
    return np.random.default_rng(seed_sequence(seed, purpose, *key))
