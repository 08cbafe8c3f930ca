"""Parts of tensors that begin or end where a number says: a program serves all places that lie inside of the tensor."""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_rules, numbers, sizes
from primexec.decisions import decided_in
from primexec.numbers import Int, symbol_of

if TYPE_CHECKING:
    from primexec.tracer import Tracer

_TAKING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_NARROWING = frozenset({Tensor.narrow, torch.narrow})
_SLICE, _SLICE_BACKWARD = torch.ops.aten.slice.Tensor, torch.ops.aten.slice_backward.default


def taken(tracer: Tracer, fn: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a call that takes a part at unknown places: the part, and an index into it.

    Where it might lie outside, they stay as they are, and the values of the numbers are needed.
    """
    if fn in _NARROWING and len(args) == 4 and type(args[3]) is int and (start := _number(args[2])) is not None:
        dim = args[1] % max(args[0].dim(), 1) if type(args[1]) is int else 0
        part = _part(tracer, args[0], dim, slice(start, start + args[3]))
        return args if part is None else (part, args[1], 0, args[3])
    if fn not in _TAKING or not isinstance(args[0], Tensor):
        return args
    held, index = args[0], list(args[1]) if type(args[1]) is tuple else [args[1]]
    dim, dims = 0, [_dims(i) for i in index]
    if None in dims or sum(i is Ellipsis for i in index) > 1 or sum(dims) > held.dim():  # type: ignore[arg-type]
        return args
    for k, (i, count) in enumerate(zip(index, dims, strict=True)):
        number = _number(i)
        bounds = i if isinstance(i, slice) else None if number is None else slice(number, number + 1)
        if bounds is not None and (part := _part(tracer, held, dim, bounds)) is not None:
            held, index[k] = part, slice(None) if number is None else 0
        dim += held.dim() - sum(dims) if i is Ellipsis else count  # type: ignore[arg-type,operator]
    return args if held is args[0] else (held, tuple(index), *args[2:])


def _dims(index: Any) -> int | None:
    """How many dimensions something in an index takes; None where that is not known."""
    if isinstance(index, Tensor):
        return index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    if index is None or index is Ellipsis:
        return 0
    known = isinstance(index, slice) or type(index) is int or symbol_of(index) is not None
    return 1 if known else None


def _number(value: Any) -> Int | None:
    """A number whose value is known to the program only."""
    symbol = symbol_of(value)
    return Int(symbol) if symbol is not None and symbol.kind is int else None


def _part(tracer: Tracer, t: Tensor, dim: int, bounds: slice) -> Tensor | None:
    """The part of a tensor between two bounds; None where they are known, or are to be known."""
    size: Any = t.shape[dim]
    places: Any = (0 if bounds.start is None else bounds.start, size if bounds.stop is None else bounds.stop)
    start, stop = (v if (number := _number(v)) is None else number for v in places)
    unknown = [v for v in (start, stop) if isinstance(v, numbers.Number)]
    if not unknown or bounds.step not in (None, 1) or not all(_varies(tracer, n) for n in unknown):
        return None
    known = [v for v in (size, start, stop) if not isinstance(v, numbers.Number)]
    if not all(type(v) is int and 0 <= v <= size for v in known):
        return None
    length = _difference(stop, start)
    if length is None:  # sizes of one, and of the whole, have strides and views of their own
        inside = start >= 0 and stop <= size and 1 < (rows := stop - start) < size
        length = torch.ops.primexec.rows(numbers.as_tensor(tracer, rows.node)).shape[0] if inside else None
    elif length < 0 or not (start >= 0 and stop <= size):
        length = None
    if length is None:
        return None
    tracer.taking = length
    try:
        part: Tensor = _SLICE(t, dim, *tracer._stand_ins((start, stop)), 1)
        return part
    finally:
        tracer.taking = None


def _varies(tracer: Tracer, number: numbers.Number) -> bool:
    """Whether it need not be known here: in this line, in one before, or for it is made of inputs."""
    parts, before = _terms(number).keys() - {None}, tracer.numbers.places
    if decided_in(tracer.source()) not in tracer.reads.varying and not parts <= before and not number.varies():
        return False
    before |= parts
    return True


def _difference(stop: Any, start: Any) -> int | None:
    """stop - start, where that is the same whatever the numbers are."""
    terms = _terms(stop)
    for node, count in _terms(start).items():
        terms[node] = terms.get(node, 0) - count
    rest = terms.pop(None, 0)
    return None if any(terms.values()) else rest


def _terms(value: Any) -> dict[fx.Node | None, int]:
    """A number as a sum: how often each node is in it, and under None what is known."""
    if isinstance(value, int) and not isinstance(value, numbers.Number):
        return {None: value}
    node = numbers.node_of(value.node.tracer, value.node) if isinstance(value, numbers.Number) else value
    operands = [_terms(v) for v in node.args] if node.target in _SUMS else []
    factor = operands[1] if len(operands) > 1 else {None: 0}
    if node.target is operator.mul and operands[0].keys() <= {None}:
        operands, factor = operands[::-1], operands[0]
    if not operands or (node.target is operator.mul and not factor.keys() <= {None}):
        return {node: 1}
    if node.target is operator.mul:
        return {n: count * factor.get(None, 0) for n, count in operands[0].items()}
    sign = -1 if node.target is operator.sub else 1
    return {n: operands[0].get(n, 0) + sign * operands[1].get(n, 0) for n in operands[0] | operands[1]}


_SUMS = frozenset({operator.add, operator.sub, operator.mul})


def recorded(tracer: Tracer, op: Any, args: tuple[Any, ...]) -> Any:
    """The result of the operator that takes a part, or of its formula; None for any other."""
    if op is _SLICE and tracer.taking is not None:
        t, dim, start, *_ = args
        _torch_rules.allow_unknown_sizes(tracer.fake_mode, partial(sizes.answer, tracer))
        place = _torch_rules.unknown_size(tracer.fake_mode) if symbol_of(start) else start
        shape = (*t.shape[:dim], tracer.taking, *t.shape[dim + 1 :])
        with _torch.modes_off(), tracer.fake_mode:
            out = t.as_strided(shape, t.stride(), t.storage_offset() + place * t.stride(dim))
    elif op is _SLICE_BACKWARD and any(map(symbol_of, args)):
        with _torch.modes_off(), tracer.fake_mode:
            out = args[0].new_empty(args[1])
    else:
        return None
    return tracer.add_node(op, tracer._nodes(args), {}, out)
