"""Index maps of operators that index by data: from an index of their result to one of the tensor that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.llvm import maps
from primexec.executors.llvm.maps import Map, Read, Term, ViewMap
from primexec.program import base_name

_INDICES = frozenset({torch.int64, torch.int32})
_COUNTING = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
# Factor and summand.
_LINEAR: dict[str, Callable[[int], tuple[int, int]]] = {
    "add": lambda n: (1, n),
    "sub": lambda n: (1, -n),
    "mul": lambda n: (n, 0),
}


def _term(read: Read, rank: int) -> Term:
    """The index that data gives; where that is known to go up or down in equal steps, and inside, without the data."""
    known = _counted(read.node, read.index, rank)
    if known is not None:
        term, low, high = known
        if low >= 0 and high < read.size:
            return term
        if read.wraps and low >= -read.size and high < 0:
            return term.times(1, read.size)
    return Term(0, (0,) * rank, ((1, read),))


def _counted(node: fx.Node, index: Map, rank: int) -> tuple[Term, int, int] | None:
    """What counts in equal steps along each dimension, at an index, and its least and largest elements."""
    made: Any = node.meta["val"]
    if node.op != "call_function" or not made.numel() or made.dtype not in _COUNTING:
        return None
    name = base_name(node)
    if name == "iota":
        start, step = node.kwargs["start"], node.kwargs["step"]
        if not isinstance(start, int) or not isinstance(step, int):
            return None
        last = start + step * (made.shape[0] - 1)
        return index[0].times(step, start), min(start, last), max(start, last)
    if name == "full":
        number: Any = node.args[1]
        return (Term(number, (0,) * rank), number, number) if isinstance(number, int) else None
    if name in maps.VIEWS:
        source: Any = node.args[0]
        at = maps.VIEWS[name](node, source.meta["val"].shape, index, rank)
        return None if at is None else _counted(source, at, rank)
    if name in _LINEAR or name == "convert_element_type":
        return _linear(name, node, made.dtype, index, rank)
    return None


def _linear(name: str, node: fx.Node, dtype: torch.dtype, index: Map, rank: int) -> tuple[Term, int, int] | None:
    """A conversion of what counts, its sum or product with a number, or the sum or difference of two; no overflow."""
    source, other = node.args[0], node.args[1] if name in _LINEAR else 0
    if not isinstance(source, fx.Node) or node.kwargs.keys() - {"dtype"}:
        return None
    known = _counted_at(source, index, rank)
    if known is None:
        return None
    term, low, high = known
    if isinstance(other, fx.Node):
        second = _counted_at(other, index, rank) if name != "mul" else None
        if second is None:
            return None
        sign = _LINEAR[name](1)[1]
        term = term.plus(second[0].times(sign))
        low, high = low + min(sign * second[1], sign * second[2]), high + max(sign * second[1], sign * second[2])
    elif isinstance(other, int):
        factor, more = _LINEAR[name](other) if name in _LINEAR else (1, 0)
        low, high = sorted((low * factor + more, high * factor + more))
        term = term.times(factor, more)
    else:
        return None
    room = torch.iinfo(dtype)
    return (term, low, high) if room.min <= low and high <= room.max else None


def _counted_at(node: fx.Node, index: Map, rank: int) -> tuple[Term, int, int] | None:
    return _counted(node, index if node.meta["val"].dim() else (), rank)


def _gather(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    given: Any = node.args[1]
    dim = given % len(shape)
    read = Read(node.args[2], index, shape[dim], False, node)  # type: ignore[arg-type]
    return tuple(_term(read, rank) if d == dim else t for d, t in enumerate(index))


def _index(node: fx.Node, shape: Sequence[int], index: Map, rank: int) -> Map:
    """NumPy's rule: the indexed dimensions' place is the first one's, or the front if they stand apart."""
    given: Any = node.args[1]
    places: list[fx.Node | None] = [*given, *[None] * (len(shape) - len(given))]
    indexed = [d for d, p in enumerate(places) if p is not None]
    width = max(p.meta["val"].dim() for p in places if p is not None)
    first = indexed[0] if indexed[-1] - indexed[0] == len(indexed) - 1 else 0
    common, rest = index[first : first + width], iter((*index[:first], *index[first + width :]))
    found = []
    for d, place in enumerate(places):
        if place is None:
            found.append(next(rest))
            continue
        sizes = place.meta["val"].shape
        at = common[width - len(sizes) :]
        own = tuple(maps.constant(0, rank) if n == 1 else t for n, t in zip(sizes, at, strict=True))
        found.append(_term(Read(place, own, shape[d], True, node), rank))
    return tuple(found)


def indexed_shape(node: fx.Node, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what `index` reads, or `index_put` writes."""
    given: Any = node.args[1]
    places = [*given, *[None] * (len(shape) - len(given))]
    indexed = [d for d, p in enumerate(places) if p is not None]
    common = torch.broadcast_shapes(*(p.meta["val"].shape for p in places if p is not None))
    first = indexed[0] if indexed[-1] - indexed[0] == len(indexed) - 1 else 0
    rest = [n for n, p in zip(shape, places, strict=True) if p is None]
    return (*rest[:first], *common, *rest[first:])


INDIRECT: dict[str, ViewMap] = {"gather": _gather, "index": _index}


def why_not(node: fx.Node, name: str) -> str:
    """Why an operator of INDIRECT has no map; empty where it has one."""
    source, *rest = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    if not shape:
        return "it indexes a number"
    given: Any = {rest[0]: rest[1]} if name == "gather" else dict(enumerate(rest[0]))  # type: ignore[arg-type]
    places = {d: p for d, p in given.items() if p is not None}
    if not places:
        return "it indexes nothing"
    if any(p.meta["val"].dtype not in _INDICES for p in places.values()):
        return "an index is neither int64 nor int32"
    result: Tensor = node.meta["val"]
    if name == "gather" and result.dim() != len(shape):
        return "the index is a number"
    if any(shape[d] == 0 for d in places) and (result.numel() or name != "gather"):
        return "it indexes a dimension of size 0"
    return ""
