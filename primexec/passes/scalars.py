"""Numbers that operators take as tensors of no dimensions, which kernels can read."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, numbers
from primexec.passes.emission import emit
from primexec.program import Program

_aten: Any = torch.ops.aten
# Operators that take a number, and those that take a tensor in its place: these convert it as they convert tensors.
_ARITHMETIC = {op: op for op in (_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.div.Tensor)}
_ARITHMETIC[_aten.rsub.Scalar] = _aten.rsub.Tensor
_COMPARISONS = {getattr(_aten, n).Scalar: getattr(_aten, n).Tensor for n in ("gt", "ge", "lt", "le", "eq", "ne")}
# These raise where the number is beyond the range of the result's dtype, and so does `alpha`.
_CHECKED = {
    **{getattr(_aten, n).default: getattr(_aten, n).Tensor for n in ("clamp", "clamp_min", "clamp_max")},
    **{op: _aten.where.self for op in (_aten.where.ScalarOther, _aten.where.ScalarSelf)},
    _aten.masked_fill.Scalar: _aten.masked_fill.Tensor,
    _aten.lerp.Scalar: _aten.lerp.Tensor,
}
_FORMS: dict[Any, Any] = _ARITHMETIC | _COMPARISONS | _CHECKED
# What Python reckons and never raises; tensors of float64 and int64 give the same.
_RECKONING: dict[Any, Any] = {
    operator.add: _aten.add.Tensor, operator.sub: _aten.sub.Tensor, operator.mul: _aten.mul.Tensor,
}  # fmt: skip
_HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class NumbersAsTensors:
    """Operators that take a number read off a tensor (`x.item()`, an argument that varies) take the tensor.

    So they can be fused. They stay where the number is reckoned with in a way that may raise, or where a tensor in its
    place would be rounded otherwise, or not be refused where a number is.
    """

    def __call__(self, program: Program) -> Program:
        return _Rewrite(program).run() if any(map(_is_number, program.nodes)) else program


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of float64 or int64 that holds a number, and how large that may be; infinite ones are not counted."""

    tensor: fx.Node
    largest: float


