"""Runs what a trace has recorded so far on the real inputs, for values that Python asks for; nobody outside sees it.

Memory of the inputs is copied before it is first written to. The random numbers are those that the run will draw.
What differs from the run all the same (inputs of which two overlap, other threads) is found by the run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, draws, effects
from primexec.decisions import decide, following
from primexec.errors import RehearsalError

if TYPE_CHECKING:
    from primexec.tracer import Tracer


class Rehearsal:
    """The values of one trace."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._given: dict[fx.Node, Any] = {}
        self._values: dict[fx.Node, Any] = {}
        self._outside: set[int] = set()  # addresses of memory of the inputs that was not copied
        self._last: fx.Node | None = None
        self._generators: list[Any] = [torch.default_generator, *draws.generators()]
        self._states = [g.get_state() for g in self._generators]

    def give(self, placeholder: fx.Node, real: Any) -> None:
        """An input of the program."""
        self._given[placeholder] = real

    def answer(self, question: str, values: Sequence[Any]) -> Any:
        """The answer to a question, a function of `operator`, about what nodes stand for now, and other values."""
        watching = self._tracer.reads.pause()
        outside = [g.get_state() for g in self._generators]
        self._set(self._states)
        try:
            with _torch.quiet_modes(), torch.no_grad():
                for node in following(self._tracer.graph, self._last):
                    self._run(node)
                    self._last = node
                known = [self._value(v) if isinstance(v, fx.Node) else v for v in values]
                return getattr(operator, question)(*known)
        finally:
            self._states = [g.get_state() for g in self._generators]
            self._set(outside)
            self._tracer.reads.resume(watching)

    def _set(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def clear(self) -> None:
        """Let go of the tensors."""
        self._given.clear()
        self._values.clear()

    def _run(self, node: fx.Node) -> None:
        if node.target is decide:
            return
        for written in effects.writes(node):
            self._copy_memory(self._value(written))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        try:
            self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            self._tracer.failure = failure = RehearsalError(error, node.meta.get("source"))
            raise failure from error

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            real = self._given[node]
            if isinstance(real, torch.Generator):
                real = real.clone_state()
            else:
                self._outside.add(real.untyped_storage().data_ptr())
            self._values[node] = real
        return self._values[node]

    def _copy_memory(self, written: Tensor) -> None:
        """From now on everything in this memory lies in a copy of it, if it is an input's."""
        address = written.untyped_storage().data_ptr()
        if address not in self._outside:
            return
        self._outside.remove(address)
        storage = written.untyped_storage().clone()
        for node, value in self._values.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == address:
                copy = torch.empty(0, dtype=value.dtype, device=value.device)
                self._values[node] = copy.set_(storage, value.storage_offset(), value.shape, value.stride())
