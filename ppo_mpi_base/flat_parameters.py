# SPDX-License-Identifier: MIT
"""All parameters in one tensor, all gradients in another, with named slices; clipping and Adam on them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ppo_mpi_base.compilation import Eager, InPlace


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
        host: (P + S,), the message in the host's memory, where ranks reduce it: on a CPU the same memory.
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
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        like = self._parameters[0]
        self.data = torch.empty(end, dtype=like.dtype, device=like.device)
        self.message = torch.zeros(end + statistics, dtype=like.dtype, device=like.device)
        self.gradient, self.statistics = self.message[:end], self.message[end:]
        self._on_host = like.device.type == "cpu"
        self.host = self.message.numpy() if self._on_host else self.message.cpu().numpy()
        self._host_gradients = {name: self.host[part] for name, part in self.slices.items()}
        self._attach()

    def _attach(self) -> None:
        # The same memory, but no view: torch.compile takes the size of what gradients are views into for a variable.
        gradient = torch.empty_like(self.message[:0]).set_(self.message)  # type: ignore[call-overload]
        start = 0
        for parameter in self._parameters:
            part = slice(start, start + parameter.numel())
            self.data[part] = parameter.data.reshape(-1)
            parameter.data = self.data[part].view(parameter.shape)
            parameter.grad = gradient[part].view(parameter.shape)
            start = part.stop

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of a tensor (P,) in that parameter's shape, in the order of `parameters()`."""
        # Sizes that are known already: while the losses are traced, looking at the parameters would trace them too.
        parts = flat.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

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

    def to_host(self) -> None:
        """Copy the message into `host`, from a device that has a memory of its own."""
        if not self._on_host:
            torch.from_numpy(self.host).copy_(self.message)

    def from_host(self) -> None:
        """Copy `host` back into the message."""
        if not self._on_host:
            self.message.copy_(torch.from_numpy(self.host))

    def norm(self, name: str) -> float:
        """Return the Euclidean norm of one slice's gradient, as it is in `host`."""
        gradient = self._host_gradients[name]
        return math.sqrt(np.dot(gradient, gradient))


def clip_scale(norm: float, limit: float | None) -> float:
    """Return what a gradient of some norm must be multiplied by so that its norm is at most `limit`; None: no limit."""
    return 1.0 if limit is None or norm <= limit else limit / norm


class Adam:
    """Adam (Kingma & Ba 2015, arxiv.org/abs/1412.6980, algorithm 1) on the slices of a flat parameter tensor.

    Each slice counts its own steps, because policy and value function may take different numbers of them.
    """

    def __init__(
        self,
        flat: FlatParameters,
        epsilon: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        compiler: Eager | None = None,
    ) -> None:
        self.flat, self.epsilon, self.betas = flat, epsilon, betas
        self.first_moment = torch.zeros_like(flat.data)
        self.second_moment = torch.zeros_like(flat.data)
        self.steps = np.zeros(len(flat.slices), np.int64)
        # Of each slice, what `_move` works on; and for each set of slices, the function that moves them together.
        whole = (flat.data, self.first_moment, self.second_moment, flat.gradient)
        self._parts = {name: [tensor[part] for tensor in whole] for name, part in flat.slices.items()}
        self._compiler = compiler or Eager()
        self._moves: dict[tuple[str, ...], tuple[InPlace, Tensor]] = {}
        self._index = {name: k for k, name in enumerate(flat.slices)}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold everything; writing into them restores it."""
        steps = torch.from_numpy(self.steps)
        return {"first_moment": self.first_moment, "second_moment": self.second_moment, "steps": steps}

    @torch.no_grad()
    def step(self, learning_rates: dict[str, float], scales: dict[str, float] | None = None) -> None:
        """Move parameters by their gradients, which are left as they are.

        Args:
            learning_rates: by slice; slices that are not among them rest.
            scales: what to multiply a slice's gradient by first; see `clip_scale`. None: by 1.
        """
        names = tuple(learning_rates)
        if not names:
            return
        if names not in self._moves:
            self._moves[names] = self._compiler(_move(self.betas), "Adam runs"), self.flat.data.new_empty(len(names), 3)
        numbers, parts = [], []
        for name, rate in learning_rates.items():
            self.steps[self._index[name]] += 1
            count = int(self.steps[self._index[name]])
            # Algorithm 1 with both bias corrections moved into the step size and epsilon, as its section 2 proposes.
            correction = math.sqrt(1 - self.betas[1] ** count)
            step_size = rate * correction / (1 - self.betas[0] ** count)
            numbers.append((scales[name] if scales else 1.0, step_size, self.epsilon * correction))
            parts += self._parts[name]
        move, given = self._moves[names]
        if given.device.type == "cpu":
            given.numpy()[:] = numbers  # ten times as fast as torch.tensor(numbers)
        else:
            given.copy_(torch.tensor(numbers))
        move(*parts, given)


def _move(betas: tuple[float, float]) -> InPlace:
    """Return Adam's step on some slices.

    It takes, for each slice, parameters, first and second moment and gradient, (n,) each; and last, (slices, 3), the
    scale of the gradient, the step size and epsilon of each.
    """
    beta1, beta2 = betas

    def move(*tensors: Tensor) -> None:
        for k, (scale, step_size, epsilon) in enumerate(tensors[-1]):
            data, first, second, gradient = tensors[4 * k : 4 * k + 4]
            scaled = gradient * scale
            first.lerp_(scaled, 1 - beta1)
            second.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            data.sub_(step_size * first / (second.sqrt() + epsilon))

    return move
