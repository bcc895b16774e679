# SPDX-License-Identifier: MIT
"""Find out which tensors the results of a computation depend on, by following data through its operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Origins(TorchDispatchMode):
    """Follow named tensors through all operations in a `with` block; `of` then says what a result was computed from.

    Data are followed even where gradients are not: through `detach()`, comparisons and rounding. Memory that tensors
    share is tracked as a whole, so tensors with different names must not share any.

    Args:
        named: name -> tensors to follow under that name.
    """

    def __init__(self, named: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of: dict[int, frozenset[str]] = {}
        self._kept: list[Any] = []  # so that no new tensor reuses the memory of a known one
        self.seen_outside: frozenset[str] = frozenset()
        """Names whose values Python has read, e.g. by `item()` or `if`: all later results may depend on them."""
        for name, tensors in named.items():
            for tensor in tensors:
                self._note(tensor, frozenset({name}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: Dynamo need not be kept out of `__torch_dispatch__`, and loading it to do so takes seconds."""
        return False

    def of(self, result: Tensor) -> frozenset[str]:
        """Return the names of the tensors that a result was computed from."""
        return self._of.get(result.untyped_storage()._cdata, frozenset()) | self.seen_outside

    def _note(self, tensor: Tensor, names: frozenset[str]) -> None:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._of[storage._cdata] = self._of.get(storage._cdata, frozenset()) | names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note that its results depend on all of its inputs."""
        got = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        names = frozenset[str]().union(*map(self.of, got))
        results = func(*args, **(kwargs or {}))
        written = got if func._schema.is_mutable else []
        for x in (*tree_leaves(results), *written):
            if isinstance(x, Tensor):
                self._note(x, names)
            elif x is not None:
                self.seen_outside |= names
        return results
