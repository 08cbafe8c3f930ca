"""The workspace: what the pieces of a reduction have accumulated, until a later pass joins them."""

from __future__ import annotations

from collections.abc import Sequence

from primexec.executors.llvm.emit import Emitter, Value, type_of
from primexec.executors.llvm.ir import Reduce
from primexec.executors.llvm.layout import Layout
from primexec.executors.llvm.reductions import Accumulator

WORKSPACE = -1  # place of its pointer, counted from the first argument's
SLOT = 8  # bytes of one number


class Workspace:
    """One number for each state of each reduction, result, piece and column."""

    def __init__(self, layout: Layout, reductions: Sequence[Reduce]) -> None:
        self.layout, self.pointer, self.first = layout, "", dict[int, int]()
        count = 0
        for r in () if layout.terms else reductions:  # sums of few terms are never cut
            self.first[id(r)] = count
            count += len(Accumulator(r).initial(1))
        self.nbytes = SLOT * count * layout.results * layout.pieces * layout.width

    def _places(self, e: Emitter, r: Reduce, result: str, piece: str, column: str) -> list[str]:
        places = []
        for k in range(len(Accumulator(r).initial(1))):
            index = e.emit(f"add i64 {result}, {(self.first[id(r)] + k) * self.layout.results}")
            for factor, more in ((self.layout.pieces, piece), (self.layout.width, column)):
                index = e.emit(f"mul i64 {index}, {factor}")
                index = e.emit(f"add i64 {index}, {more}")
            places.append(e.emit(f"getelementptr [{SLOT} x i8], ptr {self.pointer}, i64 {index}"))
        return places

    def keep(self, e: Emitter, r: Reduce, state: list[Value], result: str, piece: str, column: str = "0") -> None:
        """Leave a piece's state; a vector's lanes are columns."""
        for v, place in zip(state, self._places(e, r, result, piece, column), strict=True):
            wide = v.cast("zext", "i64") if v.element in ("i1", "i8", "i16", "i32") else v
            if wide.element == "f32":
                wide = wide.cast("fpext", "f64")
            e.do(f"store {wide.type} {wide.name}, ptr {place}, align {SLOT}")

    def joined(self, e: Emitter, r: Reduce, result: str, lanes: int, column: str = "0") -> Value:
        """The value of a reduction whose pieces are all there."""
        a = Accumulator(r)
        initial = a.initial(lanes)
        wide = "f64" if a.element in ("f32", "f64") else "i64"

        def body(piece: str, names: list[str]) -> Sequence[str]:
            found = []
            for place in self._places(e, r, result, piece, column):
                text = f"load {type_of(wide, lanes)}, ptr {place}, align {SLOT}"
                v = Value(e, wide, lanes, e.emit(text))
                if wide != a.element:
                    v = v.cast("fptrunc" if wide == "f64" else "trunc", a.element)
                found.append(v)
            return [v.name for v in a.merge(a.values(e, names, lanes), found)]

        return a.finish(a.values(e, e.loop("0", str(self.layout.pieces), 1, body, initial), lanes))
