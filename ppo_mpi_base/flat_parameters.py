# SPDX-License-Identifier: MIT
"""All parameters in one tensor, all gradients in another, with named slices; clipping and Adam on them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


class FlatParameters:
    """Make every parameter a view into one contiguous tensor, and every gradient a view into another.

    A minibatch then costs one reduction over ranks, whose message is the gradient's own memory with a few statistics at
    its tail, and one optimizer step on one tensor. Never call a module's `zero_grad()`: it would cut the views.

    Args:
        slices: name -> the parameters of that slice, each with its own learning rate and norm limit. A parameter that
            stands in several slices belongs to the first.
        statistics: how many numbers travel at the message's tail.

    Attributes:
        data: (P,), all parameters.
        message: (P + S,), gradient and statistics.
        gradient, statistics: (P,) and (S,), the message's two parts.
        slices: name -> slice of `data` and `gradient`.
    """

    def __init__(self, slices: dict[str, list[nn.Parameter]], statistics: int = 0) -> None:
        self._parameters: list[nn.Parameter] = []
        self.slices: dict[str, slice] = {}
        seen: set[int] = set()
        end = 0
        for name, parameters in slices.items():
            start = end
            for parameter in parameters:
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._parameters.append(parameter)
                    end += parameter.numel()
            self.slices[name] = slice(start, end)
        like = self._parameters[0]
        self.data = torch.empty(end, dtype=like.dtype, device=like.device)
        self.message = torch.zeros(end + statistics, dtype=like.dtype, device=like.device)
        self.gradient, self.statistics = self.message[:end], self.message[end:]
        self._attach()

    def _attach(self) -> None:
        start = 0
        for parameter in self._parameters:
            part = slice(start, start + parameter.numel())
            self.data[part] = parameter.data.reshape(-1)
            parameter.data = self.data[part].view(parameter.shape)
            parameter.grad = self.gradient[part].view(parameter.shape)
            start = part.stop

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of a tensor (P,) in that parameter's shape, in the order of `parameters()`."""
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order of their places in `data`."""
        return list(self._parameters)

    def names(self, module: nn.Module) -> list[str]:
        """Return what a module that holds them calls the parameters, in the order of their places in `data`."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return [names[id(parameter)] for parameter in self._parameters]

    def attached(self) -> bool:
        """Say whether all parameters and gradients still are views into the two tensors."""
        size, at, gradient_at = self.data.element_size(), self.data.data_ptr(), self.message.data_ptr()
        for parameter in self._parameters:
            if parameter.grad is None or parameter.data_ptr() != at or parameter.grad.data_ptr() != gradient_at:
                return False
            at, gradient_at = at + parameter.numel() * size, gradient_at + parameter.numel() * size
        return True

    def norm(self, name: str) -> float:
        """Return the Euclidean norm of one slice's gradient."""
        gradient = self.gradient[self.slices[name]]
        return math.sqrt(torch.dot(gradient, gradient).item())

    def clip_(self, name: str, norm: float, limit: float | None) -> None:
        """Scale one slice's gradient, whose norm is known, to a norm of at most `limit`."""
        if limit is not None and norm > limit:
            self.gradient[self.slices[name]].mul_(limit / norm)


class Adam:
    """Adam (Kingma & Ba 2015, arxiv.org/abs/1412.6980, algorithm 1) on the slices of a flat parameter tensor.

    Each slice counts its own steps, because policy and value function may take different numbers of them.
    """

    def __init__(self, flat: FlatParameters, epsilon: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.flat, self.epsilon, self.betas = flat, epsilon, betas
        self.first_moment = torch.zeros_like(flat.data)
        self.second_moment = torch.zeros_like(flat.data)
        self.steps = np.zeros(len(flat.slices), np.int64)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold everything; writing into them restores it."""
        steps = torch.from_numpy(self.steps)
        return {"first_moment": self.first_moment, "second_moment": self.second_moment, "steps": steps}

    @torch.no_grad()
    def step(self, name: str, learning_rate: float) -> None:
        """Move one slice's parameters by its gradient, which is left as it is."""
        part = self.flat.slices[name]
        gradient, m, v = self.flat.gradient[part], self.first_moment[part], self.second_moment[part]
        beta1, beta2 = self.betas
        index = list(self.flat.slices).index(name)
        self.steps[index] += 1
        count = int(self.steps[index])
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2**count)
        denominator = v.sqrt().add_(self.epsilon * correction)
        self.flat.data[part].addcdiv_(m, denominator, value=-learning_rate * correction / (1 - beta1**count))
