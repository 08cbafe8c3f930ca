"""From kernels to LLVM IR: `void @name(ptr %args, i64 %begin, i64 %end)`, which runs a range of the kernel's units.

A kernel whose reductions are cut into pieces is a function for each pass. What a piece has accumulated stands in the
workspace, whose pointer lies before the first argument; the next pass joins the pieces, in order, wherever it runs.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from primexec.executors.llvm import addresses, ahead, costs, segments
from primexec.executors.llvm.codes import Binding, Part
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import (
    COPIES,
    DEAR,
    F32,
    FLOATS,
    REGISTER,
    constant,
    convert,
    from_memory,
    pointwise,
    rounded,
    splat,
)
from primexec.executors.llvm.ir import (
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
    is_share,
    never_positive,
    operands,
    roots_of,
    stages,
    walk,
)
from primexec.executors.llvm.layout import Axis, Layout, accesses
from primexec.executors.llvm.memory import Memory, Positions, may_part
from primexec.executors.llvm.pieces import WORKSPACE, Workspace
from primexec.executors.llvm.precision import CHOICES, Precision
from primexec.executors.llvm.reductions import Accumulator
from primexec.executors.llvm.spans import Span
from primexec.executors.llvm.target import ELEMENT_BYTES
from primexec.executors.llvm.vmath import COARSE
from primexec.executors.llvm.vmath.core import quotient

BUSY = 2  # dear functions a point of kernels that memory does not hold up
SCRATCH_ELEMENTS = 16384  # of a row kept on the stack


class KernelWriter(Memory):
    """Writes one kernel, whose arguments are pointers to the buffers of its binding.

    Behind them stand, where it checks places, a pointer to what it reports and the number of its first check.
    """

    def __init__(self, module: ModuleText, kernel: Kernel, layout: Layout, precise: bool, binding: Binding) -> None:
        super().__init__(module, layout, precise)
        self.kernel, self.binding, self.starts = kernel, binding, binding.starts
        self.report: addresses.Report | None = None
        self.pieces, self.piece, self.result = layout.pieces, "0", "0"
        self.values = walk(roots_of(kernel))
        self.workspace = Workspace(layout, [v for v in self.values if isinstance(v, Reduce)])
        self.stage = stages(kernel)
        self.inner = {a.axis for a in layout.inner}
        self.varies: dict[int, bool] = {}
        for v in self.values:
            self.varies[id(v)] = self._varies(v)
        self.withins = [v for v in self.values if isinstance(v, Within)]
        self.known: dict[int, bool] = {}  # conditions that are decided where code is written
        self.moving = [s for s in kernel.stores if self._moves(s)]
        written = {s.access.buffer for s in kernel.stores}
        self.again = not any(isinstance(v, Load) and v.access.buffer in written for v in self.values)
        self.row: dict[int, Value] = {}
        self.scratch: dict[int, str] = {}
        self.written: set[int] = set()
        first = (v for v in self._varying(self._roots(0)) if isinstance(v, Load) and not v.guards)
        self.ahead = ahead.asked_for(kernel, layout, [v.access for v in first], self._looped(), module.target)
        self.precision = Precision(self.values, kernel.stores)
        self.apart = may_part(kernel, layout)
        self.masks = addresses.can_mask(module.target, layout, kernel, self.moving)

    def write(self) -> list[Part]:
        """Adds the kernel's functions to the module; they are to run one after the other."""
        layout, passes = self.layout, range(self._passes())
        if layout.pieces == 1:
            return [self._function("", passes, 1)]
        return [self._function(f".{n}", passes[n : n + 1], layout.pieces if self._roots(n) else 1) for n in passes]

    def _function(self, suffix: str, passes: range, pieces: int) -> Part:
        self.e, self.passes, self.pieces = Emitter(self.module), passes, pieces
        self.pointers = {b: addresses.pointer(self.e, i) for i, b in enumerate(self.starts)}
        if any(isinstance(v, Place) for v in self.values):
            self.report = addresses.Report.at(self.e, len(self.starts), self.binding.check)
        if self.workspace.nbytes and self.layout.pieces > 1:
            self.workspace.pointer = addresses.pointer(self.e, WORKSPACE)
        cuts = segments.edges(self.withins, self.layout.lane)[:-1] if self.layout.lane else []
        self._align([s.access for s in self.kernel.stores], all(cut % self.layout.lanes == 0 for cut in cuts))
        self.scratch, self.written = {}, set()
        self._make_scratch()
        if self.layout.flat:
            self._flat()
        else:
            self.e.loop("%begin", "%end", 1, self._unit)
        self._fence()
        self.e.do("ret void")
        self.e.function(f"void @{self.kernel.name}{suffix}(ptr %args, i64 %begin, i64 %end)")
        return Part(suffix, self.layout.results * pieces)

    def _varies(self, v: Expr) -> bool:
        """Whether a value depends on the axes that are walked inside a unit (columns apart)."""
        own = v.access.strides if isinstance(v, Load) else v.strides if isinstance(v, (Index, Within)) else ()
        if own and any(own[a] for a in self.inner):
            return True
        return not isinstance(v, Reduce) and any(self.varies[id(o)] for o in operands(v))

    @property
    def busy(self) -> bool:
        """Whether the time goes into computing: then writing is hidden behind it, and goes through the caches."""
        return sum(isinstance(v, Op) and v.prim in DEAR and self.varies[id(v)] for v in self.values) >= BUSY

    def _moves(self, s: Store) -> bool:
        """Whether a store belongs into the loops of a unit."""
        return self.layout.flat or self.varies[id(s.value)] or any(s.access.strides[a] for a in self.inner)

    def _make_scratch(self) -> None:
        """Room for what is dear and needed in several passes."""
        size = math.prod(a.size for a in self.layout.inner)
        if self.layout.columns or self.layout.flat or len(self.passes) == 1 or size > SCRATCH_ELEMENTS:
            return
        passes: dict[int, set[int]] = {}
        for number in self.passes:
            for v in self._varying(self._roots(number)):
                passes.setdefault(id(v), set()).add(number)
        for v in costs.kept(self.values, {k for k, found in passes.items() if len(found) > 1}):
            room = size + self.layout.lanes
            self.scratch[id(v)] = self.e.emit(f"alloca [{room} x {type_of(REGISTER[v.dtype])}], align 64")

    # Units ----------------------------------------------------------------------------------------------

    def _flat(self) -> None:
        e, axis = self.e, self.layout.lane
        assert axis is not None
        self._row_values([s.value for s in self.kernel.stores])
        begin = e.emit(f"mul i64 %begin, {self.layout.width}")
        end = self.e.least(e.emit(f"mul i64 %end, {self.layout.width}"), axis.size)

        def body(span: Span) -> Callable[[str, list[str]], Sequence[str]]:
            def one(i: str, _: list[str]) -> Sequence[str]:
                self._stores(0, span.lanes, {axis.axis: self._at(span, i)}, {})
                return ()

            return one

        for start, stop in self._segments(axis, begin, end):
            size = axis.size if (start, stop) == (begin, end) else 0
            for span in self._vectors(start, stop, {}, size=size):
                e.loop(span.start, span.stop, span.step, body(span))

    def _segments(self, axis: Axis, begin: str, end: str) -> Iterator[tuple[str, str]]:
        """The parts of a loop between which conditions change; while one is given, they are known."""
        before, cuts = self.known, segments.edges(self.withins, axis)
        for low, high in itertools.pairwise(cuts):
            self.known = {**before, **segments.known(self.withins, axis, low, high)}
            if len(cuts) == 2:
                yield begin, end
            elif begin.isdigit() and end.isdigit():
                if max(int(begin), low) < min(int(end), high):
                    yield str(max(int(begin), low)), str(min(int(end), high))
            else:
                start = self.e.call("i64", "llvm.smax.i64", [("i64", begin), ("i64", str(low))])
                stop = self.e.call("i64", "llvm.smax.i64", [("i64", start), ("i64", self.e.least(end, high))])
                yield start, stop
        self.known = before

    def _by_segment(self, axes: Sequence[Axis], at: Positions, body: Callable[[], None]) -> None:
        """A body for each combination of segments that the axes' positions lie in."""
        cut = [a for a in axes if len(segments.edges(self.withins, a)) > 2]
        if not cut or math.prod(len(segments.edges(self.withins, a)) - 1 for a in cut) > segments.MOST_VARIANTS:
            body()
            return
        axis, before, join = cut[0], self.known, self.e.new_label("join")
        for low, high in itertools.pairwise(segments.edges(self.withins, axis)):
            self.known = {**before, **segments.known(self.withins, axis, low, high)}
            following = self.e.new_label("segment")
            if high < axis.size:
                here = self.e.new_label("segment")
                inside = self.e.emit(f"icmp slt i64 {at[axis.axis]}, {high}")
                self.e.do(f"br i1 {inside}, label %{here}, label %{following}")
                self.e.start(here)
            self._by_segment(cut[1:], at, body)
            self.e.do(f"br label %{join}")
            if high < axis.size:
                self.e.start(following)
        self.known = before
        self.e.start(join)

    def _unit(self, unit: str, _: list[str]) -> Sequence[str]:
        layout, e = self.layout, self.e
        rest, block = unit, "0"
        if self.pieces > 1:
            self.piece, rest = e.emit(f"urem i64 {unit}, {self.pieces}"), e.emit(f"udiv i64 {unit}, {self.pieces}")
        self.result = rest
        if layout.blocks > 1:
            block, rest = e.emit(f"urem i64 {rest}, {layout.blocks}"), e.emit(f"udiv i64 {rest}, {layout.blocks}")
        outer: Positions = {}
        for axis in reversed(layout.outer):
            if axis is layout.outer[0]:
                outer[axis.axis] = rest
            else:
                outer[axis.axis] = e.emit(f"urem i64 {rest}, {axis.size}")
                rest = e.emit(f"udiv i64 {rest}, {axis.size}")
        self.bases = {id(a): self._offset(a, outer) for a in accesses(self.kernel)}
        self.outer = outer
        self._by_segment(layout.outer, outer, lambda: self._body(block))
        return ()

    # Passes ---------------------------------------------------------------------------------------------

    def _passes(self) -> int:
        return 1 + max(self.stage[id(s.value)] for s in self.kernel.stores)

    def _looped(self) -> int:
        """The passes that have loops: not the last, where a result of its reductions is all there is to store."""
        return sum(bool(self._roots(number)) for number in range(self._passes()))

    def _reductions(self, number: int) -> list[Reduce]:
        return [v for v in self.values if isinstance(v, Reduce) and self.stage[id(v.arg)] == number]

    def _moved(self, number: int) -> list[Store]:
        """The stores in the loops of a pass."""
        return [s for s in self.moving if self.stage[id(s.value)] == number]

    def _roots(self, number: int) -> list[Expr]:
        """What the loops of a pass compute."""
        return [*(r.arg for r in self._reductions(number)), *(s.value for s in self._moved(number))]

    def _varying(self, roots: Sequence[Expr]) -> list[Expr]:
        seen: dict[int, Expr] = {}

        def visit(v: Expr) -> None:
            if id(v) not in seen and self.varies[id(v)]:
                seen[id(v)] = v
                for o in operands(v):
                    visit(o)

        for root in roots:
            visit(root)
        return list(seen.values())

    def _body(self, block: str) -> None:
        """The passes of a unit."""
        self.row, self.written = {}, set()
        if self.layout.pieces > 1:
            for r in self.values:
                if isinstance(r, Reduce) and self.stage[id(r)] <= self.passes.start:
                    self.row[id(r)] = self.workspace.joined(self.e, r, self.result, 1)
        for number in self.passes:
            roots, fixed = self._roots(number), self._fixed(number)
            self._row_values([*roots, *(s.value for s in fixed)])
            self._by_first_piece([partial(self._store, s.access, self.row[id(s.value)], 1, {}) for s in fixed])
            if roots:
                self._loops(number)

    def _fixed(self, number: int) -> list[Store]:
        """The stores before the loops of a pass."""
        return [s for s in self.kernel.stores if s not in self.moving and self.stage[id(s.value)] == number]

    def _by_first_piece(self, actions: Sequence[Callable[[], object]]) -> None:
        """What only one of the pieces is to do."""
        if self.pieces == 1 or not actions:
            for action in actions:
                action()
            return
        first, join = self.e.new_label("first"), self.e.new_label("join")
        self.e.do(f"br i1 {self.e.emit(f'icmp eq i64 {self.piece}, 0')}, label %{first}, label %{join}")
        self.e.start(first)
        for action in actions:
            action()
        self.e.do(f"br label %{join}")
        self.e.start(join)

    def _row_values(self, roots: Sequence[Expr]) -> None:
        """Computes, before the loops, what they use and what does not change in them."""
        for v in walk(tuple(roots)):
            if not self.varies[id(v)] and id(v) not in self.row and not isinstance(v, Reduce):
                self.row[id(v)] = self._value(v, 1, {}, {})

    def _range(self, axis: Axis) -> tuple[str, str]:
        """From where to where a loop runs: all of it, or the unit's piece of the outermost."""
        if self.pieces == 1 or axis is not self.layout.inner[0]:
            return "0", str(axis.size)
        begin = self.e.emit(f"mul i64 {self.piece}, {self.layout.chunk}")
        return begin, self.e.least(self.e.emit(f"add i64 {begin}, {self.layout.chunk}"), axis.size)

    def _loops(self, number: int) -> None:
        reductions, widths = self._reductions(number), [self.layout.lanes, 1]
        along, flags = math.prod(a.size for a in self.layout.inner), self.module.target.blends_slowly
        *others, last = [a.size for a in self.layout.inner] or [1]
        terms = math.prod(others) * -(-last // widths[0])
        accumulators = [Accumulator(r, along, terms, flags=flags) for r in reductions]
        carried = [pair for w in widths for a in accumulators for pair in a.initial(w)]
        final = self._nest(number, reductions, accumulators, self.layout.inner, widths, {}, carried)
        states = self._states(accumulators, widths, final)
        for i, (r, a) in enumerate(zip(reductions, accumulators, strict=True)):
            state = a.merge(states[1][i], a.across(states[0][i]))
            if self.pieces > 1:
                self.workspace.keep(self.e, r, state, self.result, self.piece)
            else:
                self.row[id(r)] = a.finish(state)
        self.written |= set(self.scratch) & {id(v) for v in self._varying(self._roots(number))}

    # Loops ----------------------------------------------------------------------------------------------

    def _states(
        self, accumulators: list[Accumulator], widths: list[int], names: Sequence[str]
    ) -> list[list[list[Value]]]:
        rest = iter(names)
        return [[a.values(self.e, [next(rest) for _ in a.initial(w)], w) for a in accumulators] for w in widths]

    def _nest(
        self,
        number: int,
        reductions: list[Reduce],
        accumulators: list[Accumulator],
        loops: tuple[Axis, ...],
        widths: list[int],
        at: Positions,
        carried: list[tuple[str, str]],
    ) -> list[str]:
        """The loops over the inner axes; returns the accumulators after them."""
        if not loops:
            return self._point(number, reductions, accumulators, 1, widths, at, [n for _, n in carried])
        axis, rest = loops[0], loops[1:]
        whole, stores = self._range(axis), [s.access for s in self._moved(number)]

        def again(inside: tuple[Axis, ...], span: Span) -> Callable[[str, list[str]], Sequence[str]]:
            def body(i: str, names: list[str]) -> Sequence[str]:
                here = {**at, axis.axis: self._at(span, i)}
                if inside:
                    pairs = [(t, n) for (t, _), n in zip(carried, names, strict=True)]
                    return self._nest(number, reductions, accumulators, inside, widths, here, pairs)
                return self._point(number, reductions, accumulators, span.lanes, widths, here, names)

            return body

        for begin, end in self._segments(axis, *whole):
            size = int(end) - int(begin) if begin.isdigit() and end.isdigit() and not reductions else 0
            for span in [Span(begin, end, 1, 1)] if rest else self._vectors(begin, end, at, stores, size):
                names = self.e.loop(span.start, span.stop, span.step, again(rest, span), carried)
                carried = [(t, n) for (t, _), n in zip(carried, names, strict=True)]
        return [n for _, n in carried]

    def _point(
        self,
        number: int,
        reductions: list[Reduce],
        accumulators: list[Accumulator],
        width: int,
        widths: list[int],
        at: Positions,
        names: Sequence[str],
    ) -> list[str]:
        """One vector of points: stores, and the accumulators of its width moved on."""
        states = self._states(accumulators, widths, names)
        local: dict[int, Value] = {}
        if self.known and self.scratch:  # what is kept for later passes is kept in every segment
            for v in self._varying(self._roots(number)):
                if id(v) in self.scratch:
                    self._get(v, width, at, local)
        if number == min(1, self._looped() - 1) and width > 1:
            for access, distance, cache in self.ahead:
                self._prefetch(access, width, at, distance, cache)
        self._stores(number, width, at, local)
        for i, (r, a) in enumerate(zip(reductions, accumulators, strict=True)):
            mine = states[widths.index(width)]
            mine[i] = a.add(mine[i], [splat(self._get(r.arg, width, at, local), width)], self.mask)
        return [v.name for group in states for state in group for v in state]

    def _stores(self, number: int, width: int, at: Positions, local: dict[int, Value]) -> None:
        for s in self._moved(number):
            self._store(s.access, self._get(s.value, width, at, local), width, at)

    # Values ---------------------------------------------------------------------------------------------

    def _get(self, v: Expr, lanes: int, at: Positions, local: dict[int, Value]) -> Value:
        if id(v) in self.row:
            return self.row[id(v)]
        if id(v) not in local:
            if id(v) in self.written:
                local[id(v)] = self._from_scratch(v, lanes, at)
            else:
                local[id(v)] = made = self._value(v, lanes, at, local)
                if id(v) in self.scratch:
                    place = self._scratch_place(v, at)
                    made = splat(made, lanes)
                    self.e.do(f"store {made.type} {made.name}, ptr {place}, align {ELEMENT_BYTES[made.element]}")
        return local[id(v)]

    def _scratch_place(self, v: Expr, at: Positions) -> str:
        total = "0"
        for axis in self.layout.inner:
            total = self.e.emit(f"mul i64 {total}, {axis.size}")
            total = self.e.emit(f"add i64 {total}, {at[axis.axis]}")
        return self.e.emit(f"getelementptr {type_of(REGISTER[v.dtype])}, ptr {self.scratch[id(v)]}, i64 {total}")

    def _from_scratch(self, v: Expr, lanes: int, at: Positions) -> Value:
        element = REGISTER[v.dtype]
        text = f"load {type_of(element, lanes)}, ptr {self._scratch_place(v, at)}, align {ELEMENT_BYTES[element]}"
        return Value(self.e, element, lanes, self.e.emit(text))

    def _value(self, v: Expr, lanes: int, at: Positions, local: dict[int, Value]) -> Value:
        match v:
            case Load(access):
                parts = [(f, self._get(i, lanes, at, local)) for f, i in access.indirect]
                guard = self._guard(v, self._limits([p for _, p in parts], access), lanes, at, local)
                return from_memory(self._load(access, lanes, at, parts, guard), access.dtype, self.apart)
            case Within() if id(v) in self.known:
                return Value(self.e, "i1", 1, "true" if self.known[id(v)] else "false")
            case Index() | Within():
                parts = [(f, self._get(i, lanes, at, local)) for f, i in v.indirect]
                index = addresses.total([(1, self._index(v, lanes, at)), *parts])
                return addresses.within(v, index) if isinstance(v, Within) else index
            case Place(arg):
                assert self.report is not None
                found = self._get(arg, lanes, at, local)
                return addresses.place(v, found, self._guard(v, self._limits([found]), lanes, at, local), self.report)
            case Const(number):
                return constant(Value(self.e, "i1", 1, ""), v.dtype, number)
            case Op("where", (condition, yes, other)) if id(condition) in self.known:
                return self._get(yes if self.known[id(condition)] else other, lanes, at, local)
            case Op():
                return self._op(v, [self._get(o, lanes, at, local) for o in v.args])
            case Reduce() | Scan():
                return self.row[id(v)]

    def _guard(
        self, v: Load | Place, limits: list[Value], lanes: int, at: Positions, local: dict[int, Value]
    ) -> Value | None:
        unknown = [self._get(g, lanes, at, local) for g in v.guards if not self.known.get(id(g))]
        return addresses.both([*unknown, *limits])

    def _op(self, v: Op, arguments: list[Value]) -> Value:
        source = v.args[-1].dtype
        if v.prim == "convert_element_type":
            if not self.precise and source in FLOATS and v.dtype in FLOATS and v.dtype.itemsize == 2:
                return arguments[0] if arguments[0].element == "f32" else arguments[0].cast("fptrunc", "f32")
            if source is F32 and v.dtype.itemsize == 2 and self.precision.exact(v.args[0], v.dtype):
                return arguments[0]
            return convert(arguments[0], source, v.dtype, short=self.precision.short(v.args[0]))
        if v.prim in COPIES:
            return arguments[0]
        lanes = max(a.lanes for a in arguments)
        same = [splat(a, lanes) for a in arguments]
        if v.prim == "where":
            return same[0].select(same[1], same[2])
        coarse = self.precise and REGISTER[v.dtype] == "f32" and self.precision.coarse(v)
        emit = (COARSE.get(v.prim) if coarse else None) or pointwise(v.prim, source)
        assert emit is not None, v.prim
        if v.prim == "exp":
            emit = partial(emit, nonpositive=never_positive(v.args[0]), added=self.precision.added(v))
        if coarse and v.prim == "div" and id(v.args[1]) in self.row and self.precision.not_below_one(v.args[1]):
            same[1], emit = splat(1.0 / arguments[1], lanes), operator.mul  # divides once a row
        elif is_share(v) and id(v.args[1]) in self.row and self.module.target.divides_slowly:
            emit = partial(quotient, inverse=splat(1.0 / arguments[1], lanes))
        if lanes == 1 and all(not a.name.startswith("%") for a in same):
            same[0] = addresses.materialised(same[0])
        made = emit(*same)
        if made.element != "f32" or not self.precise or v.prim in CHOICES:
            return made
        return rounded(made, v.dtype, all(self.precision.short(a) for a in v.args))

    def _index(self, v: Index | Within, lanes: int, at: Positions) -> Value:
        outer = {} if self.layout.flat else self.outer
        one = Value(self.e, "i64", 1, self._offset(v, {**outer, **at}))
        step = v.strides[self._lane_axis] if self.layout.lane else 0
        return addresses.ramp(one, step, lanes)
