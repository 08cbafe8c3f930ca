"""What a region becomes: kernels in order, and the memory that they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from primexec.errors import IndexOutOfRangeError, PrimexecError, ValueCheckError
from primexec.executors.llvm import maps
from primexec.executors.llvm.indirect import INDIRECT
from primexec.executors.llvm.instructions import REDUCTIONS
from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.maps import VIEWS, Map
from primexec.executors.llvm.writes import SCATTERS, write_of
from primexec.program import base_name


@dataclass(frozen=True)
class Buffer:
    """Memory of one tensor.

    Attributes:
        kind: `input`, `output` (returned by the region), `arena`, or `none` (its tensor lies in another one's place).
        shape, strides: in elements; strides are the program's own.
    """

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Check:
    """What data must fit.

    Attributes:
        user: the operator that indexes by it, or checks it.
        size: of the dimension that it indexes.
        message: what the error says, where it is no index.
    """

    user: fx.Node
    size: int
    message: str = ""

    def error(self, index: int | None) -> PrimexecError:
        """What to raise for an index (None: one that is not known) that does not fit."""
        found = "an index" if index is None else f"index {index}"
        where = f"\n  {self.user.meta['source']}" if self.user.meta.get("source") else ""
        if self.message:
            return ValueCheckError(self.message + where)
        return IndexOutOfRangeError(f"{found} is out of bounds for a dimension of size {self.size}{where}")


@dataclass(frozen=True)
class Schedule:
    """Kernels in the order in which they run, and the memory that they use.

    Attributes:
        outputs: for each result of the region the number of its buffer.
        places: for each buffer in the place of an input, or of a result, the number of that.
        starts: for each intermediate in the place of a result, the byte of that at which it begins.
        checks: what indices that are data must fit, by their numbers.
    """

    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    outputs: tuple[int, ...]
    checks: tuple[Check, ...] = ()
    places: Mapping[int, int] = field(default_factory=dict)
    starts: Mapping[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"b{i}: {self._place(i)} {str(b.dtype).removeprefix('torch.')}{list(b.shape)} strides {list(b.strides)}"
            for i, b in enumerate(self.buffers)
        ]
        return "\n".join([*lines, *map(str, self.kernels)])

    def _place(self, number: int) -> str:
        if number not in self.places:
            return self.buffers[number].kind
        start = self.starts.get(number)
        return f"in b{self.places[number]}" + (f" from byte {start}" if start else "")


@dataclass
class Group:
    """A kernel in the making: its domain, and the roots in it.

    Attributes:
        axes: reduced ones; None as long as no reduction is in it.
        ordered: axes that a scan or a write walks in order.
        lanes: axes along which elements of what it reads and writes lie next to each other.
    """

    shape: tuple[int, ...]
    axes: frozenset[int] | None
    strides: tuple[int, ...] | None
    ordered: tuple[int, ...] | None = None
    lanes: frozenset[int] = frozenset()
    roots: list[fx.Node] = field(default_factory=list)
    work: int = 0
    buffers: set[fx.Node] = field(default_factory=set)
    why: list[str] = field(default_factory=list)


prim = base_name  # of operators of the table


def value(node: fx.Node) -> Any:
    """The fake tensor of a node."""
    return node.meta["val"]


def reduced_axes(node: fx.Node) -> frozenset[int]:
    """The dimensions that a reduction runs over."""
    rank = value(node.args[0]).dim()  # type: ignore[arg-type]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return frozenset(range(rank)) if dims is None or rank == 0 else frozenset(d % rank for d in dims)


@dataclass(frozen=True)
class Domain:
    """What a root is computed over: sizes, reduced axes, and axes that are walked in order."""

    shape: tuple[int, ...]
    axes: frozenset[int] | None = None
    ordered: tuple[int, ...] | None = None


def domain_of(root: fx.Node) -> Domain:
    """The domain of a root that opens a kernel."""
    name = prim(root)
    if name in REDUCTIONS:
        return Domain(tuple(value(root.args[0]).shape), reduced_axes(root))  # type: ignore[arg-type]
    if name in SCATTERS:
        write = write_of(root, name)
        return Domain(write.shape, None, write.ordered)
    shape = tuple(value(root).shape)
    if name in SCANS:
        given: Any = root.args[1]
        return Domain(shape, None, (given % len(shape),))
    return Domain(shape)


class State:
    """A schedule in the making: what is known of the region's nodes so far.

    Attributes:
        place: for each root the number of its kernel.
        buffer_of: for each node that is kept in memory the number of its buffer.
        roots: the nodes that have a place of their own, and why.
    """

    def __init__(self) -> None:
        self.place: dict[fx.Node, int] = {}
        self.groups: list[Group] = []
        self.buffers: list[Buffer] = []
        self.buffer_of: dict[fx.Node, int] = {}
        self.roots: dict[fx.Node, str] = {}
        self.checks: dict[Check, int] = {}

    def number_of(self, check: Check) -> int:
        """The number under which kernels report that an index does not fit."""
        return self.checks.setdefault(check, len(self.checks))


ASSERTION = "_assert_async"
# Scans, and what each keeps; `cummax` and `cummin` stand for the values alone.
SCANS = {"cumsum": "sum", "cumprod": "prod", "cummax": "amax", "cummin": "amin", "logcumsumexp": "logaddexp"}
MOVES = {**VIEWS, **INDIRECT}  # what rearranges elements, by a map from each result to an argument


def step(node: fx.Node, index: Map, rank: int) -> Map | None:
    """The index of a view's argument for an index of the view."""
    return MOVES[prim(node)](node, value(node.args[0]).shape, index, rank)  # type: ignore[arg-type]


def fitted(own: Sequence[int], shape: tuple[int, ...], axes: frozenset[int]) -> Map | None:
    """A tensor of these sizes as a map from a domain: it has the domain's sizes apart from the axes and from ones."""
    unit = maps.identity(shape)
    left = [a for a, n in enumerate(shape) if a not in axes and n != 1]
    if [n for n in own if n != 1] != [shape[a] for a in left]:
        return None
    rest = iter(left)
    return tuple(unit[next(rest)] if n != 1 else maps.constant(0, len(shape)) for n in own)


def embedding(node: fx.Node, shape: tuple[int, ...], axes: frozenset[int] | None) -> Map | None:
    """Where a root of a kernel is known, as a map from the kernel's domain."""
    own = value(node).shape
    whole = fitted(own, shape, frozenset()) if prim(node) not in REDUCTIONS else None
    return fitted(own, shape, axes) if whole is None and axes is not None else whole


def moving(t: torch.Tensor) -> tuple[int, ...]:
    """The strides of the dimensions along which a tensor has several elements."""
    return tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1)
