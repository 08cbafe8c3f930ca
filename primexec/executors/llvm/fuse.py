"""From a graph of prims to kernels: which results are kept in memory, and which loops run together.

A *root* is a node whose value has a place of its own in some kernel: what the region returns, every reduction, and
what costs too much to be computed again by each of its users. Everything else is computed where it is used. Roots are
placed in order; one joins an earlier kernel of its domain if what it reads from that kernel is read at the same point.
"""

from __future__ import annotations

import torch
from torch import fx

from primexec import effects
from primexec.executors.llvm import checks, maps
from primexec.executors.llvm.build import Builder
from primexec.executors.llvm.contraction import factors
from primexec.executors.llvm.costs import ROOTS
from primexec.executors.llvm.indirect import INDIRECT
from primexec.executors.llvm.instructions import DEAR, REDUCTIONS
from primexec.executors.llvm.layout import NARROW
from primexec.executors.llvm.maps import VIEWS, Map
from primexec.executors.llvm.materialize import materialized
from primexec.executors.llvm.piecewise import PIECEWISE
from primexec.executors.llvm.schedule import (
    ASSERTION,
    MOVES,
    SCANS,
    Buffer,
    Domain,
    Group,
    Schedule,
    State,
    domain_of,
    embedding,
    fitted,
    moving,
    prim,
    step,
    value,
)
from primexec.executors.llvm.writes import SCATTERS, write_of

RECOMPUTED_PRIMS = 8  # as many prims are computed again for each user rather than kept
REPEATED = 16  # times from which on what is slow is kept rather than computed for each element that repeats it
REPEATED_DEAR = 2
GATHERED_PRIMS = 2  # as many prims are computed again for each element that is gathered
MEETING_PRIMS = 16  # between what is used several times and where its uses come together
INLINED_PRIMS = 48  # as many prims stand in one expression
KERNEL_PRIMS = 160
KERNEL_BUFFERS = 40


