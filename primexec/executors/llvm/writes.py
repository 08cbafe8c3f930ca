"""Operators that write at places that data tells, or at every so many: which points they walk, where, in what order.

A tensor is copied first; then each point of a domain changes one of its elements. Points that may meet at an element
are walked in order, by one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from primexec import effects
from primexec.executors.llvm import indirect, maps
from primexec.executors.llvm.maps import Map, Read, Term

# How a value meets what an element holds: a pointwise prim; nothing for one that takes its place.
_ACCUMULATED = {"sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum"}
SCATTERS = frozenset({"scatter", "scatter_add", "scatter_reduce", "index_put", "as_strided_scatter"})


@dataclass(frozen=True)
class Write:
    """What one operator does after the copy.

    Attributes:
        shape: of the domain.
        at: from the domain to the element that is changed.
        source: what is written, a tensor or a number, and its index from the domain.
        how: the pointwise prim that joins it with the element.
        apart: whether no two points meet at an element, and none is joined with it.
    """

    shape: tuple[int, ...]
    at: Map
    source: Any
    source_at: Map
    how: str
    apart: bool = False

    @property
    def ordered(self) -> tuple[int, ...] | None:
        """The axes whose points may meet at an element; None where no order is needed."""
        if self.apart:
            return None
        alone = {t.strides.index(1) for t in self.at if not t.reads and t.offset == 0 and sorted(t.strides)[-1:] == [1]}
        return tuple(a for a, n in enumerate(self.shape) if a not in alone and n != 1)


def write_of(node: fx.Node, name: str) -> Write:
    """The write of an operator of SCATTERS."""
    if name == "as_strided_scatter":
        return _strided(node)
    return _index_put(node) if name == "index_put" else _scatter(node, name)


def _strided(node: fx.Node) -> Write:
    source: Any = node.args[1]
    shape = tuple(source.meta["val"].shape)
    slices = _slices(node)
    assert slices is not None
    own = maps.identity(shape)
    return Write(
        shape,
        tuple(t.times(by, start) for t, (start, by) in zip(own, slices, strict=True)),
        source,
        own,
        "",
        apart=True,
    )


def _slices(node: fx.Node) -> list[tuple[int, int]] | None:
    """Where a write to contiguous memory starts in each dimension, and its steps; None where it goes across them."""
    args: tuple[Any, ...] = node.args
    whole, _, sizes, strides, offset = args
    shape = whole.meta["val"].shape
    found: list[tuple[int, int]] = []
    if len(sizes) != len(shape):
        return None
    for extent, step, size, stride in zip(shape, effects.row_major(shape), sizes, strides, strict=True):
        start, offset = divmod(offset, step) if extent > 1 else (0, offset)
        by, across = divmod(stride, step) if size > 1 else (1, 0)
        if across or by < 1 or start + by * (size - 1) >= extent:
            return None
        found.append((start, by))
    return found if offset == 0 else None


def _scatter(node: fx.Node, name: str) -> Write:
    whole: Any = node.args[0]
    given: Any = node.args[1]
    index: Any = node.args[2]
    shape, sizes = tuple(index.meta["val"].shape), whole.meta["val"].shape
    dim, rank = given % len(sizes), len(shape)
    own = maps.identity(shape)
    place = Term(0, (0,) * rank, ((1, Read(index, own, sizes[dim], False, node)),))
    at = tuple(place if d == dim else t for d, t in enumerate(own))
    how = {"scatter_add": "add", "scatter": ""}.get(name) if name != "scatter_reduce" else _ACCUMULATED[_how(node)]
    return Write(shape, at, node.args[3], own, how or "")


def _how(node: fx.Node) -> str:
    return str(node.args[4] if len(node.args) > 4 else node.kwargs["reduce"])


def _index_put(node: fx.Node) -> Write:
    whole: Any = node.args[0]
    sizes = whole.meta["val"].shape
    shape = indirect.indexed_shape(node, sizes)
    own = maps.identity(shape)
    at = indirect.INDIRECT["index"](node, sizes, own, len(shape))
    assert at is not None
    source: Any = node.args[2]
    have = source.meta["val"].shape
    once = maps.constant(0, len(shape))
    own = (once,) * (len(have) - len(shape)) + own[max(0, len(shape) - len(have)) :]  # leading sizes are 1
    source_at = tuple(once if n == 1 else t for n, t in zip(have, own, strict=True))
    accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    return Write(shape, at, source, source_at, "add" if accumulate else "")


def why_not(node: fx.Node, name: str) -> str:
    """Why an operator of SCATTERS is not taken; empty where it is."""
    if name == "index_put":
        return indirect.why_not(node, "index")
    if name == "as_strided_scatter":
        t: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
        fits = t.is_contiguous() and t.storage_offset() == 0 and len(node.args) == 5 and _slices(node) is not None
        return "" if fits else "it writes across the dimensions of its memory"
    whole, _, index = node.args[:3]
    if not whole.meta["val"].dim():  # type: ignore[union-attr]
        return "it writes to a number"
    if any(isinstance(n, fx.Node) and n.meta["val"].dim() != whole.meta["val"].dim() for n in node.args[2:4]):  # type: ignore[union-attr]
        return "the index, or what is written, is a number"
    if index.meta["val"].dtype not in (torch.int64, torch.int32):  # type: ignore[union-attr]
        return "the index is neither int64 nor int32"
    if name == "scatter_reduce":
        include = node.args[5] if len(node.args) > 5 else node.kwargs.get("include_self", True)
        if _how(node) not in _ACCUMULATED or not include:
            return "a mean, or one that leaves out what was there"
    return ""
