"""The loop IR of one kernel, from the nodes that were grouped into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from primexec.executors.llvm import checks, maps
from primexec.executors.llvm.instructions import F64, FLOATS, REDUCTIONS
from primexec.executors.llvm.ir import (
    Access,
    Const,
    Expr,
    Index,
    Kernel,
    Load,
    Op,
    Place,
    Reduce,
    Scan,
    Store,
    Within,
    roots_of,
    walk,
)
from primexec.executors.llvm.maps import VIEWS, Map, Read, Term
from primexec.executors.llvm.piecewise import PIECEWISE, Piece
from primexec.executors.llvm.schedule import ASSERTION, MOVES, SCANS, Check, Group, State, embedding, prim, step, value
from primexec.executors.llvm.writes import SCATTERS, write_of

Guards = tuple[Within, ...]

_NARROW = FLOATS - {F64}


class Builder:
    """Makes the loop IR of one group."""

    def __init__(self, state: State, number: int, group: Group) -> None:
        self.s, self.number, self.group = state, number, group
        self.rank = len(group.shape)
        self.memo: dict[tuple[fx.Node, Map, Guards], Expr] = {}
        self.places: dict[tuple[Read, Guards], Place] = {}
        self.sums: dict[tuple[tuple[tuple[int, Read], ...], Guards], Index] = {}
        self.withins: dict[tuple[Term, int, int, Guards], Within] = {}

    def checked(self, kernel: Kernel) -> set[tuple[fx.Node, fx.Node]]:
        """Operators and their indices that the kernel checks all of."""
        made = {id(v) for v in walk(roots_of(kernel))}
        return {
            (read.user, read.node)
            for (read, guards), place in self.places.items()
            if not guards and id(place) in made and checks.is_whole(read, kernel)
        }

    def kernel(self) -> Kernel:
        stores = []
        for root in self.group.roots:
            if prim(root) in SCATTERS:
                stores.append(self._written(root))
            elif root in self.s.buffer_of:
                stores.append(Store(self._access(root, self._at(root)), self._computed(root, self._at(root))))
        ordered = self.group.ordered
        axes = frozenset(ordered) if ordered is not None else self.group.axes or frozenset()
        sizes = list(self.group.shape)
        for s in stores:  # dimensions that a returned view repeats are written once
            b = self.s.buffers[s.access.buffer]
            if b.kind == "output" and len(b.shape) == self.rank and not axes and ordered is None:
                sizes = [min(n, 1) if st == 0 else n for n, st in zip(sizes, b.strides, strict=True)]
        ops = dict.fromkeys(prim(n) for r in self.group.roots for n in self._members(r))
        lines = (n.meta.get("source") for r in self.group.roots for n in self._members(r))
        sources = dict.fromkeys(line.short for line in lines if line is not None)
        name = "_".join(["k" + str(self.number), *list(ops)[:6]])
        return Kernel(name, tuple(sizes), tuple(a in axes for a in range(self.rank)), tuple(stores), tuple(sources),
                      tuple(self.group.why), ordered is not None)  # fmt: skip

    def _written(self, root: fx.Node) -> Store:
        """A write at a place that data tells."""
        write = write_of(root, prim(root))
        dtype, source = value(root).dtype, write.source
        made = self._expr(source, write.source_at) if isinstance(source, fx.Node) else Const(source, dtype)
        return Store(self._access(root, write.at), made, write.how)

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

    def _access(self, node: fx.Node, index: Map, guards: Guards = ()) -> Access:
        number = self.s.buffer_of[node]
        buffer = self.s.buffers[number]
        term = maps.linear(index, buffer.strides, self.rank)
        return Access(number, term.offset, term.strides, buffer.dtype, self._indirect(term, guards))

    def _indirect(self, term: Term, guards: Guards) -> tuple[tuple[int, Expr], ...]:
        """The part of an index that is data; one value where it is a sum, which several operands may share."""
        if len(term.reads) < 2:
            return tuple((factor, self._place(read, guards)) for factor, read in term.reads)
        key = term.reads, guards
        if key not in self.sums:
            parts = tuple((factor, self._place(read, guards)) for factor, read in term.reads)
            self.sums[key] = Index(0, (0,) * self.rank, parts)
        return ((1, self.sums[key]),)

    def _place(self, read: Read, guards: Guards) -> Place:
        key = read, guards
        if key not in self.places:
            check = self.s.number_of(Check(read.user, read.size))
            index = self._expr(read.node, read.index, guards)
            self.places[key] = Place(index, read.size, read.wraps, check, guards)
        return self.places[key]

    def _within(self, piece: Piece, guards: Guards) -> Guards:
        """The condition of a piece; nothing for what remains."""
        if piece.term is None:
            return ()
        term = self._by_one_axis(piece.term, piece.low, piece.high)
        key = term, piece.low, piece.high, guards if term.reads else ()
        if key not in self.withins:
            indirect = self._indirect(term, guards)
            self.withins[key] = Within(term.offset, term.strides, indirect, piece.low, piece.high)
        return (self.withins[key],)

    def _by_one_axis(self, term: Term, low: int, high: int) -> Term:
        """An index that is in a range or not whatever the axes of smaller strides are, without these."""
        main = max(range(self.rank), key=lambda a: abs(term.strides[a]), default=0)
        others = [
            (s, n) for a, (s, n) in enumerate(zip(term.strides, self.group.shape, strict=True)) if a != main and s
        ]
        step = term.strides[main] if self.rank else 0
        if not others or term.reads or min(s for s, _ in others) < 0 or sum(s * (n - 1) for s, n in others) >= step:
            return term
        if (low - term.offset) % step or (high - term.offset) % step:
            return term
        return Term(term.offset, tuple(s if a == main else 0 for a, s in enumerate(term.strides)))

    def _expr(self, node: fx.Node, index: Map, guards: Guards = ()) -> Expr:
        if self.s.place.get(node) != self.number and node in self.s.buffer_of:
            key = node, index, guards
            if key not in self.memo:
                access = self._access(node, index, guards)
                self.memo[key] = self._load(access, guards)
            return self.memo[key]
        return self._computed(node, index, guards)

    def _load(self, access: Access, guards: Guards) -> Expr:
        """The element of a buffer; nothing is read where there is none, for such memory has no address."""
        if 0 in self.s.buffers[access.buffer].shape:
            return Const(0, access.dtype)
        return Load(access, access.dtype, guards)

    def _computed(self, node: fx.Node, index: Map, guards: Guards = ()) -> Expr:
        if self.s.place.get(node) == self.number and index == self._at(node):
            guards = ()  # it is known everywhere
        key = node, index, guards
        if key not in self.memo:
            self.memo[key] = self._compute(node, index, guards)
        return self.memo[key]

    def _compute(self, node: fx.Node, index: Map, guards: Guards) -> Expr:
        name, dtype = prim(node), value(node).dtype
        if name in REDUCTIONS:
            arg = self._expr(node.args[0], maps.identity(self.group.shape))  # type: ignore[arg-type]
            return Reduce(name, arg, dtype, name == "sum" and dtype is F64 and _rounded(node, arg))
        if name in SCANS:
            arg = self._expr(node.args[0], maps.identity(self.group.shape))  # type: ignore[arg-type]
            arg = arg if arg.dtype == dtype else Op("convert_element_type", (arg,), dtype)
            return Scan(SCANS[name], arg, dtype)
        if name in MOVES:
            source: Any = node.args[0]
            at = step(node, index, self.rank)
            if at is not None:
                return self._expr(source, at, guards)
            return self._reshaped(node, index, guards)
        if name in PIECEWISE:
            return self._joined(node, index, guards)
        if name == ASSERTION:
            return self._asserted(node)
        if name == "full":
            return Const(node.args[1], dtype)
        if name == "iota":
            return self._iota(node, index, guards)
        compared = value(node.all_input_nodes[0]).dtype if node.all_input_nodes else dtype
        if name == "where":
            compared = dtype
        arguments: list[Any] = list(node.args[: 1 if name in ("convert_element_type", "clone", "device_put") else None])
        made = [
            self._expr(a, () if value(a).dim() == 0 else index, guards)
            if isinstance(a, fx.Node)
            else Const(a, compared)
            for a in arguments
        ]
        if name == "signbit" and dtype is not torch.bool:  # PyTorch's metadata has the argument's dtype
            return Op("convert_element_type", (Op(name, tuple(made), torch.bool),), dtype)
        return Op(name, tuple(made), dtype)

    def _asserted(self, node: fx.Node) -> Expr:
        """What holds, as a place in a dimension of size 1."""
        given, message = node.args
        read = node.meta.get("read")
        check = Check(node, 1, str(message)) if read is None else Check(read.user, read.size)
        fails = Op("bitwise_not", (self._expr(given, ()),), torch.bool)  # type: ignore[arg-type]
        return Place(Op("convert_element_type", (fails,), torch.int64), 1, False, self.s.number_of(check))

    def _joined(self, node: fx.Node, index: Map, guards: Guards) -> Expr:
        """The value of the piece that the point falls into."""
        *first, last = PIECEWISE[prim(node)](node, index)
        made = self._expr(last.node, last.index, guards + self._within(last, guards))
        for piece in reversed(first):
            here = self._within(piece, guards)
            made = Op("where", (*here, self._expr(piece.node, piece.index, guards + here), made), made.dtype)
        return made

    def _reshaped(self, node: fx.Node, index: Map, guards: Guards) -> Expr:
        """A tensor in memory read in another shape: by the view's own strides."""
        source: Any = node.args[0]
        number = self.s.buffer_of[source]
        buffer = self.s.buffers[number]
        t = torch.empty_strided(buffer.shape, buffer.strides, device="meta").view(value(node).shape)
        term = maps.linear(index, t.stride(), self.rank)
        access = Access(number, term.offset, term.strides, buffer.dtype, self._indirect(term, guards))
        return self._load(access, guards)

    def _iota(self, node: fx.Node, index: Map, guards: Guards) -> Expr:
        start, step = int(str(node.kwargs["start"])), int(str(node.kwargs["step"]))
        (term,) = index
        scaled = term.times(step, start)
        return Op(
            "convert_element_type",
            (Index(scaled.offset, scaled.strides, self._indirect(scaled, guards)),),
            value(node).dtype,
        )


def _rounded(node: fx.Node, arg: Expr) -> bool:
    """Whether a float64 result is made of narrower numbers, and all that is made of it is rounded to such."""
    if not all(e.dtype in _NARROW for e in walk((arg,)) if isinstance(e, (Load, Reduce))):
        return False
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        for user in waiting.pop().users:
            dtype = getattr(user.meta.get("val"), "dtype", None)
            if prim(user) != "convert_element_type" or dtype not in _NARROW:
                if dtype is not F64:
                    return False
                waiting += [user] if user not in seen else []
                seen.add(user)
    return True
