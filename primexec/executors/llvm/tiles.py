"""Kernels whose operands follow each other along different axes: squares of the domain, turned in the first cache.

What lies across the lanes is copied into a tile before the square is computed, or out of one after it, by blocks of as
many vectors as a vector has elements, which are transposed in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.emit import Value, picked, type_of
from primexec.executors.llvm.instructions import MEMORY
from primexec.executors.llvm.ir import Access
from primexec.executors.llvm.layout import TILE, accesses, lies_across
from primexec.executors.llvm.memory import Positions
from primexec.executors.llvm.spans import whole
from primexec.executors.llvm.target import ELEMENT_BYTES

Corner = tuple[str, str]  # indices of rows and lanes


def transposed(rows: list[Value]) -> list[Value]:
    """As many vectors as each has elements, turned: blocks of half the size change places, then their halves."""
    n, step = len(rows), len(rows) // 2
    while step:
        made = list(rows)
        for i in (i for i in range(n) if not i & step):
            a, b = rows[i], rows[i + step]
            low = [k if not k & step else n + k - step for k in range(n)]
            high = [k + step if not k & step else n + k for k in range(n)]
            made[i], made[i + step] = picked(a, low, b), picked(a, high, b)
        rows, step = made, step // 2
    return rows


class TileWriter(KernelWriter):
    """Writes a kernel whose layout has an axis across the lanes."""

    def _make_scratch(self) -> None:
        assert self.layout.across is not None
        self.across = self.layout.across.axis
        lane = self._lane_axis
        self.tiles: dict[int, str] = {}
        for a in accesses(self.kernel):
            if lies_across(a, lane, self.across):
                type_ = type_of(MEMORY[a.dtype])
                self.tiles[id(a)] = self.e.emit(f"alloca [{TILE * TILE} x {type_}], align 64")

    def _body(self, block: str) -> None:
        lane, across = self.layout.lane, self.layout.across
        assert lane is not None
        assert across is not None
        columns = -(-lane.size // TILE)
        self.corner = tuple(
            self.e.emit(f"mul i64 {self.e.emit(f'{how} i64 {block}, {columns}')}, {TILE}") for how in ("udiv", "urem")
        )
        ends = [self.e.emit(f"add i64 {start}, {TILE}") for start in self.corner]
        self.ends = tuple(self.e.least(end, axis.size) for end, axis in zip(ends, (across, lane), strict=True))
        self.row = {}
        self._row_values([s.value for s in self.kernel.stores])
        loads = {id(a): a for a in accesses(self.kernel)[len(self.kernel.stores) :]}
        for a in loads.values():
            if id(a) in self.tiles:
                self._turn(a, self._into_tile)
        rows, lanes = self.corner
        vectors = whole(self.e, lanes, self.ends[1], self.layout.lanes)

        def row(t: str, _: list[str]) -> Sequence[str]:
            def columns(width: int) -> Callable[[str, list[str]], Sequence[str]]:
                def one(i: str, _: list[str]) -> Sequence[str]:
                    self._stores(0, width, {across.axis: t, lane.axis: i}, {})
                    return ()

                return one

            self.e.loop(lanes, vectors, self.layout.lanes, columns(self.layout.lanes))
            self.e.loop(vectors, self.ends[1], 1, columns(1))
            return ()

        self.e.loop(rows, self.ends[0], 1, row)
        for s in self.kernel.stores:
            if id(s.access) in self.tiles:
                self._turn(s.access, self._out_of_tile)

    def _turn(self, a: Access, copy: Callable[[Access, Corner, int], None]) -> None:
        """Copies all of a tile: squares, then what remains at two edges one by one."""
        side = min(16, max(4, self.module.target.vector_bytes // ELEMENT_BYTES[MEMORY[a.dtype]]))
        (t0, l0), (t1, l1) = self.corner, self.ends
        middle_t, middle_l = whole(self.e, t0, t1, side), whole(self.e, l0, l1, side)

        def area(rows: tuple[str, str], lanes: tuple[str, str], step: int) -> None:
            def outer(i: str, _: list[str]) -> Sequence[str]:
                def inner(t: str, _: list[str]) -> Sequence[str]:
                    copy(a, (t, i), step)
                    return ()

                self.e.loop(*rows, step, inner)
                return ()

            self.e.loop(*lanes, step, outer)

        area((t0, middle_t), (l0, middle_l), side)
        area((middle_t, t1), (l0, middle_l), 1)
        area((t0, t1), (middle_l, l1), 1)

    def _into_tile(self, a: Access, at: Corner, side: int) -> None:
        for k, v in enumerate(transposed([self._outside(a, at, k, side) for k in range(side)])):
            self._write(self._tile_place(a, at, k), v)

    def _out_of_tile(self, a: Access, at: Corner, side: int) -> None:
        rows = [self._read(self._tile_place(a, at, k), MEMORY[a.dtype], side) for k in range(side)]
        for k, v in enumerate(transposed(rows)):
            self._write(self._outside_place(a, at, k), v)

    def _outside(self, a: Access, at: Corner, k: int, side: int) -> Value:
        return self._read(self._outside_place(a, at, k), MEMORY[a.dtype], side)

    def _outside_place(self, a: Access, at: Corner, k: int) -> str:
        """Where elements along `across` begin, k steps further along the lanes."""
        total = self._offset(a, {self.across: at[0], self._lane_axis: at[1]}, self.bases[id(a)])
        index = self.e.emit(f"add i64 {total}, {k * a.strides[self._lane_axis]}")
        return self.e.emit(f"getelementptr {type_of(MEMORY[a.dtype])}, ptr {self.pointers[a.buffer]}, i64 {index}")

    def _tile_place(self, a: Access, at: Corner, k: int = 0) -> str:
        """Where elements along the lanes begin, k steps further along `across`."""
        t, i = (self.e.emit(f"sub i64 {index}, {start}") for index, start in zip(at, self.corner, strict=True))
        index = self.e.emit(f"mul i64 {t}, {TILE}")
        index = self.e.emit(f"add i64 {index}, {i}")
        index = self.e.emit(f"add i64 {index}, {k * TILE}")
        return self.e.emit(f"getelementptr {type_of(MEMORY[a.dtype])}, ptr {self.tiles[id(a)]}, i64 {index}")

    def _read(self, place: str, element: str, lanes: int) -> Value:
        name = self.e.emit(f"load {type_of(element, lanes)}, ptr {place}, align {ELEMENT_BYTES[element]}")
        return Value(self.e, element, lanes, name)

    def _write(self, place: str, v: Value) -> None:
        self.e.do(f"store {v.type} {v.name}, ptr {place}, align {ELEMENT_BYTES[v.element]}")

    def _places(
        self, access: Access, lanes: int, at: Positions, parts: Sequence[tuple[int, Value]] = ()
    ) -> tuple[list[str], int]:
        if id(access) not in self.tiles:
            return super()._places(access, lanes, at, parts)
        return [self._tile_place(access, (at[self.across], at[self._lane_axis]))], 1
