"""Products of matrices: tiles of the result in registers, panels of the right factor and sums in the caches.

A unit is a block of rows and columns. Piece by piece along the inner axis, it packs one panel of columns after the
other, and takes all its rows past each; what the pieces add up to lies in the second cache until the last one. What
packs panels and adds up tiles is the same for all products: it is compiled once a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from primexec.executors.llvm import addresses, engine
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.codes import Part
from primexec.executors.llvm.contraction import blocks, contraction, tile
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import splat
from primexec.executors.llvm.ir import Access, Place
from primexec.executors.llvm.memory import CACHE_LINE, Positions
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.tiles import transposed

Body = Callable[[str, list[str]], Sequence[str]]


class Floats(Emitter):
    """A function over arrays of float32."""

    def place(self, start: str, index: str | int) -> str:
        return self.emit(f"getelementptr float, ptr {start}, i64 {index}")

    def read(self, place: str, lanes: int = 1) -> Value:
        return Value(self, "f32", lanes, self.emit(f"load {type_of('f32', lanes)}, ptr {place}, align 4"))

    def write(self, v: Value, place: str) -> None:
        self.do(f"store {v.type} {v.name}, ptr {place}, align 4")

    def plus(self, a: str, b: str | int) -> str:
        return str(b) if a == "0" else a if str(b) == "0" else self.emit(f"add i64 {a}, {b}")

    def minus(self, a: str | int, b: str | int) -> str:
        return self.emit(f"sub i64 {a}, {b}")

    def times(self, a: str, b: str | int) -> str:
        return a if str(b) == "1" else self.emit(f"mul i64 {a}, {b}")

    def parts(self, a: str, size: int) -> tuple[str, str]:
        """A number's quotient and remainder."""
        return self.emit(f"udiv i64 {a}, {size}"), self.emit(f"urem i64 {a}, {size}")

    def each(self, begin: str, end: str, step: int, body: Callable[[str], object]) -> None:
        """A loop that carries nothing."""

        def one(i: str, _: list[str]) -> Sequence[str]:
            body(i)
            return ()

        self.loop(begin, end, step, one)

    def choose(self, condition: str, yes: Callable[[], object], no: Callable[[], object] = lambda: None) -> None:
        here, other, join = (self.new_label(stem) for stem in ("if", "else", "join"))
        self.do(f"br i1 {condition}, label %{here}, label %{other}")
        for label, body in ((here, yes), (other, no)):
            self.start(label)
            body()
            self.do(f"br label %{join}")
        self.start(join)


# What all products share ----------------------------------------------------------------------------------

PACK, PACK_TURNED, PACK_ROWS, TILE = (f"primexec_{name}" for name in ("pack", "pack_turned", "pack_rows", "tile"))
# pack: from, its stride along the inner axis and across it, the last one across, how many; to, its stride: any strides,
# turned: columns that lie one after another, rows: a panel's rows that do.
# tile: the left factor, its strides across and along, the last row; a panel, its depth; sums, their stride, whether to
# begin with 0.
_SHARED = {
    PACK: "ptr %from, i64 %along, i64 %across, i64 %last, i64 %depth, i64 %width, ptr %to, i64 %step",
    PACK_TURNED: "ptr %from, i64 %across, i64 %last, i64 %depth, ptr %to",
    PACK_ROWS: "ptr %from, i64 %along, i64 %depth, i64 %width, ptr %to, i64 %step",
    TILE: "ptr %left, i64 %across, i64 %along, i64 %last, ptr %panel, i64 %depth, ptr %sums, i64 %step, i1 %first",
}


def declare(module: ModuleText) -> None:
    """Let a module call the functions that are one of `symbols`."""
    for name, signature in _SHARED.items():
        module.declare(name, f"void ({', '.join(p.split()[0] for p in signature.split(', '))})")


def symbols() -> dict[str, int]:
    """Addresses of what `declare` declares."""
    return {name: _loaded().address(name) for name in _SHARED}


@cache
def _loaded() -> engine.Module:
    return engine.compile_module(shared(host()))


def shared(target: Target) -> str:
    """The module that all products share."""
    module = ModuleText(target)
    for name, write in ((PACK, _pack), (PACK_TURNED, _pack_turned), (PACK_ROWS, _pack_rows), (TILE, _tile)):
        e = Floats(module)
        write(e)
        e.do("ret void")
        e.function(f"void @{name}({_SHARED[name]})")
    return module.text()


def _pack(e: Floats) -> None:
    def step(k: str) -> None:
        source, place = e.place("%from", e.times(k, "%along")), e.place("%to", e.times(k, "%step"))

        def one(i: str) -> None:
            e.write(e.read(e.place(source, e.times(e.least(i, "%last"), "%across"))), e.place(place, i))

        e.each("0", "%width", 1, one)

    e.each("0", "%depth", 1, step)


