# SPDX-License-Identifier: MIT
"""Functions that work in place on tensors: run as written, or compiled and called with little overhead."""

from __future__ import annotations

import itertools
import os
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import torch
from torch import Tensor

from ppo_mpi_base.config import Config

NUMBERS = itertools.count()
WORTHWHILE_MINIBATCHES, WORTHWHILE_MINIBATCHES_OF_IMAGES = 20_000, 1_500
"""Minibatches per rank above which compiling pays, even with an empty cache; see `benchmarks/compiling.py`."""

InPlace = Callable[..., None]
"""A function of tensors that returns nothing, but writes into some of them."""

Graph = Callable[[list[Any]], Any]
"""A compiled function; it may empty the list of its inputs."""


class Eager:
    """Leaves functions uncompiled: they run operation by operation."""

    def __call__(self, function: InPlace, what: str, uncompiled: InPlace | None = None) -> InPlace:
        """Return `uncompiled`, an equivalent that need not be traceable, or the function if there is none."""
        return uncompiled or function

    def check_again(self) -> None:
        """Do nothing: no compiled code can be out of date."""


class Compiler(Eager):
    """Compiles functions with `torch.compile`. What cannot be compiled runs uncompiled, and one line says why.

    Args:
        tell: prints that line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._made: list[_Compiled] = []

    def __call__(self, function: InPlace, what: str, uncompiled: InPlace | None = None) -> InPlace:
        """Return the function, to be compiled at its first call. `what` fills the gap in the line: "... uncompiled"."""
        self._made.append(_Compiled(function, uncompiled or function, what, self._tell_once))
        return self._made[-1]

    def _tell_once(self, line: str) -> None:
        """Print a line, unless another function, such as that for another minibatch size, has printed the same."""
        if line not in self._told:
            self._told.add(line)
            self._tell(line)

    def check_again(self) -> None:
        """Let each function's next call notice what has changed outside its tensors, such as a number in a hook."""
        for compiled in self._made:
            compiled.check_again()


def choose_compiler(
    config: Config, observations: gymnasium.Space, device: torch.device, ranks: int, tell: Callable[[str], None]
) -> Eager:
    """Return a compiler or `Eager`, as `config.compile` asks; `tell` prints a line if compiling is impossible."""
    worthwhile = WORTHWHILE_MINIBATCHES_OF_IMAGES if len(observations.shape or ()) == 3 else WORTHWHILE_MINIBATCHES
    if config.compile is False or (config.compile == "auto" and _minibatches(config, ranks) <= worthwhile):
        return Eager()
    if device.type == "cpu" and _cpp_compiler() is None:
        tell("compile: no C++ compiler (g++ or clang++) was found, so training runs uncompiled, several times slower")
        return Eager()
    return Compiler(tell)


def _minibatches(config: Config, ranks: int) -> float:
    """Return the approximate number of minibatches per rank in the run: those that compiling would speed up."""
    samples = config.samples_per_rank
    iterations = config.total_steps / (samples * ranks)
    # One network for both is trained for the policy's epochs.
    epochs = max(config.train_pi_epochs, config.train_v_epochs if config.value_network_fn else 0)
    return iterations * epochs * samples / config.minibatch_size


