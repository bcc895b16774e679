# SPDX-License-Identifier: MIT
"""All parameters in one tensor, all gradients in another, with named slices; clipping and Adam on these."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class FlatParameters:
    """Keep all parameters in the memory of one contiguous tensor, and all gradients in that of another.

    An update then costs one reduction over ranks, whose message is the gradient's own memory with a few statistics at
    its tail, and one optimizer step per slice. Never call a module's `zero_grad()`: it would detach the gradients.

    Args:
        slices: name -> the parameters of that slice. Each slice has its own learning rate and norm limit. A parameter
            listed in several slices belongs to the first.
        statistics: how many numbers the message carries at its tail.

    Attributes:
        data: (P,), all parameters.
        message: (P + S,), gradient and statistics.
        gradient, statistics: (P,) and (S,), the message's two parts.
        parts: the message as separate tensors of the same memory: each parameter's gradient in its shape, then the
            statistics.
        host: (P + S,), the message in host memory, where ranks reduce it; on a CPU, the same memory.
        slices: name -> slice of `data` and `gradient`.
        slice_names: the slice of each parameter, in the order of `parameters()`.
        blas_is_one: whether all ranks run the same BLAS code. If not, its products differ in their last bits, so norms
            are computed without it, in three times the time, to keep ranks in step.
    """

    blas_is_one = True

    def __init__(self, slices: dict[str, list[nn.Parameter]], statistics: int = 0) -> None:
        self._parameters: list[nn.Parameter] = []
        self.slices: dict[str, slice] = {}
        self.slice_names: list[str] = []
        seen: set[int] = set()
        end = 0
        for name, parameters in slices.items():
            start = end
            for parameter in parameters:
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._parameters.append(parameter)
                    self.slice_names.append(name)
                    end += parameter.numel()
            self.slices[name] = slice(start, end)
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        like = self._parameters[0]
        self.data = torch.empty(end, dtype=like.dtype, device=like.device)
        self.message = torch.zeros(end + statistics, dtype=like.dtype, device=like.device)
        self.gradient, self.statistics = self.message[:end], self.message[end:]
        self._on_host = like.device.type == "cpu"
        # Pinned: a device copies to and from such memory several times faster.
        on_host = self.message if self._on_host else torch.zeros_like(self.message, device="cpu").pin_memory()
        self.host = on_host.numpy()
        self._host_gradients = {name: self.host[part] for name, part in self.slices.items()}
        self._attach()

    def _attach(self) -> None:
        self.parts: list[Tensor] = []
        start = 0
        for parameter in self._parameters:
            part = slice(start, start + parameter.numel())
            self.data[part] = parameter.data.reshape(-1)
            parameter.data = self.data[part].view(parameter.shape)
            parameter.grad = self._part(start, parameter.shape)
            self.parts.append(parameter.grad)
            start = part.stop
        self.parts.append(self._part(start, self.statistics.shape))

    def _part(self, start: int, shape: torch.Size) -> Tensor:
        # The same memory, but not a view: torch.compile treats the size of a view's base as a variable.
        return torch.empty_like(self.message[:0]).set_(self.message.untyped_storage(), start, shape)  # type: ignore[call-overload]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of a tensor (P,), in that parameter's shape, in the order of `parameters()`."""
        # From stored sizes: while the losses are traced, looking at the parameters would trace them too.
        parts = flat.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order of `data`."""
        return list(self._parameters)

    def names(self, module: nn.Module) -> list[str]:
        """Return the parameters' names in a module that holds them, in the order of `data`."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return [names[id(parameter)] for parameter in self._parameters]

    def attached(self) -> bool:
        """Return whether all parameters and gradients still use the memory of the two tensors."""
        size, at, gradient_at = self.data.element_size(), self.data.data_ptr(), self.message.data_ptr()
        for parameter in self._parameters:
            if parameter.grad is None or parameter.data_ptr() != at or parameter.grad.data_ptr() != gradient_at:
                return False
            at, gradient_at = at + parameter.numel() * size, gradient_at + parameter.numel() * size
        return True

    def to_host(self) -> None:
        """Copy the message into `host`, if the device has its own memory."""
        if not self._on_host:
            torch.from_numpy(self.host).copy_(self.message)

    def from_host(self) -> None:
        """Copy `host` back into the message."""
        if not self._on_host:
            self.message.copy_(torch.from_numpy(self.host))

    def norm(self, name: str) -> float:
        """Return the Euclidean norm of one slice's gradient in `host`."""
        gradient = self._host_gradients[name]
        return math.sqrt(np.dot(gradient, gradient) if self.blas_is_one else np.einsum("i,i", gradient, gradient))

    def scale_(self, name: str, factor: float) -> None:
        """Multiply one slice's gradient by a number, in place."""
        if self._on_host:
            self._host_gradients[name] *= factor  # NumPy takes a third of the time
        else:
            self.gradient[self.slices[name]].mul_(factor)


