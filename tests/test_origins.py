# SPDX-License-Identifier: MIT
"""Results are followed back to what they were computed from, also where gradients are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ppo_mpi_base.origins import Origins

NONE, A, B, BOTH = frozenset(""), frozenset("a"), frozenset("b"), frozenset("ab")


def written_into_a_view(a: Tensor, b: Tensor) -> Tensor:
    memory = torch.zeros(3)
    memory[1:].add_(b[1:])
    return memory[0]


def given_as_out(a: Tensor, b: Tensor) -> Tensor:
    memory = torch.zeros(3)
    torch.mul(a.detach(), 2.0, out=memory)
    return memory


def seen_by_python(a: Tensor, b: Tensor) -> Tensor:
    return torch.ones(1) if a.sum() > 0 else torch.zeros(1)


def differentiated(a: Tensor, b: Tensor) -> Tensor:
    return torch.autograd.grad((b.exp()).sum(), b)[0]


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        pytest.param(lambda a, b: a.sin().sum(), A, id="one of them"),
        pytest.param(lambda a, b: torch.ones(2) * 2, NONE, id="none"),
        pytest.param(lambda a, b: a.sum() + 0 * b.sum(), BOTH, id="times 0"),
        pytest.param(lambda a, b: a * b.detach(), BOTH, id="detached"),
        pytest.param(lambda a, b: (b > 0.1).float().mean(), B, id="compared"),
        pytest.param(lambda a, b: torch.where(a > 0, b, 0.0), BOTH, id="chosen by"),
        pytest.param(lambda a, b: torch.stack([a, b])[0], BOTH, id="in one tensor"),
        pytest.param(lambda a, b: torch.nn.functional.linear(torch.ones(2, 3), a.expand(4, 3)), A, id="as a weight"),
        (written_into_a_view, B),
        (given_as_out, A),
        (seen_by_python, A),
        (differentiated, B),
    ],
)
def test_results_are_followed_to_what_they_come_from(
    compute: Callable[[Tensor, Tensor], Tensor], expected: frozenset[str]
) -> None:
    a, b = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    with Origins({"a": [a], "b": [b]}) as origins:
        result = compute(a, b)
    assert origins.of(result) == expected