class _Compiled:
    """One function, whose compiled form is valid for one shape of each tensor.

    Before each call, `torch.compile` checks that its assumptions still hold: numbers that the function reads from
    outside, shapes, modules. For a small network, that takes longer than the gradient. Nothing checked changes between
    two minibatches, so only the first call of an iteration is checked. Other calls go straight to the compiled graph,
    and skip the wrappers of AOTAutograd if these only pass on its inputs. A function that changes what it depends on,
    such as one that counts its calls, runs another graph each time and is never called straight.
    """

    def __init__(self, function: InPlace, uncompiled: InPlace, what: str, tell: Callable[[str], None]) -> None:
        self._uncompiled, self._what, self._tell = uncompiled, what, tell
        self._checked = torch.compile(_own_code(function), backend=self._compile, fullgraph=True, dynamic=False)
        self._graph: Graph | None = None
        self._inputs: list[Any] = []
        self._places: list[tuple[int, int]] = []  # (index of the graph's input, index of the argument)
        self._failed = False
        self._called: list[tuple[Callable[..., Any], Graph, tuple[Any, ...]]] = []
        self._previous: Callable[..., Any] | None = None  # what the last checked call ran

    def check_again(self) -> None:
        self._graph = None

    def __call__(self, *tensors: Tensor) -> None:
        if self._graph is not None:
            inputs = self._inputs
            for place, argument in self._places:
                inputs[place] = tensors[argument]
            self._graph(inputs.copy())
        elif self._failed:
            self._uncompiled(*tensors)
        else:
            self._check_and_call(tensors)

    def _check_and_call(self, tensors: tuple[Tensor, ...]) -> None:
        before = [tensor.clone() for tensor in tensors]  # a failure half-way must not leave anything half-written
        self._called.clear()
        try:
            self._checked(*tensors)
        except Exception as error:  # whatever a tracer and a C++ compiler can raise
            self._tell(f"compile: {self._what} uncompiled ({_first_line(error)})")
            for tensor, content in zip(tensors, before, strict=True):
                tensor.copy_(content)
            self._failed = True
            self._uncompiled(*tensors)
            return
        if not self._called:
            return
        compiled, graph, inputs = self._called.pop()
        again, self._previous = compiled is self._previous, compiled
        if again:
            argument_of = {id(tensor): k for k, tensor in enumerate(tensors)}
            self._places = [(i, argument_of[id(x)]) for i, x in enumerate(inputs) if id(x) in argument_of]
            self._graph, self._inputs = graph, list(inputs)

    def _compile(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        on_cpu = all(x.device.type == "cpu" for x in examples if isinstance(x, Tensor))
        compiled = torch._inductor.compile(graph, list(examples), options={"cpp_wrapper": on_cpu})

        def call(*inputs: Any) -> Any:
            with _noting_graphs() as graphs:
                outputs = compiled(*inputs)
            straight = _straight(graphs, inputs) or (lambda inputs: compiled(*inputs))
            self._called.append((compiled, straight, inputs))
            return outputs

        return call


@contextmanager
def _noting_graphs() -> Iterator[list[tuple[Graph, list[Any], Any]]]:
    """Record which of Inductor's graphs are called in the block, with their inputs and outputs."""
    notes: list[tuple[Graph, list[Any], Any]] = []
    try:
        from torch._inductor.output_code import CompiledFxGraph
    except ImportError:  # another version of torch may keep it elsewhere: the wrappers stay
        yield notes
        return
    call = CompiledFxGraph.__call__

    def noting(graph: Any, inputs: list[Any]) -> Any:
        given = inputs.copy()  # the call empties the list
        outputs = call(graph, inputs)
        notes.append((graph.current_callable, given, outputs))
        return outputs

    CompiledFxGraph.__call__ = noting  # type: ignore[method-assign, assignment]
    try:
        yield notes
    finally:
        CompiledFxGraph.__call__ = call  # type: ignore[method-assign]


def _straight(graphs: list[tuple[Graph, list[Any], Any]], inputs: tuple[Any, ...]) -> Graph | None:
    """Return the only graph that a call ran, if it got the call's inputs and returned nothing; else None."""
    if len(graphs) != 1:
        return None
    graph, given, outputs = graphs[0]
    same = len(given) == len(inputs) and all(a is b for a, b in zip(given, inputs, strict=True))
    return graph if same and not outputs else None


def _cpp_compiler() -> str | None:
    """Return the C++ compiler that `torch.compile` would use on a CPU, or None."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def _own_code(function: InPlace) -> InPlace:
    # torch caches compiled code by code object, a few entries each: runs and minibatch sizes must not share one.
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(NUMBERS)}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