def clip_scale(norm: float, limit: float | None) -> float:
    """Return the factor that scales a gradient of this norm to a norm of at most `limit`; None: no limit."""
    return 1.0 if limit is None or norm <= limit else limit / norm


ROUND_EVERY = 64
"""Steps between two roundings of moments near 0; meanwhile, the first moment falls to a thousandth."""
NEGLIGIBLE = 1e-30
"""Moments of at most this size become 0. If a unit has died, they would otherwise fall below 1.2e-38, and with such
numbers processors take a hundred times as long: on Pong, Adam's steps took eight times as long from the 800th on."""


class Adam:
    """Adam (Kingma & Ba 2015, arxiv.org/abs/1412.6980, algorithm 1) on the slices of a flat parameter tensor.

    Each slice counts its own steps, because policy and value function may take different numbers of them.
    """

    def __init__(self, flat: FlatParameters, epsilon: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.flat, self.epsilon, self.betas = flat, epsilon, betas
        self.first_moment = torch.zeros_like(flat.data)
        self.second_moment = torch.zeros_like(flat.data)
        self.steps = np.zeros(len(flat.slices), np.int64)
        whole = (flat.data, flat.gradient, self.first_moment, self.second_moment)
        counts = torch.zeros(len(flat.slices), dtype=torch.float32, device=flat.data.device)  # float32 for all dtypes
        # For each slice: its index in `steps`, its step count as the kernel wants it, and its part of each tensor.
        self._parts = {
            name: (k, counts[k], [tensor[part] for tensor in whole])
            for k, (name, part) in enumerate(flat.slices.items())
        }

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold Adam's state; writing into them restores it."""
        steps = torch.from_numpy(self.steps)
        return {"first_moment": self.first_moment, "second_moment": self.second_moment, "steps": steps}

    def step(self, learning_rates: dict[str, float], scales: dict[str, float] | None = None) -> None:
        """Update the parameters with their gradients.

        Args:
            learning_rates: by slice; slices without one do not change.
            scales: by slice, the factors for the gradients, applied first, in place; see `clip_scale`. None: 1.
        """
        for name, rate in learning_rates.items():
            k, count, (data, gradient, first, second) = self._parts[name]
            self.steps[k] += 1
            count.fill_(int(self.steps[k]))
            if scales and scales[name] != 1.0:
                self.flat.scale_(name, scales[name])
            if self.steps[k] % ROUND_EVERY == 0:
                for moment in (first, second):
                    moment.copy_(functional.hardshrink(moment, NEGLIGIBLE))
            # The kernel of torch.optim.Adam(fused=True), without its Python code, which costs several times more.
            torch._fused_adam_(
                [data],
                [gradient],
                [first],
                [second],
                [],
                [count],
                lr=rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=0.0,
                eps=self.epsilon,
                amsgrad=False,
                maximize=False,
            )