class _Rewrite:
    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.held: dict[fx.Node, _Held | None] = {}

    def run(self) -> Program:
        for node in self.program.graph_module.graph.nodes:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        changed = {node for node, copy in self.copies.items() if self._take_tensors(copy)}
        for node in reversed(self.program.nodes):
            if _is_number(node) and not self.copies[node].users:
                self.graph.erase_node(self.copies.pop(node))
                changed.add(node)
        calls = tuple(c.renamed(self.copies) for c in self.program.calls if changed.isdisjoint(c.nodes))
        return replace(
            self.program, graph_module=_torch.graph_module(self.program.graph_module, self.graph), calls=calls
        )

    def _take_tensors(self, node: fx.Node) -> bool:
        if node.target is _aten.scalar_tensor.default:
            return self._stand_for(node)
        given = [n for n in node.all_input_nodes if _is_number(n)] if node.target in _FORMS else []
        dtype = _computed_in(node) if given else None
        held = {n: self._hold(n) for n in given}
        if dtype is None or not all(_fits(node, h, dtype) for h in held.values()) or not _all_tensors(node):
            return False
        alpha: Any = node.kwargs.get("alpha")
        with self.graph.inserting_before(node):
            make = partial(emit, self.graph, node)
            cast: dict[Any, fx.Node] = {
                n: make(_aten._to_copy.default, h.tensor, dtype=dtype) for n, h in held.items() if h
            }
            args = [cast.get(a, a) for a in node.args]
            if alpha in cast:
                args[1] = make(_aten.mul.Tensor, args[1], cast[alpha])
        node.target, node.args = _FORMS[node.target], tuple(args)
        node.kwargs = {k: v for k, v in node.kwargs.items() if v not in cast}
        return True

    def _stand_for(self, node: fx.Node) -> bool:
        """Let the tensor that holds a number take the place of one that the program makes of it."""
        held = self._hold(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if held is None or held.tensor.meta["val"].dtype is not node.meta["val"].dtype:
            return False
        node.target, node.args, node.kwargs = _aten.clone.default, (held.tensor,), {}
        return True

    def _hold(self, number: fx.Node) -> _Held | None:
        """What holds a number from where it is read, or reckoned, on; None where nothing can."""
        if number not in self.held:
            self.held[number] = self._make(number)
        return self.held[number]

    def _make(self, number: fx.Node) -> _Held | None:
        if number.target is numbers.READ:
            return self._read(number)
        operands: list[Any] = [self._hold(v) if isinstance(v, fx.Node) else v for v in number.args]
        if number.target not in (*_RECKONING, operator.neg) or None in operands:
            return self._told(number) if _kind(number) is float else None
        if number.target is operator.neg:
            with self.graph.inserting_after(number):
                of: _Held = operands[0]
                return _Held(emit(self.graph, number, _aten.neg.default, of.tensor), of.largest)
        sizes = [v.largest if isinstance(v, _Held) else abs(v) for v in operands]
        largest = sizes[0] * sizes[1] if number.target is operator.mul else sizes[0] + sizes[1]
        whole = [abs(v) for v in operands if type(v) is int] + ([largest] if _kind(number) is int else [])
        if any(size > torch.iinfo(torch.int64).max for size in whole):  # Python's integers go on
            return None
        a, b = (v.tensor if isinstance(v, _Held) else v for v in operands)
        with self.graph.inserting_after(number):
            make = partial(emit, self.graph, number)
            if isinstance(a, fx.Node):
                return _Held(make(_RECKONING[number.target], a, b), largest)
            reflected = _aten.rsub.Scalar if number.target is operator.sub else _RECKONING[number.target]
            return _Held(make(reflected, b, a), largest)

    def _told(self, number: fx.Node) -> _Held:
        """A tensor made of a number that Python reckons, for it may raise."""
        with self.graph.inserting_after(number):
            tensor = emit(self.graph, number, _aten.scalar_tensor.default, number, dtype=torch.float64)
        return _Held(tensor, math.inf)

    def _read(self, number: fx.Node) -> _Held:
        source: Any = number.args[0]
        dtype = torch.float64 if _kind(number) is float else torch.int64
        with self.graph.inserting_after(number):
            tensor = emit(self.graph, number, _aten._to_copy.default, source, dtype=dtype)
        if tensor.meta["val"].dim():
            with self.graph.inserting_after(tensor):
                tensor = emit(self.graph, number, _aten.view.default, tensor, [])
        limits = (torch.finfo if dtype.is_floating_point else torch.iinfo)(source.meta["val"].dtype)
        return _Held(tensor, source.meta.get("largest", float(limits.max)))


def _is_number(node: fx.Node) -> bool:
    return numbers.symbol_of(node.meta.get("val")) is not None


def _kind(number: fx.Node) -> type:
    symbol = numbers.symbol_of(number.meta["val"])
    assert symbol is not None
    return symbol.kind


def _computed_in(node: fx.Node) -> torch.dtype | None:
    """The dtype in which an operator takes its numbers; None where a tensor in their place would change the result."""
    value: Tensor = node.meta["val"]
    tensors = [v for n in node.all_input_nodes if isinstance(v := n.meta["val"], Tensor) and v.dtype is not torch.bool]
    halves = any(t.dtype in _HALF for t in tensors)
    if not tensors or any(t.is_complex() or t.device.type != "cpu" for t in tensors):
        return None
    if halves:  # these alone take a tensor of one number with all its digits, as they take a number
        return torch.float32 if node.target in _ARITHMETIC and value.dim() and "alpha" not in node.kwargs else None
    if node.target not in _COMPARISONS:
        return value.dtype
    return torch.result_type(tensors[0], *(_kind(n)(2) for n in node.all_input_nodes if _is_number(n)))


def _fits(node: fx.Node, held: _Held | None, dtype: torch.dtype) -> bool:
    """Whether a number can be a tensor: the operator would not refuse it for its size."""
    checked = node.target in _CHECKED or "alpha" in node.kwargs
    if held is None or not checked:
        return held is not None
    is_float = held.tensor.meta["val"].is_floating_point()
    limits = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype)
    return held.largest <= limits.max and dtype.is_floating_point >= is_float


def _all_tensors(node: fx.Node) -> bool:
    """Whether no plain number stands where the form with tensors takes one of these."""
    formals = _FORMS[node.target]._schema.arguments
    given = zip(formals, node.args, strict=False)
    return all("Tensor" not in str(f.type) or a is None or isinstance(a, fx.Node) for f, a in given)
