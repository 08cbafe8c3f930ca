"""From a graph of prims to kernels: which results are kept in memory, and which loops run together.

A *root* is a node whose value has a place of its own in some kernel: what the region returns, every reduction, and
what costs too much to be computed again by each of its users. Everything else is computed where it is used. Roots are
placed in order; one joins an earlier kernel of its domain if what it reads from that kernel is read at the same point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from primexec.executors.llvm import maps
from primexec.executors.llvm.instructions import DEAR, REDUCTIONS
from primexec.executors.llvm.ir import Access, Const, Expr, Index, Kernel, Load, Op, Reduce, Store
from primexec.executors.llvm.maps import VIEWS, Map

RECOMPUTED_PRIMS = 8  # as many prims are computed again for each user rather than kept
INLINED_PRIMS = 48  # as many prims stand in one expression
KERNEL_PRIMS = 160
KERNEL_BUFFERS = 40


@dataclass(frozen=True)
class Buffer:
    """Memory of one tensor.

    Attributes:
        kind: `input`, `output` (returned by the region) or `arena`.
        shape, strides: in elements; strides are the program's own.
    """

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Schedule:
    """Kernels in the order in which they run, and the memory that they use.

    Attributes:
        outputs: for each result of the region the number of its buffer.
    """

    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        lines = [
            f"b{i}: {b.kind} {str(b.dtype).removeprefix('torch.')}{list(b.shape)} strides {list(b.strides)}"
            for i, b in enumerate(self.buffers)
        ]
        return "\n".join([*lines, *map(str, self.kernels)])


@dataclass
class _Group:
    """A kernel in the making: its domain, and the roots in it."""

    shape: tuple[int, ...]
    axes: frozenset[int] | None  # reduced ones; None as long as no reduction is in it
    strides: tuple[int, ...] | None
    roots: list[fx.Node] = field(default_factory=list)
    work: int = 0
    buffers: set[fx.Node] = field(default_factory=set)
    why: list[str] = field(default_factory=list)


def prim(node: fx.Node) -> str:
    """`exp`, for a node of `prims.exp`."""
    return str(node.target._schema.name).partition("::")[2] if node.op == "call_function" else ""  # type: ignore[union-attr]


def value(node: fx.Node) -> Any:
    return node.meta["val"]


def reduced_axes(node: fx.Node) -> frozenset[int]:
    """The dimensions that a reduction runs over."""
    rank = value(node.args[0]).dim()  # type: ignore[arg-type]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return frozenset(range(rank)) if dims is None or rank == 0 else frozenset(d % rank for d in dims)


class Scheduler:
    """Makes the schedule of one region."""

    def __init__(self, graph: fx.Graph, fuel: int | None = None) -> None:
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.returned: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.fuel = fuel
        self.place: dict[fx.Node, int] = {}
        self.groups: list[_Group] = []
        self.buffers: list[Buffer] = []
        self.buffer_of: dict[fx.Node, int] = {}
        self.roots: dict[fx.Node, str] = {}

    def schedule(self) -> Schedule:
        for node in self.inputs:
            t = value(node)
            self.buffer_of[node] = self._buffer("input", t)
        self._choose_roots()
        for node in self.nodes:
            if node in self.roots:
                self._place(node)
        for node in dict.fromkeys(self.returned):
            if node not in self.buffer_of:
                self.buffer_of[node] = self._buffer("output", value(node))
        self._keep_what_others_read()
        kernels = []
        for number, group in enumerate(self.groups):
            kernel = _Builder(self, number, group).kernel()
            if kernel.stores:
                kernels.append(kernel)
        return Schedule(tuple(self.buffers), tuple(kernels), tuple(self.buffer_of[n] for n in self.returned))

    def _buffer(self, kind: str, t: torch.Tensor) -> int:
        strides = maps.row_major(t.shape) if kind == "arena" else t.stride()
        self.buffers.append(Buffer(kind, tuple(t.shape), tuple(strides), t.dtype))
        return len(self.buffers) - 1

    # Roots ----------------------------------------------------------------------------------------------

    def _choose_roots(self) -> None:
        returned = set(self.returned)
        weight: dict[fx.Node, int] = dict.fromkeys(self.inputs, 0)
        for node in self.nodes:
            name, arguments = prim(node), node.all_input_nodes
            if name in VIEWS:
                source = arguments[0]
                if self._step(node, maps.identity(value(node).shape), value(node).dim()) is None:
                    if source not in self.buffer_of and source not in self.roots:
                        self.roots[source] = "kept: its memory is read in another shape"
                        weight[source] = 0
                    weight[node] = 0
                else:
                    weight[node] = weight[source]
            else:
                weight[node] = 1 + sum(weight[a] for a in arguments)
            why = ""
            if node in returned:
                why = "returned"
            elif name in REDUCTIONS:
                why = "a reduction"
            elif name not in VIEWS and len(node.users) > 1 and (name in DEAR or weight[node] > RECOMPUTED_PRIMS):
                why = "shared: dear to compute again"
            elif weight[node] > INLINED_PRIMS:
                why = "kept: its expression would grow too long"
            if why:
                self.roots.setdefault(node, why)
                weight[node] = 0

    def _step(self, node: fx.Node, index: Map, rank: int) -> Map | None:
        """The index of a view's argument for an index of the view."""
        return VIEWS[prim(node)](node, value(node.args[0]).shape, index, rank)  # type: ignore[arg-type]

    # Placing --------------------------------------------------------------------------------------------

    def _place(self, root: fx.Node) -> None:
        t = value(root)
        is_reduction = prim(root) in REDUCTIONS
        shape = tuple(value(root.args[0]).shape if is_reduction else t.shape)  # type: ignore[arg-type]
        axes = reduced_axes(root) if is_reduction else None
        reads = self._reads(root, shape)
        earliest = max((self.place[n] for n, _ in reads if n in self.place), default=0)
        work = self._work(root)
        for number in range(len(self.groups) - 1, earliest - 1, -1):
            if self._fuel_is_out():
                break
            reason = self._obstacle(number, root, shape, axes, reads, work)
            if not reason:
                self._join(number, root, axes, work, f"{root.name} joins ({self.roots[root]})")
                return
        strides = None if axes is not None else tuple(t.stride())
        self.groups.append(_Group(shape, axes, strides))
        self._join(len(self.groups) - 1, root, axes, work, f"{root.name} opens ({self.roots[root]})")

    def _fuel_is_out(self) -> bool:
        return self.fuel is not None and sum(len(g.roots) > 1 for g in self.groups) >= self.fuel

    def _join(self, number: int, root: fx.Node, axes: frozenset[int] | None, work: int, why: str) -> None:
        group = self.groups[number]
        group.roots.append(root)
        group.work += work
        group.axes = axes if group.axes is None else group.axes
        group.why.append(why)
        group.buffers |= {root, *(n for n, _ in self._reads(root, group.shape))}
        self.place[root] = number

    def _obstacle(
        self,
        number: int,
        root: fx.Node,
        shape: tuple[int, ...],
        axes: frozenset[int] | None,
        reads: list[tuple[fx.Node, Map | None]],
        work: int,
    ) -> str:
        """Why the root cannot run in a kernel; empty where it can."""
        group = self.groups[number]
        if group.work + work > KERNEL_PRIMS or len(group.buffers) + len(reads) > KERNEL_BUFFERS:
            return "too large"
        reduced = group.axes if axes is None else axes
        if axes is not None and group.axes not in (None, axes):
            return "reduces other axes"
        inside: Map | None = None
        if shape == group.shape:
            if axes is None and group.axes is None and tuple(value(root).stride()) != group.strides:
                return "another layout"
            inside = maps.identity(shape)
        elif reduced is not None and axes is None and shape == self._kept(group.shape, reduced):
            inside = self._projection(group.shape, reduced)
        if inside is None:
            return "another domain"
        for node, _ in reads:
            if self.place.get(node) != number:
                continue
            wanted = self._embedding(node, group.shape, reduced)
            rank = len(group.shape)
            found = [m for n, m in self._reads(root, group.shape, None if axes is not None else inside) if n is node]
            if wanted is None or any(m is None or m != wanted for m in found) or rank != len(group.shape):
                return "reads it at other places"
        return ""

    @staticmethod
    def _kept(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
        return tuple(n for a, n in enumerate(shape) if a not in axes)

    @staticmethod
    def _projection(shape: tuple[int, ...], axes: frozenset[int]) -> Map:
        return tuple(m for a, m in enumerate(maps.identity(shape)) if a not in axes)

    def _embedding(self, node: fx.Node, shape: tuple[int, ...], axes: frozenset[int] | None) -> Map | None:
        """Where a root of a kernel is known, as a map from the kernel's domain."""
        own = tuple(value(node).shape)
        if prim(node) not in REDUCTIONS and own == shape:
            return maps.identity(shape)
        return self._projection(shape, axes) if axes is not None and own == self._kept(shape, axes) else None

    def _reads(
        self, root: fx.Node, shape: tuple[int, ...], index: Map | None = None
    ) -> list[tuple[fx.Node, Map | None]]:
        """The roots and inputs that a root is computed from, each with the map by which it is read.

        A reduction's argument is read over the domain; None stands for what is read by memory, not by index.
        """
        is_reduction = prim(root) in REDUCTIONS
        if index is None:
            index = maps.identity(shape)
        found: dict[tuple[fx.Node, Map | None], None] = {}
        seen: set[tuple[fx.Node, Map | None]] = set()
        rank = len(shape)

        def visit(node: fx.Node, at: Map | None) -> None:
            if (node, at) in seen:
                return
            seen.add((node, at))
            if node in self.buffer_of or node in self.roots:
                found[node, at] = None
            else:
                expand(node, at)

        def expand(node: fx.Node, at: Map | None) -> None:
            if prim(node) in VIEWS:
                visit(node.args[0], self._step(node, at, rank) if at is not None else None)  # type: ignore[arg-type]
                return
            for argument in node.all_input_nodes:
                visit(argument, () if value(argument).dim() == 0 else at)

        if is_reduction:
            visit(root.args[0], index)  # type: ignore[arg-type]
        else:
            expand(root, index)
        return list(found)

    def _work(self, root: fx.Node) -> int:
        seen: set[fx.Node] = set()

        def visit(node: fx.Node) -> None:
            if node in seen or node in self.buffer_of:
                return
            seen.add(node)
            for argument in node.all_input_nodes:
                if argument not in self.roots:
                    visit(argument)

        visit(root)
        return len(seen)

    def _keep_what_others_read(self) -> None:
        for number, group in enumerate(self.groups):
            for root in group.roots:
                for node, _ in self._reads(root, group.shape if prim(root) in REDUCTIONS else value(root).shape):
                    if node not in self.buffer_of and self.place[node] != number:
                        self.buffer_of[node] = self._buffer("arena", value(node))


class _Builder:
    """Makes the loop IR of one group."""

    def __init__(self, scheduler: Scheduler, number: int, group: _Group) -> None:
        self.s, self.number, self.group = scheduler, number, group
        self.rank = len(group.shape)
        self.memo: dict[tuple[fx.Node, Map], Expr] = {}

    def kernel(self) -> Kernel:
        stores = []
        for root in self.group.roots:
            if root in self.s.buffer_of:
                stores.append(Store(self._access(root, self._at(root)), self._computed(root, self._at(root))))
        axes = self.group.axes or frozenset()
        sizes = list(self.group.shape)
        for s in stores:  # dimensions that a returned view repeats are written once
            b = self.s.buffers[s.access.buffer]
            if b.kind == "output" and len(b.shape) == self.rank and not axes:
                sizes = [1 if st == 0 else n for n, st in zip(sizes, b.strides, strict=True)]
        ops = dict.fromkeys(prim(n) for r in self.group.roots for n in self._members(r))
        sources = dict.fromkeys(str(n.meta["source"]) for r in self.group.roots for n in self._members(r)
                                if n.meta.get("source") is not None)  # fmt: skip
        name = "_".join(["k" + str(self.number), *list(ops)[:6]])
        return Kernel(name, tuple(sizes), tuple(a in axes for a in range(self.rank)), tuple(stores), tuple(sources),
                      tuple(self.group.why))  # fmt: skip

    def _members(self, root: fx.Node) -> list[fx.Node]:
        seen: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if node.op != "call_function" or node in seen:
                return
            for argument in node.all_input_nodes:
                if argument not in self.s.roots:
                    visit(argument)
            if prim(node) not in VIEWS:
                seen[node] = None

        visit(root)
        return list(seen)

    def _at(self, root: fx.Node) -> Map:
        found = self.s._embedding(root, self.group.shape, self.group.axes)
        assert found is not None
        return found

    def _access(self, node: fx.Node, index: Map) -> Access:
        number = self.s.buffer_of[node]
        buffer = self.s.buffers[number]
        term = maps.linear(index, buffer.strides, self.rank)
        return Access(number, term.offset, term.strides, buffer.dtype)

    def _expr(self, node: fx.Node, index: Map) -> Expr:
        key = node, index
        if key not in self.memo:
            self.memo[key] = self._read(node, index)
        return self.memo[key]

    def _read(self, node: fx.Node, index: Map) -> Expr:
        if self.s.place.get(node) != self.number and node in self.s.buffer_of:
            access = self._access(node, index)
            return Load(access, access.dtype)
        return self._computed(node, index)

    def _computed(self, node: fx.Node, index: Map) -> Expr:
        key = node, index
        if key in self.memo:
            return self.memo[key]
        self.memo[key] = made = self._compute(node, index)
        return made

    def _compute(self, node: fx.Node, index: Map) -> Expr:
        name, dtype = prim(node), value(node).dtype
        if name in REDUCTIONS:
            return Reduce(name, self._expr(node.args[0], maps.identity(self.group.shape)), dtype)  # type: ignore[arg-type]
        if name in VIEWS:
            source: Any = node.args[0]
            at = self.s._step(node, index, self.rank)
            if at is not None:
                return self._expr(source, at)
            return self._reshaped(node, index)
        if name == "full":
            return Const(node.args[1], dtype)
        if name == "iota":
            return self._iota(node, index)
        compared = value(node.all_input_nodes[0]).dtype if node.all_input_nodes else dtype
        if name == "where":
            compared = dtype
        arguments: list[Any] = list(node.args[: 1 if name in ("convert_element_type", "clone", "device_put") else None])
        made = [
            self._expr(a, () if value(a).dim() == 0 else index) if isinstance(a, fx.Node) else Const(a, compared)
            for a in arguments
        ]
        return Op(name, tuple(made), dtype)

    def _reshaped(self, node: fx.Node, index: Map) -> Expr:
        """A tensor in memory read in another shape: by the view's own strides."""
        source: Any = node.args[0]
        number = self.s.buffer_of[source]
        buffer = self.s.buffers[number]
        t = torch.empty_strided(buffer.shape, buffer.strides, device="meta").view(value(node).shape)
        term = maps.linear(index, t.stride(), self.rank)
        return Load(Access(number, term.offset, term.strides, buffer.dtype), buffer.dtype)

    def _iota(self, node: fx.Node, index: Map) -> Expr:
        start, step = int(str(node.kwargs["start"])), int(str(node.kwargs["step"]))
        (term,) = index
        scaled = term.times(step, start)
        return Op("convert_element_type", (Index(scaled.offset, scaled.strides),), value(node).dtype)


__all__ = ["Buffer", "Schedule", "Scheduler", "prim", "reduced_axes"]
