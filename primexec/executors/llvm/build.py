"""The loop IR of one kernel, from the nodes that were grouped into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from primexec.executors.llvm import maps
from primexec.executors.llvm.instructions import REDUCTIONS
from primexec.executors.llvm.ir import Access, Const, Expr, Index, Kernel, Load, Op, Place, Reduce, Store
from primexec.executors.llvm.maps import VIEWS, Map, Read, Term
from primexec.executors.llvm.schedule import MOVES, Check, Group, State, embedding, prim, step, value


class Builder:
    """Makes the loop IR of one group."""

    def __init__(self, state: State, number: int, group: Group) -> None:
        self.s, self.number, self.group = state, number, group
        self.rank = len(group.shape)
        self.memo: dict[tuple[fx.Node, Map], Expr] = {}
        self.places: dict[Read, Place] = {}

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
        found = embedding(root, self.group.shape, self.group.axes)
        assert found is not None
        return found

    def _access(self, node: fx.Node, index: Map) -> Access:
        number = self.s.buffer_of[node]
        buffer = self.s.buffers[number]
        term = maps.linear(index, buffer.strides, self.rank)
        return Access(number, term.offset, term.strides, buffer.dtype, self._indirect(term))

    def _indirect(self, term: Term) -> tuple[tuple[int, Expr], ...]:
        return tuple((factor, self._place(read)) for factor, read in term.reads)

    def _place(self, read: Read) -> Place:
        if read not in self.places:
            check = self.s.number_of(Check(read.user, read.size))
            self.places[read] = Place(self._expr(read.node, read.index), read.size, read.wraps, check)
        return self.places[read]

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
        if name in MOVES:
            source: Any = node.args[0]
            at = step(node, index, self.rank)
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
        access = Access(number, term.offset, term.strides, buffer.dtype, self._indirect(term))
        return Load(access, buffer.dtype)

    def _iota(self, node: fx.Node, index: Map) -> Expr:
        start, step = int(str(node.kwargs["start"])), int(str(node.kwargs["step"]))
        (term,) = index
        scaled = term.times(step, start)
        return Op(
            "convert_element_type", (Index(scaled.offset, scaled.strides, self._indirect(scaled)),), value(node).dtype
        )
