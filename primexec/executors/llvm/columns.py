"""Kernels whose lanes are results: blocks of columns are accumulated in the first cache while rows stream past.

Each pass begins with a walk along the columns, where what does not change from row to row is computed and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.emit import Value, type_of
from primexec.executors.llvm.instructions import DEAR, REGISTER, splat
from primexec.executors.llvm.ir import Expr, Index, Load, Op, Reduce, Store, Within, operands
from primexec.executors.llvm.layout import Axis
from primexec.executors.llvm.memory import Positions
from primexec.executors.llvm.reductions import Accumulator
from primexec.executors.llvm.spans import Span, whole
from primexec.executors.llvm.target import ELEMENT_BYTES

ROWS = 4  # rows that are added at once to what was accumulated
MORE_ROWS = 8  # of what is read as it is, at least eight times: 0.9 to 0.95 of the time
ROW_VALUES = 12  # of larger bodies, one row
WIDE = 4  # vectors of a row from which on the processor does not foresee the way from row to row
FETCH_BYTES = 1 << 13  # how far ahead rows are asked for


class ColumnWriter(KernelWriter):
    """Writes a kernel whose layout has columns."""

    def _make_scratch(self) -> None:
        self.along: dict[int, bool] = {}  # whether a value differs from column to column
        lane = self._lane_axis
        for v in self.values:
            steps = v.access.strides if isinstance(v, Load) else v.strides if isinstance(v, (Index, Within)) else ()
            own = isinstance(v, Reduce) or bool(steps and steps[lane])
            self.along[id(v)] = own or any(self.along[id(o)] for o in operands(v))
        self.states: dict[int, list[str]] = {}
        self.slots: dict[int, str] = {}
        self.filled: set[int] = set()
        for number in self.passes:
            for r in self._reductions(number):
                a = Accumulator(r)
                self.states[id(r)] = [self._array(a.element) for _ in a.initial(1)]
            for v in self._edge(number):
                if id(v) not in self.slots:
                    self.slots[id(v)] = self._array(REGISTER[v.dtype])

    def _array(self, element: str) -> str:
        room = self.layout.width + self.layout.lanes
        return self.e.emit(f"alloca [{room} x {type_of(_held(element))}], align 64")

    def _edge(self, number: int) -> list[Expr]:
        """What the rows of a pass use and what does not change from row to row, loads and numbers apart."""
        found: dict[int, Expr] = {}
        roots = self._roots(number)
        used = [o for user in self._varying(roots) for o in operands(user)]
        for v in [*roots, *used]:
            if not self.varies[id(v)] and self.along[id(v)] and not (isinstance(v, Load) and not operands(v)):
                found[id(v)] = v
        return list(found.values())

    def _body(self, block: str) -> None:
        axis = self.layout.lane
        assert axis is not None
        self.first = self.e.emit(f"mul i64 {block}, {self.layout.width}")
        self.last = self.e.least(self.e.emit(f"add i64 {self.first}, {self.layout.width}"), axis.size)
        self.row, self.filled = {}, set()
        for number in self.passes:
            self._pass(number)

    def _pass(self, number: int) -> None:
        roots, fixed, reductions = self._roots(number), self._fixed(number), self._reductions(number)
        self._row_values([v for v in self._below([*roots, *(s.value for s in fixed)]) if not self.along[id(v)]])
        edge = [v for v in self._edge(number) if id(v) not in self.filled]

        def begin(at: Positions, width: int) -> None:
            local: dict[int, Value] = {}
            for r in reductions:
                a = Accumulator(r)
                names = [initial for _, initial in a.initial(width)]
                for v, array in zip(a.values(self.e, names, width), self.states[id(r)], strict=True):
                    self._write(array, v, at)
            for e in edge:
                self._write(self.slots[id(e)], splat(self._get(e, width, at, local), width), at)

        if edge or reductions:
            self._along_columns(begin)
        if fixed:
            self._by_first_piece([lambda: self._along_columns(lambda at, width: self._results(fixed, at, width))])
        self.filled |= {id(v) for v in edge}
        if roots:
            self._rows(number, reductions)
        if self.pieces > 1 and reductions:
            self._along_columns(lambda at, width: self._keep(reductions, at, width))

    def _below(self, roots: Sequence[Expr]) -> list[Expr]:
        seen: dict[int, Expr] = {}

        def visit(v: Expr) -> None:
            if id(v) not in seen:
                for o in () if isinstance(v, Reduce) else operands(v):
                    visit(o)
                seen[id(v)] = v

        for root in roots:
            visit(root)
        return list(seen.values())

    def _results(self, stores: Sequence[Store], at: Positions, width: int) -> None:
        local: dict[int, Value] = {}
        for s in stores:
            self._store(s.access, self._get(s.value, width, at, local), width, at)

    def _keep(self, reductions: Sequence[Reduce], at: Positions, width: int) -> None:
        for r in reductions:
            self.workspace.keep(self.e, r, self._state(r, width, at), self.result, self.piece, self._column(at))

    # Columns --------------------------------------------------------------------------------------------

    def _along_columns(self, body: Callable[[Positions, int], None]) -> None:
        """Vectors of columns, and what remains at the end."""
        axis, lanes = self.layout.lane, self.layout.lanes
        assert axis is not None

        def step(span: Span) -> Callable[[str, list[str]], Sequence[str]]:
            def one(i: str, _: list[str]) -> Sequence[str]:
                body({axis.axis: self._at(span, i)}, span.lanes)
                return ()

            return one

        for first, last in self._segments(axis, self.first, self.last):
            even = axis.size % lanes == 0 and first == self.first
            for span in [Span(first, last, lanes, lanes, main=True)] if even else self._vectors(first, last, {}):
                self.e.loop(span.start, span.stop, span.step, step(span))

    def _column(self, at: Positions) -> str:
        return self.e.emit(f"sub i64 {at[self._lane_axis]}, {self.first}")

    def _write(self, array: str, v: Value, at: Positions) -> None:
        if v.element == "i1":
            v = v.cast("zext", "i8")
        place = self.e.emit(f"getelementptr {type_of(v.element)}, ptr {array}, i64 {self._column(at)}")
        self.e.do(f"store {v.type} {v.name}, ptr {place}, align {ELEMENT_BYTES[v.element]}")

    def _read(self, array: str, element: str, width: int, at: Positions) -> Value:
        held = _held(element)
        place = self.e.emit(f"getelementptr {type_of(held)}, ptr {array}, i64 {self._column(at)}")
        name = self.e.emit(f"load {type_of(held, width)}, ptr {place}, align {ELEMENT_BYTES[held]}")
        v = Value(self.e, held, width, name)
        return v.compare("ne", 0) if element == "i1" else v

    def _state(self, r: Reduce, width: int, at: Positions) -> list[Value]:
        return [self._read(array, Accumulator(r).element, width, at) for array in self.states[id(r)]]

    # Rows -----------------------------------------------------------------------------------------------

    def _rows(self, number: int, reductions: Sequence[Reduce]) -> None:
        values = self._varying(self._roots(number))
        plain = not any(isinstance(v, Op) and v.prim in DEAR for v in values) and len(values) <= ROW_VALUES
        more = len(values) == 1 and self.layout.inner[-1].size >= MORE_ROWS * MORE_ROWS
        together = (MORE_ROWS if more else ROWS) if plain and reductions else 1

        def columns(rows: Sequence[Positions]) -> None:
            self._along_columns(lambda at, width: self._rows_at(number, reductions, rows, at, width))

        def nest(loops: tuple[Axis, ...], at: Positions) -> None:
            axis, rest = loops[0], loops[1:]

            def steps(count: int) -> Callable[[str, list[str]], Sequence[str]]:
                def one(i: str, _: list[str]) -> Sequence[str]:
                    if rest:
                        nest(rest, {**at, axis.axis: i})
                        return ()
                    following = [i, *(self.e.emit(f"add i64 {i}, {k}") for k in range(1, count))]
                    columns([{**at, axis.axis: k} for k in following])
                    return ()

                return one

            for begin, end in self._segments(axis, *self._range(axis)):
                middle = begin if rest or together == 1 else whole(self.e, begin, end, together)
                if middle != begin:
                    self.e.loop(begin, middle, together, steps(together))
                self.e.loop(middle, end, 1, steps(1))

        nest(self.layout.inner, {})

    def _rows_at(
        self, number: int, reductions: Sequence[Reduce], rows: Sequence[Positions], column: Positions, width: int
    ) -> None:
        """Some rows of one vector of columns."""
        if self.layout.width >= WIDE * width > WIDE:
            self._fetch(number, rows, column, width)
        elements: list[list[Value]] = [[] for _ in reductions]
        for row in rows:
            local: dict[int, Value] = {}
            at = {**row, **column}
            self._stores(number, width, at, local)
            for found, r in zip(elements, reductions, strict=True):
                found.append(splat(self._get(r.arg, width, at, local), width))
        count = math.prod(a.size for a in self.layout.inner)
        for found, r in zip(elements, reductions, strict=True):
            state = Accumulator(r, rows=count).add(self._state(r, width, column), found, self.mask)
            for v, array in zip(state, self.states[id(r)], strict=True):
                self._write(array, v, column)

    def _fetch(self, number: int, rows: Sequence[Positions], column: Positions, width: int) -> None:
        """Asks for the same columns of rows further on."""
        axis = self.layout.inner[-1].axis
        loads = [v.access for v in self._varying(self._roots(number)) if isinstance(v, Load) and not v.guards]
        for a in loads:
            step = a.strides[axis] * len(rows)
            if step and a.strides[self._lane_axis] == 1 and not a.indirect:
                distance = step * -(-FETCH_BYTES // abs(step * a.dtype.itemsize))
                for row in rows:
                    self._prefetch(a, width, {**row, **column}, distance, 2)

    def _get(self, v: Expr, lanes: int, at: Positions, local: dict[int, Value]) -> Value:
        if id(v) in self.filled and id(v) not in local:
            local[id(v)] = self._read(self.slots[id(v)], REGISTER[v.dtype], lanes, at)
        return super()._get(v, lanes, at, local)

    def _value(self, v: Expr, lanes: int, at: Positions, local: dict[int, Value]) -> Value:
        if not isinstance(v, Reduce):
            return super()._value(v, lanes, at, local)
        if self.layout.pieces > 1:
            return self.workspace.joined(self.e, v, self.result, lanes, self._column(at))
        return Accumulator(v).finish(self._state(v, lanes, at))


def _held(element: str) -> str:
    """How an element stands in an array."""
    return "i8" if element == "i1" else element
