# SPDX-License-Identifier: MIT
"""Evaluate a policy in the midst of its training, and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.seeding import torch_kept


@contextmanager
def undisturbed(policy: ActorCritic, evaluating: bool = True) -> Iterator[None]:
    """Let a policy be evaluated, or tried as in training; afterwards it and the global random states are as before.

    Matrix products depend, to the last bit, on where in memory weights begin and on how many threads there are. So
    weights move to tensors of their own for the time, and one thread computes; buffers, since networks may change them.
    """
    modes = [(module, module.training) for module in policy.modules()]
    weights = [(parameter, parameter.data) for parameter in policy.parameters()]
    buffers = [(m, name, buffer) for m in policy.modules() for name, buffer in m.named_buffers(recurse=False)]
    states, threads = (random.getstate(), np.random.get_state()), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        if evaluating:
            policy.eval()
        for parameter, data in weights:
            parameter.data = data.clone(memory_format=torch.contiguous_format)
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        with torch.no_grad(), torch_kept(policy.device):
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for parameter, data in weights:
            parameter.data = data
        for module, training in modes:
            module.training = training
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
