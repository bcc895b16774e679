# SPDX-License-Identifier: MIT
"""Evaluate a policy during its training without leaving a trace."""

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
    """Let a policy be evaluated, or tried as in training; then restore it and the global random states.

    The last bit of matrix products depends on where weights begin in memory and on the number of threads. So inside
    the context, weights are copied to separate tensors and one thread computes. Buffers are copied because networks
    may change them.
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
