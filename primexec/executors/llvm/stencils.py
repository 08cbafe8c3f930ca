"""Kernels that add up weighted neighbours: the sums of some vectors stay in registers while their terms pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from primexec.executors.llvm import spans
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.codes import Part
from primexec.executors.llvm.emit import Value, type_of
from primexec.executors.llvm.instructions import REGISTER, splat
from primexec.executors.llvm.ir import Expr, Reduce
from primexec.executors.llvm.layout import STENCIL_ROWS, Axis
from primexec.executors.llvm.memory import Positions
from primexec.executors.llvm.stencil import stencil


class StencilWriter(KernelWriter):
    """Writes a kernel whose layout has terms."""

    def write(self) -> list[Part]:
        found = stencil(self.kernel)
        assert found is not None
        self.found, self.streams = found, frozenset()
        inner = self.layout.inner
        self.loops, self.terms = inner[: -self.layout.terms], inner[-self.layout.terms :]
        return [self._function("", range(self._passes()), self.layout.pieces)]

    def _varies(self, v: Expr) -> bool:
        return isinstance(v, Reduce) or super()._varies(v)

    def _make_scratch(self) -> None:
        """Nothing is kept from pass to pass."""

    def _body(self, block: str) -> None:
        self.row = {}
        self._row_values([*self.found.factors, *(s.value for s in self.kernel.stores)])
        fixed = [s for s in self.kernel.stores if s not in self.moving]
        self._by_first_piece([partial(self._store, s.access, self.row[id(s.value)], 1, {}) for s in fixed])
        if len(self.loops) == 1:
            self._vectors_of([{}])
            return
        rows = self.loops[0]

        def together(count: int) -> Callable[[str, list[str]], Sequence[str]]:
            def some(i: str, _: list[str]) -> Sequence[str]:
                places = [i, *(self.e.emit(f"add i64 {i}, {k}") for k in range(1, count))]
                self._vectors_of([{rows.axis: place} for place in places])
                return ()

            return some

        for begin, end in self._segments(rows, *self._range(rows)):
            middle = spans.whole(self.e, begin, end, STENCIL_ROWS)
            if middle != begin:
                self.e.loop(begin, middle, STENCIL_ROWS, together(STENCIL_ROWS))
            self.e.loop(middle, end, 1, together(1))

    def _vectors_of(self, rows: Sequence[Positions]) -> None:
        """All vectors of some rows."""
        axis = self.loops[-1]

        def step(span: spans.Span) -> Callable[[str, list[str]], Sequence[str]]:
            def one(i: str, _: list[str]) -> Sequence[str]:
                place = self._at(span, i)
                self._points([{**row, axis.axis: place} for row in rows], span.lanes)
                return ()

            return one

        for begin, end in self._segments(axis, *self._range(axis)):
            size = int(end) - int(begin) if begin.isdigit() and end.isdigit() and self.again else 0
            for span in self._vectors(begin, end, {}, size=size):
                self.e.loop(span.start, span.stop, span.step, step(span))

    def _points(self, points: Sequence[Positions], width: int) -> None:
        element = REGISTER[self.found.total.dtype]
        zeros = [(type_of(element, width), "zeroinitializer" if width > 1 else "0.0") for _ in points]
        names = self._sum(self.terms, points, width, zeros)
        for at, name in zip(points, names, strict=True):
            local = {id(self.found.total): Value(self.e, element, width, name)}
            for s in self.moving:
                self._store(s.access, self._get(s.value, width, at, local), width, at)

    def _sum(
        self, terms: Sequence[Axis], points: Sequence[Positions], width: int, carried: list[tuple[str, str]]
    ) -> list[str]:
        """The sums over some axes, on top of what is carried."""
        if not terms:
            return [self._term(at, width, name) for at, (_, name) in zip(points, carried, strict=True)]
        axis, *rest = terms

        def body(i: str, names: list[str]) -> Sequence[str]:
            pairs = [(t, n) for (t, _), n in zip(carried, names, strict=True)]
            return self._sum(rest, [{**at, axis.axis: i} for at in points], width, pairs)

        for begin, end in self._segments(axis, "0", str(axis.size)):
            names = self.e.loop(begin, end, 1, body, carried)
            carried = [(t, n) for (t, _), n in zip(carried, names, strict=True)]
        return [n for _, n in carried]

    def _term(self, at: Positions, width: int, total: str) -> str:
        local: dict[int, Value] = {}
        first, second = (splat(self._get(f, width, at, local), width) for f in self.found.factors)
        return first.muladd(second, Value(self.e, first.element, width, total)).name