class Scheduler(State):
    """Makes the schedule of one region."""

    def __init__(self, graph: fx.Graph, fuel: int | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.returned: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.fuel = fuel
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.products = {n: found for n in self.nodes if (found := factors(n))}
        self._known_reads: dict[tuple[fx.Node, Map, int], list[tuple[fx.Node, Map | None]]] = {}

    def schedule(self) -> Schedule:
        for node in self.inputs:
            t = value(node)
            self.buffer_of[node] = self._buffer("input", t)
        self._choose_roots()
        self._place_roots()
        if more := materialized(self.nodes, self, self._reads):
            self.roots.update(more)
            self._place_roots()
        for node in dict.fromkeys(self.returned):
            if node not in self.buffer_of:
                self.buffer_of[node] = self._buffer("output", value(node))
        self._keep_what_others_read()
        kernels, checked = [], set[tuple[fx.Node, fx.Node]]()
        for number, group in enumerate(self.groups):
            builder = Builder(self, number, group)
            kernel = builder.kernel()
            if kernel.stores:
                kernels.append(kernel)
                checked |= builder.checked(kernel)
        if unchecked := checks.missing(self.nodes, checked):
            return Scheduler(checks.with_assertions(self.graph, unchecked), self.fuel).schedule()
        return Schedule(tuple(self.buffers), tuple(kernels), tuple(self.buffer_of[n] for n in self.returned),
                        tuple(self.checks))  # fmt: skip

    def _buffer(self, kind: str, t: torch.Tensor) -> int:
        packed = kind != "arena" or torch.ops.aten.is_non_overlapping_and_dense.default(t)
        strides = t.stride() if packed else effects.row_major(t.shape)
        self.buffers.append(Buffer(kind, tuple(t.shape), tuple(strides), t.dtype))
        return len(self.buffers) - 1

    # Roots ----------------------------------------------------------------------------------------------

    def _choose_roots(self) -> None:
        returned = set(self.returned)
        expressions = _Expressions(self.inputs)
        dear: set[fx.Node] = set()
        slow: set[fx.Node] = set()
        read = {n for found in self.products.values() for n in found}

        def keep(node: fx.Node, why: str) -> None:
            self.roots.setdefault(node, why)
            expressions.end(node)

        for node in self.nodes:
            name, arguments = prim(node), node.all_input_nodes
            for kind, times in ((dear, REPEATED_DEAR), (slow, REPEATED)):
                if any(a in kind and a not in self.roots for a in arguments) and _repeats(node, times):
                    keep(arguments[0], "kept: slow, and repeated")
            if (
                name in ROOTS
                or _is_apart(node)
                or _is_turned(node)
                or any(a in slow and a not in self.roots for a in arguments)
            ):
                slow.add(node)
            if name in VIEWS and step(node, maps.identity(value(node).shape), value(node).dim()) is None:
                if arguments[0] not in self.buffer_of and arguments[0] not in self.roots:
                    keep(arguments[0], "kept: its memory is read in another shape")
                expressions.end(node)
            else:
                expressions.add(node)
            if name == "as_strided" and value(node).numel() > value(arguments[0]).numel():
                source = arguments[0]
                while prim(source) in VIEWS and source not in self.roots:
                    source = source.all_input_nodes[0]
                if source not in self.buffer_of:
                    keep(source, "kept: windows of it overlap")
            grows = name in INDIRECT and value(node).numel() > value(arguments[0]).numel()
            if grows and (arguments[0] in dear or expressions.size(arguments[0]) > GATHERED_PRIMS):
                keep(arguments[0], "kept: read more often than it has elements")
            if name in DEAR or any(a in dear and a not in self.roots for a in arguments):
                dear.add(node)
            if name in SCATTERS:
                self.roots.setdefault(arguments[0], "kept: it is written to")
                for other in arguments[1:]:
                    if self._meets(other, arguments[0]):
                        keep(other, "kept: it reads what is written to")
            size = expressions.size(node)
            why = ""
            if node in returned:
                why = "returned"
            elif node in read:
                why = "kept: a product reads it"
            elif name in REDUCTIONS or name in SCANS:
                why = "a reduction" if name in REDUCTIONS else "a scan"
            elif name in SCATTERS or name == ASSERTION:
                why = "written at places" if name in SCATTERS else "an assertion"
            elif name not in VIEWS and (node in dear or size > RECOMPUTED_PRIMS) and self._is_shared(node):
                why = "shared: dear to compute again"
            elif size > INLINED_PRIMS:
                why = "kept: its expression would grow too long"
            if why:
                keep(node, why)

    def _meets(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether the expression of a node reads another."""
        return node not in self.roots and any(a is other or self._meets(a, other) for a in node.all_input_nodes)

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether a node is computed more than once: its uses do not come together in one prim, at its own point."""
        waiting = dict.fromkeys(node.users)
        while len(waiting) == 1 and prim(view := next(iter(waiting))) in VIEWS and view not in self.returned:
            waiting = dict.fromkeys(view.users)
        for _ in range(MEETING_PRIMS if len(waiting) > 1 else 0):
            first = min(waiting, key=lambda n: self.order.get(n, len(self.order)))
            if not _stays(first) or first in self.returned:
                return True
            if len(waiting) == 1:
                return False
            del waiting[first]
            waiting.update(dict.fromkeys(first.users))
        return len(waiting) > 1

    # Placing --------------------------------------------------------------------------------------------

    def _place_roots(self) -> None:
        self.groups.clear()
        self.place.clear()
        self._known_reads.clear()  # there are more roots
        for node in self.nodes:
            if node in self.roots:
                self._place(node)

    def _place(self, root: fx.Node) -> None:
        domain = domain_of(root)
        reads = self._reads(root, domain.shape)
        earliest = max((self.place[n] for n, _ in reads if n in self.place), default=0)
        work = self._work(root)
        for number in range(len(self.groups) - 1, earliest - 1, -1):
            if self._fuel_is_out(number):
                continue
            reason = self._obstacle(number, root, domain, reads, work)
            if not reason:
                self._join(number, root, domain.axes, reads, work, f"{root.name} joins ({self.roots[root]})")
                return
        strides = None if domain.axes is not None else moving(value(root))
        self.groups.append(Group(domain.shape, domain.axes, strides, domain.ordered))
        self._join(len(self.groups) - 1, root, domain.axes, reads, work, f"{root.name} opens ({self.roots[root]})")

    def _fuel_is_out(self, number: int) -> bool:
        """Whether a kernel may not be fused with anything; one that is fused already goes on."""
        if self.fuel is None or len(self.groups[number].roots) > 1:
            return False
        return sum(len(g.roots) > 1 for g in self.groups) >= self.fuel

    def _join(
        self,
        number: int,
        root: fx.Node,
        axes: frozenset[int] | None,
        reads: list[tuple[fx.Node, Map | None]],
        work: int,
        why: str,
    ) -> None:
        group = self.groups[number]
        group.roots.append(root)
        group.work += work
        group.axes = axes if group.axes is None else group.axes
        group.why.append(why)
        group.buffers |= {root, *(n for n, _ in reads)}
        group.lanes |= _lanes(root, reads)
        self.place[root] = number

    def _obstacle(
        self,
        number: int,
        root: fx.Node,
        domain: Domain,
        reads: list[tuple[fx.Node, Map | None]],
        work: int,
    ) -> str:
        """Why the root cannot run in a kernel; empty where it can."""
        group, shape, axes = self.groups[number], domain.shape, domain.axes
        if reason := self._apart(number, root, reads) or self._out_of_order(number, root, domain, reads):
            return reason
        if group.work + work > KERNEL_PRIMS or len(group.buffers) + len(reads) > KERNEL_BUFFERS:
            return "too large"
        reduced = group.axes if axes is None else axes
        if axes is not None and group.axes not in (None, axes):
            return "reduces other axes"
        inside = fitted(shape, group.shape, frozenset())
        if axes is not None and shape != group.shape:
            return "another domain"
        if inside is not None:
            if axes is None and group.axes is None and moving(value(root)) != group.strides:
                return "another layout"
        elif reduced is not None and axes is None:
            inside = fitted(shape, group.shape, reduced)
        if inside is None:
            return "another domain"
        inner = [n for n, _ in reads if self.place.get(n) == number]
        if (axes is None) != (group.axes is None) and shape == group.shape and not inner:
            lanes = _lanes(root, reads)
            if lanes and group.lanes and lanes != group.lanes:  # it would turn squares, which sums do not
                return "walks memory along other axes"
        for node in inner:
            wanted = embedding(node, group.shape, reduced)
            rank = len(group.shape)
            found = [m for n, m in self._reads(root, group.shape, None if axes is not None else inside) if n is node]
            if wanted is None or any(m is None or m != wanted for m in found) or rank != len(group.shape):
                return "reads it at other places"
        return ""

    def _apart(self, number: int, root: fx.Node, reads: list[tuple[fx.Node, Map | None]]) -> str:
        """Why a root is no part of a product of matrices, or the other way round; empty where neither is one."""
        first = self.groups[number].roots[0]
        if root in self.products:
            return "is a product"
        if first not in self.products:
            return ""
        inside = any(self.place.get(n) == number for n, _ in reads)
        return "" if inside and value(root).numel() == value(first).numel() else "is no part of the product"

    def _out_of_order(self, number: int, root: fx.Node, domain: Domain, reads: list[tuple[fx.Node, Map | None]]) -> str:
        """Why a root cannot be where points are walked in order, or where they are not; empty where it can."""
        group = self.groups[number]
        if prim(root) in SCATTERS or prim(group.roots[0]) in SCATTERS:
            return "writes to memory"
        if group.ordered is None and domain.ordered is None:
            return ""
        if domain.axes is not None:
            return "is walked in order"
        if domain.ordered not in (None, group.ordered) or domain.shape != group.shape:
            return "walks in another order"
        return "" if any(self.place.get(n) == number for n, _ in reads) else "would be walked in order"

    def _reads(
        self, root: fx.Node, shape: tuple[int, ...], index: Map | None = None
    ) -> list[tuple[fx.Node, Map | None]]:
        """The roots and inputs that a root is computed from, each with the map by which it is read.

        A reduction's argument is read over the domain; None stands for what is read by memory, not by index.
        """
        if index is None:
            index = maps.identity(shape)
        key = root, index, len(shape)
        if key not in self._known_reads:
            self._known_reads[key] = self._found_reads(*key)
        return self._known_reads[key]

    def _found_reads(self, root: fx.Node, index: Map, rank: int) -> list[tuple[fx.Node, Map | None]]:
        found: dict[tuple[fx.Node, Map | None], None] = {}
        seen: set[tuple[fx.Node, Map | None]] = set()

        def visit(node: fx.Node, at: Map | None) -> None:
            if (node, at) in seen:
                return
            seen.add((node, at))
            if node in self.buffer_of or node in self.roots:
                found[node, at] = None
            else:
                expand(node, at)

        def expand(node: fx.Node, at: Map | None) -> None:
            if prim(node) in MOVES:
                there = step(node, at, rank) if at is not None else None
                visit(node.args[0], there)  # type: ignore[arg-type]
                for read in maps.reads_of(there or ()):
                    if read.user is node:
                        visit(read.node, read.index)
                return
            if prim(node) in PIECEWISE and at is not None:
                for piece in PIECEWISE[prim(node)](node, at):
                    visit(piece.node, piece.index)
                return
            for argument in node.all_input_nodes:
                visit(argument, () if value(argument).dim() == 0 else at)

        if prim(root) in REDUCTIONS or prim(root) in SCANS:
            visit(root.args[0], index)  # type: ignore[arg-type]
        elif prim(root) in SCATTERS:
            write = write_of(root, prim(root))
            found[root.all_input_nodes[0], None] = None
            for read in maps.reads_of(write.at):
                visit(read.node, read.index)
            if isinstance(write.source, fx.Node):
                visit(write.source, write.source_at)
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
        for root in (n for n in self.roots if prim(n) == ASSERTION):  # so that a kernel computes it
            self.buffer_of[root] = self._buffer("arena", value(root))
        for root in (n for n in reversed(self.nodes) if prim(n) in SCATTERS):  # the copy is written to where it lies
            if root not in self.buffer_of:
                self.buffer_of[root] = self._buffer("arena", value(root))
            self.buffer_of[root.all_input_nodes[0]] = self.buffer_of[root]
        for number, group in enumerate(self.groups):
            for root in group.roots:
                whole = prim(root) in REDUCTIONS or prim(root) in SCATTERS
                for node, _ in self._reads(root, group.shape if whole else value(root).shape):
                    if node not in self.buffer_of and self.place[node] != number:
                        self.buffer_of[node] = self._buffer("arena", value(node))


def _lanes(root: fx.Node, reads: list[tuple[fx.Node, Map | None]]) -> frozenset[int]:
    """The axes along which elements lie next to each other, in what a root reads and writes along several axes."""
    shape = domain_of(root).shape
    found = [maps.linear(index, value(node).stride(), len(shape)).strides for node, index in reads if index]
    if tuple(value(root).shape) == shape:
        found.append(tuple(s if n != 1 else 0 for s, n in zip(value(root).stride(), shape, strict=True)))
    return frozenset(strides.index(1) for strides in found if 1 in strides and sum(map(bool, strides)) > 1)


def _repeats(node: fx.Node, times: int) -> bool:
    """Whether a view repeats its argument so often.

    Along what its users walk innermost, loops keep it anyway, unless there are too few elements to keep it for.
    """
    if prim(node) not in VIEWS or value(node).numel() < times * max(1, value(node.all_input_nodes[0]).numel()):
        return False
    shape, steps = value(node).shape, value(node).stride()
    for user in node.users:
        if user.op == "call_function" and isinstance(user.meta["val"], torch.Tensor) and value(user).shape == shape:
            walked = [(s, a) for a, (s, n) in enumerate(zip(value(user).stride(), shape, strict=True)) if n != 1]
            if walked and (steps[min(walked)[1]] != 0 or shape[min(walked)[1]] < NARROW):
                return True
    return False


def _is_apart(node: fx.Node) -> bool:
    """Whether a slice has no elements that lie next to each other."""
    t = value(node)
    return (
        prim(node) == "slice"
        and t.numel() > 1
        and all(s > 1 or n == 1 for s, n in zip(t.stride(), t.shape, strict=True))
    )


def _is_turned(node: fx.Node) -> bool:
    """Whether a node is a copy in another order."""
    if prim(node) != "clone":
        return False
    pairs = zip(value(node.args[0]).stride(), value(node).stride(), value(node).shape, strict=True)  # type: ignore[arg-type]
    return any(old != new for old, new, n in pairs if n > 1)


class _Expressions:
    """How many prims stand in the expression of each node, those computed more than once as often as they are."""

    def __init__(self, inputs: list[fx.Node]) -> None:
        self._parts: dict[fx.Node, frozenset[fx.Node]] = dict.fromkeys(inputs, frozenset())
        self._weight: dict[fx.Node, int] = {}

    def size(self, node: fx.Node) -> int:
        return sum(self._weight[part] for part in self._parts[node])

    def end(self, node: fx.Node) -> None:
        """It is read from memory, or known in a register."""
        self._parts[node] = frozenset()

    def add(self, node: fx.Node) -> None:
        """What is computed at the same point is computed once; what moves elements computes its argument elsewhere."""
        elsewhere = not _stays(node)
        parts = [self._parts[a] for a in node.all_input_nodes]
        inside = sum(map(self.size, node.all_input_nodes)) if elsewhere else 0
        self._weight[node] = inside + (prim(node) not in VIEWS)
        self._parts[node] = frozenset([node]).union(*([] if elsewhere else parts))


def _stays(node: fx.Node) -> bool:
    """Whether a prim reads its arguments at the point at which it is computed."""
    name = prim(node)
    return not any(name in others for others in (MOVES, PIECEWISE, REDUCTIONS, SCANS, SCATTERS))
