"""Index maps: which element of a tensor belongs to a point of a kernel's domain, and what views make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True, slots=True)
class Term:
    """`offset + Σ strides[a] · i_a + Σ factor · read`: the index along one dimension of a tensor.

    Attributes:
        strides: one for each axis of the domain.
        reads: indices that are data, with their factors.
    """

    offset: int
    strides: tuple[int, ...]
    reads: tuple[tuple[int, Read], ...] = ()

    def plus(self, other: Term) -> Term:
        strides = tuple(a + b for a, b in zip(self.strides, other.strides, strict=True))
        return Term(self.offset + other.offset, strides, self.reads + other.reads)

    def times(self, factor: int, offset: int = 0) -> Term:
        reads = tuple((f * factor, r) for f, r in self.reads) if factor else ()
        return Term(self.offset * factor + offset, tuple(s * factor for s in self.strides), reads)


Map = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """An element of an integer tensor that is an index along a dimension of another one.

    Attributes:
        node: the integer tensor; `index` tells which of its elements.
        size: of the dimension; what lies outside of it is an error.
        wraps: whether negative ones count from the end.
        user: the operator that indexes.
    """

    node: fx.Node
    index: Map
    size: int
    wraps: bool
    user: fx.Node


def unit(axis: int, rank: int, size: int) -> Term:
    """The axis itself; nothing for an axis of size 1, so that equal maps compare equal."""
    return Term(0, tuple(int(a == axis and size != 1) for a in range(rank)))


@cache
def identity(shape: tuple[int, ...]) -> Map:
    """The domain's own index."""
    return tuple(unit(a, len(shape), n) for a, n in enumerate(shape))


def constant(offset: int, rank: int) -> Term:
    """The same index at every point."""
    return Term(offset, (0,) * rank)


def linear(index: Map, strides: Sequence[int], rank: int) -> Term:
    """Element offset of an index in a tensor with these strides."""
    total = constant(0, rank)
    for term, stride in zip(index, strides, strict=True):
        total = total.plus(term.times(stride))
    return total


def reads_of(index: Map) -> Iterator[Read]:
    """The indices among the data that a map depends on, those of these indices left out."""
    for term in index:
        for _, read in term.reads:
            yield read


# Each view: from the node, its argument's shape and an index of the result to the index of the argument; None where
# no affine map does it.
ViewMap = Callable[[fx.Node, Sequence[int], Map, int], "Map | None"]


def _dims(node: fx.Node) -> Sequence[int]:
    found: Any = node.args[1]
    return found  # type: ignore[no-any-return]


def _broadcast(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    places: Any = node.args[2]
    return tuple(index[d] if shape[i] != 1 else constant(0, rank) for i, d in enumerate(places))


def _squeeze(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    gone = {d % len(shape) for d in _dims(node)}
    rest = iter(index)
    return tuple(constant(0, rank) if i in gone else next(rest) for i in range(len(shape)))


def _transpose(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    found: list[Term] = [constant(0, rank)] * len(shape)
    for term, d in zip(index, _dims(node), strict=True):
        found[d] = term
    return tuple(found)


def bounds(node: fx.Node, first: int, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The dimension, start, end and step of a slice, whose arguments begin at number `first`."""
    args: list[Any] = [*node.args[first:], *(None,) * 4][:4]
    dim, start, end, step = (node.kwargs.get(n, a) for n, a in zip(("dim", "start", "end", "step"), args, strict=True))
    dim = (dim or 0) % len(shape)
    size = shape[dim]

    def inside(place: int | None, default: int) -> int:
        place = default if place is None else place
        return max(0, min(place + size if place < 0 else place, size))

    return dim, inside(start, 0), inside(end, size), step or 1


def _slice(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    dim, start, _, step = bounds(node, 1, shape)
    return tuple(t.times(step, start) if d == dim else t for d, t in enumerate(index))


def _reverse(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    dims = {d % len(shape) for d in _dims(node)}
    return tuple(t.times(-1, shape[d] - 1) if d in dims else t for d, t in enumerate(index))


def _reshape(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map | None:
    return split(node.meta["val"].shape, shape, index, rank)


def split(out: Sequence[int], shape: Sequence[int], index: Map, rank: int) -> Map | None:
    """The index in a shape whose dimensions are split, or come and go with size 1, for an index of the result."""
    found: list[Term] = []
    j = 0
    for size in shape:
        if size == 1:
            found.append(constant(0, rank))
            continue
        term, covered = constant(0, rank), 1
        while covered < size:
            if j == len(out):
                return None
            term, covered = term.times(out[j]).plus(index[j]), covered * out[j]
            j += 1
        if covered != size:
            return None
        found.append(term)
    return tuple(found) if math.prod(out[j:]) == 1 else None


def is_reshaped(source: Tensor, result: Tensor) -> bool:
    """Whether contiguous memory is seen as contiguous memory of another shape."""
    same = source.numel() == result.numel() and source.storage_offset() == result.storage_offset()
    return same and source.is_contiguous() and result.is_contiguous()


def _strided(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map | None:
    """Contiguous memory in another shape, or windows: each step in the result is one along a dimension."""
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if is_reshaped(source, result):
        return _reshape(node, shape, index, rank)
    dims = sorted((d for d, n in enumerate(shape) if n > 1 and source.stride(d)), key=source.stride, reverse=True)
    found, last = [constant(0, rank)] * len(shape), [0] * len(shape)
    for term, size, stride in zip(index, result.shape, result.stride(), strict=True):
        if size == 1 or stride == 0:
            continue
        dim = next((d for d in dims if stride % source.stride(d) == 0), None)
        if dim is None:
            return None
        steps = stride // source.stride(dim)
        found[dim], last[dim] = found[dim].plus(term.times(steps)), last[dim] + steps * (size - 1)
    inside = all(place < n for place, n in zip(last, shape, strict=True))
    return tuple(found) if inside and source.storage_offset() == result.storage_offset() else None


def _same(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    return index


VIEWS: dict[str, ViewMap] = {
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _reverse,
    "view": _reshape,
    "as_strided": _strided,
    "view_of": _same,
}