def _pack_rows(e: Floats) -> None:
    """Rows, and asks for what lies behind them: the next panel's."""
    lanes, width = e.target.lanes("f32"), tile(e.target)[1]

    def step(k: str) -> None:
        source, place = e.place("%from", e.times(k, "%along")), e.place("%to", e.times(k, "%step"))
        behind = e.place(source, "%width")
        for line in range(0, width, CACHE_LINE // 4):
            e.prefetch(e.place(behind, line), 2)
        whole = e.emit(f"and i64 %width, {-lanes}")

        def copy(count: int) -> Callable[[str], None]:
            return lambda i: e.write(e.read(e.place(source, i), count), e.place(place, i))

        e.each("0", whole, lanes, copy(lanes))
        e.each(whole, "%width", 1, copy(1))

    e.each("0", "%depth", 1, step)


def _pack_turned(e: Floats) -> None:
    """Squares, which are transposed in registers, and what remains element by element; asks for the next panel.

    A panel of weights that lie outside of the caches takes as long to fetch as a quarter of its products.
    """
    width = tile(e.target)[1]
    side = min(8, e.target.lanes("f32"))
    whole = e.emit(f"and i64 %depth, {-side}")

    def part(first: str) -> None:
        numbers = [e.least(e.plus(first, s), "%last") for s in range(side)]
        columns = [e.place("%from", e.times(n, "%across")) for n in numbers]
        further = [e.place(c, e.times("%across", width)) for c in columns]
        to = e.place("%to", first)

        def square(k: str) -> None:
            place = e.place(to, e.times(k, width))
            for c in further:
                e.prefetch(e.place(c, k), 2)
            for s, v in enumerate(transposed([e.read(e.place(c, k), side) for c in columns])):
                e.write(v, e.place(place, s * width))

        def line(k: str) -> None:
            place = e.place(to, e.times(k, width))
            for s, c in enumerate(columns):
                e.write(e.read(e.place(c, k)), e.place(place, s))

        e.each("0", whole, side, square)
        e.each(whole, "%depth", 1, line)

    e.each("0", str(width), side, part)


def _tile(e: Floats) -> None:
    (height, width), lanes = tile(e.target), e.target.lanes("f32")
    vectors, vector = width // lanes, type_of("f32", lanes)
    rows = [e.place("%left", e.times(e.least(str(r), "%last"), "%across")) for r in range(height)]

    def step(k: str, names: list[str]) -> Sequence[str]:
        panel, (column, *sums) = e.place("%panel", e.times(k, width)), names
        right = [e.read(e.place(panel, v * lanes), lanes) for v in range(vectors)]
        made = []
        for r, row in enumerate(rows):
            factor = splat(e.read(e.place(row, column)), lanes)
            old = (Value(e, "f32", lanes, name) for name in sums[r * vectors :])
            made += [factor.muladd(v, total).name for v, total in zip(right, old, strict=False)]
        return [e.plus(column, "%along"), *made]

    zeros = [(vector, "zeroinitializer")] * (height * vectors)
    names = e.loop("0", "%depth", 1, step, [("i64", "0"), *zeros])
    starts = [e.place("%sums", e.times("%step", r)) for r in range(height)]
    places = [e.place(start, v * lanes) for start in starts for v in range(vectors)]
    made = [Value(e, "f32", lanes, name) for name in names[1:]]

    def keep() -> None:
        for v, place in zip(made, places, strict=True):
            e.write(v, place)

    def add() -> None:
        for v, place in zip(made, places, strict=True):
            e.write(e.read(place, lanes) + v, place)

    e.choose("%first", keep, add)


# One product ----------------------------------------------------------------------------------------------


class ProductWriter(KernelWriter):
    """Writes a kernel that is a product."""

    e: Floats

    def write(self) -> list[Part]:
        found, axes, target = contraction(self.kernel), self.kernel.axes, self.module.target
        assert found is not None
        self.found, self.left, self.right = found, found.left.access, found.right.access
        self.rows, self.columns, self.size = axes[found.rows], axes[found.columns], axes[found.inner]
        self.block = block = blocks(target, [axes[a] for a in found.batch], self.rows, self.columns, self.size)
        self.height, self.width = tile(target)
        self.in_pieces = self.size > block.depth
        self.step = block.columns if self.in_pieces else self.width  # from row to row of the sums
        declare(self.module)
        self.e, self.outer = Floats(self.module), {}
        self.pointers = {b: addresses.pointer(self.e, i) for i, b in enumerate(self.starts)}
        if any(isinstance(v, Place) for v in self.values):
            self.report = addresses.Report.at(self.e, len(self.starts), self.binding.check)
        self.panel = self._room(block.depth * self.width)
        self.sums = self._room((block.rows if self.in_pieces else self.height) * self.step)
        # A left factor whose rows do not lie one after another along the inner axis is copied, block by block.
        self.copied = self._room(block.depth * block.rows) if self.left.strides[found.inner] != 1 else ""
        self.e.each("%begin", "%end", 1, self._block)
        self.e.do("ret void")
        self.e.function(f"void @{self.kernel.name}(ptr %args, i64 %begin, i64 %end)")
        return [Part("", block.units)]

    def _room(self, count: int) -> str:
        return self.e.emit(f"alloca [{count} x float], align 64")

    def _element(self, access: Access, at: Positions) -> str:
        return self.e.place(self.pointers[access.buffer], self._offset(access, {**self.batch, **at}))

    def _call(self, name: str, *arguments: str | int) -> None:
        types = [p.split()[0] for p in _SHARED[name].split(", ")]
        self.e.call("void", name, [(t, str(a)) for t, a in zip(types, arguments, strict=True)])

    def _block(self, unit: str) -> None:
        e, block, found = self.e, self.block, self.found
        rest, group = e.parts(unit, -(-self.columns // block.columns))
        rest, number = e.parts(rest, -(-self.rows // block.rows))
        self.batch: Positions = {}
        for axis in reversed(found.batch):
            rest, self.batch[axis] = e.parts(rest, self.kernel.axes[axis])
        self.row, self.first_row, self.first_column = {}, e.times(number, block.rows), e.times(group, block.columns)
        row_end = e.least(e.plus(self.first_row, block.rows), self.rows)
        column_end = e.least(e.plus(self.first_column, block.columns), self.columns)

        def piece(start: str) -> None:
            self.start, self.depth = start, e.least(e.minus(self.size, start), block.depth)
            if self.copied:
                self._copy_rows(e.minus(row_end, self.first_row))

            def panel(column: str) -> None:
                self._pack(column)
                e.each(self.first_row, row_end, self.height, lambda row: self._tile(row, column, row_end))

            e.each(self.first_column, column_end, self.width, panel)

        e.each("0", str(self.size), block.depth, piece)

    def _copy_rows(self, count: str) -> None:
        """The left factor's block, so that elements of its columns lie one after another."""
        found, strides = self.found, self.left.strides
        place = self._element(self.left, {found.rows: self.first_row, found.inner: self.start})
        along, across = strides[found.inner], strides[found.rows]
        if across == 1:
            self._call(PACK_ROWS, place, along, self.depth, count, self.copied, self.block.rows)
        else:
            last = self.e.minus(count, 1)
            self._call(PACK, place, along, across, last, self.depth, count, self.copied, self.block.rows)

    def _is_whole(self, column: str) -> str:
        return self.e.emit(f"icmp sle i64 {self.e.plus(column, self.width)}, {self.columns}")

    def _pack(self, column: str) -> None:
        """A panel of the right factor: for each step along the inner axis its columns, the last one repeated."""
        found, strides, width = self.found, self.right.strides, self.width
        place = self._element(self.right, {found.inner: self.start, found.columns: column})
        along, across = strides[found.inner], strides[found.columns]
        last = self.e.minus(self.columns - 1, column)

        def by_elements() -> None:
            self._call(PACK, place, along, across, last, self.depth, width, self.panel, width)

        def by_rows() -> None:
            self._call(PACK_ROWS, place, along, self.depth, width, self.panel, width)

        if across == 1:
            self.e.choose(self._is_whole(column), by_rows, by_elements)
        elif along == 1:
            self._call(PACK_TURNED, place, across, last, self.depth, self.panel)
        else:
            by_elements()

    def _tile(self, row: str, column: str, row_end: str) -> None:
        """A tile's sums along one piece of the inner axis, and what is made of them after the last one."""
        e, found, at = self.e, self.found, "0"
        if self.in_pieces:
            at = e.plus(e.times(e.minus(row, self.first_row), self.step), e.minus(column, self.first_column))
        sums, count = e.place(self.sums, at), e.least(e.minus(row_end, row), self.height)
        if self.copied:
            left, across, along = e.place(self.copied, e.minus(row, self.first_row)), 1, self.block.rows
        else:
            left = self._element(self.left, {found.rows: row, found.inner: self.start})
            across, along = self.left.strides[found.rows], 1
        first = e.emit(f"icmp eq i64 {self.start}, 0")
        last = e.minus(count, 1)
        self._call(TILE, left, across, along, last, self.panel, self.depth, sums, self.step, first)
        if self.in_pieces:
            done = e.emit(f"icmp sge i64 {e.plus(self.start, self.block.depth)}, {self.size}")
            e.choose(done, lambda: self._finish(row, count, column, sums))
        else:
            self._finish(row, count, column, sums)

    def _finish(self, row: str, count: str, column: str, sums: str) -> None:
        """What the kernel stores of a tile."""
        e, found = self.e, self.found

        def points(width: int, place: str, at: Positions) -> None:
            self.row = {id(found.total): e.read(place, width)}
            local: dict[int, Value] = {}
            for s in self.kernel.stores:
                self._store(s.access, self._get(s.value, width, at, local), width, at)

        def line(r: str) -> None:
            place, at = e.place(sums, e.times(r, self.step)), {**self.batch, found.rows: e.plus(row, r)}

            def one(i: str) -> None:
                points(1, e.place(place, i), {**at, found.columns: e.plus(column, i)})

            e.choose(
                self._is_whole(column),
                lambda: points(self.width, place, {**at, found.columns: column}),
                lambda: e.each("0", e.minus(self.columns, column), 1, one),
            )

        e.each("0", count, 1, line)
