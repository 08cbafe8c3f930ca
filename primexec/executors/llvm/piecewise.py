"""Operators whose result comes from one tensor in one part of their domain and from another elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from primexec.executors.llvm.maps import Map, Term, bounds

MOST_PIECES = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, the index at which it is read, and where that is so: where low ≤ term < high.

    The last piece of an operator without bounds of its own is what remains (`term` is None).
    """

    node: fx.Node
    index: Map
    term: Term | None = None
    low: int = 0
    high: int = 0


def _moved(index: Map, dim: int, by: int) -> Map:
    return tuple(t.times(1, by) if d == dim else t for d, t in enumerate(index))


def _cat(node: fx.Node, index: Map) -> list[Piece]:
    tensors: Any = node.args[0]
    given: Any = node.args[1] if len(node.args) > 1 else 0
    dim, start, found = given % len(index), 0, []
    for tensor in tensors:
        size = tensor.meta["val"].shape[dim]
        if size:
            found.append(Piece(tensor, _moved(index, dim, -start), index[dim], start, start + size))
        start += size
    return found or [Piece(tensors[0], index)]


def _slice_scatter(node: fx.Node, index: Map) -> list[Piece]:
    whole, part = node.args[:2]
    dim, start, end, _ = bounds(node, 2, node.meta["val"].shape)
    inside = Piece(part, _moved(index, dim, -start), index[dim], start, end)  # type: ignore[arg-type]
    return [*([inside] if end > start else []), Piece(whole, index)]  # type: ignore[arg-type]


PIECEWISE: dict[str, Callable[[fx.Node, Map], list[Piece]]] = {"cat": _cat, "slice_scatter": _slice_scatter}


def why_not(node: fx.Node, name: str, shapes: Sequence[Sequence[int]]) -> str:
    """Why an operator of PIECEWISE is not taken; empty where it is."""
    if len(shapes) > MOST_PIECES:
        return f"more than {MOST_PIECES} tensors are joined"
    return ""
