"""Products of matrices: tiles of the result in registers, panels of the right factor and sums in the caches.

A unit is a block of rows and columns. Piece by piece along the inner axis, it packs one panel of columns after the
other, and takes all its rows past each; what the pieces add up to lies in the second cache until the last one. All that
is the same for all products, and compiled once a process: of a kernel's own is what becomes of a tile of sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch

from primexec.executors.llvm import addresses, engine, threads
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.codes import Part
from primexec.executors.llvm.contraction import blocks, contraction, tile
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import F32, MEMORY, from_memory, splat
from primexec.executors.llvm.ir import Kernel, Place
from primexec.executors.llvm.memory import CACHE_LINE, Positions
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.tiles import transposed

Body = Callable[[str, list[str]], Sequence[str]]


class Floats(Emitter):
    """A function over arrays of float32."""

    def place(self, start: str, index: str | int, dtype: torch.dtype = F32) -> str:
        return self.emit(f"getelementptr {type_of(MEMORY[dtype])}, ptr {start}, i64 {index}")

    def read(self, place: str, lanes: int = 1, dtype: torch.dtype = F32) -> Value:
        """Elements, widened to float32."""
        element = MEMORY[dtype]
        loaded = self.emit(f"load {type_of(element, lanes)}, ptr {place}, align {dtype.itemsize}")
        return from_memory(Value(self, element, lanes, loaded), dtype)

    def write(self, v: Value, place: str) -> None:
        self.do(f"store {v.type} {v.name}, ptr {place}, align 4")

    def plus(self, a: str, b: str | int) -> str:
        return str(b) if a == "0" else a if str(b) == "0" else self.emit(f"add i64 {a}, {b}")

    def minus(self, a: str | int, b: str | int) -> str:
        return self.emit(f"sub i64 {a}, {b}")

    def times(self, a: str, b: str | int) -> str:
        return a if str(b) == "1" else self.emit(f"mul i64 {a}, {b}")

    def choice(self, condition: str, yes: str | int, no: str | int, kind: str = "i64") -> str:
        return self.emit(f"select i1 {condition}, {kind} {yes}, {kind} {no}")

    def parts(self, a: str, size: str | int) -> tuple[str, str]:
        """A number's quotient and remainder."""
        return self.emit(f"udiv i64 {a}, {size}"), self.emit(f"urem i64 {a}, {size}")

    def each(self, begin: str, end: str, step: str | int, body: Callable[[str], object]) -> None:
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
BLOCK, KEEP, PLAIN, PRODUCT = (f"primexec_{name}" for name in ("block", "keep", "plain", "product"))
# pack: from, its stride along the inner axis and across it, the last one across, how many; to, its stride: any strides,
# turned: columns that lie one after another, rows: a panel's rows that do.
# tile: the left factor, its strides across and along, the last row; a panel, its depth; sums, their stride, whether to
# begin with 0.
# block: the factors with their strides across and along the inner axis; the rows and columns of the block, and how many
# columns there are; the inner axis, and the depth of a piece of it; the sizes of a whole block; what finishes tiles.
# keep: finishes tiles of a plain product, blocks of which `plain` computes, and all of which `product`: a job has in 64
# bits each what `Job` has.
_SHARED = {
    PACK: "ptr %from, i64 %along, i64 %across, i64 %last, i64 %depth, i64 %width, ptr %to, i64 %step",
    PACK_TURNED: "ptr %from, i64 %across, i64 %last, i64 %depth, ptr %to",
    PACK_ROWS: "ptr %from, i64 %along, i64 %depth, i64 %width, ptr %to, i64 %step",
    TILE: "ptr %left, i64 %across, i64 %along, i64 %last, ptr %panel, i64 %depth, ptr %sums, i64 %step, i1 %first",
    BLOCK: "ptr %left, i64 %left.across, i64 %left.along, ptr %right, i64 %right.across, i64 %right.along, "
    "i64 %row, i64 %row.end, i64 %column, i64 %column.end, i64 %columns, i64 %size, i64 %depth, "
    "i64 %block.rows, i64 %block.columns, ptr %finish, ptr %args, i64 %batch",
    KEEP: "ptr %job, i64 %batch, i64 %row, i64 %count, i64 %column, ptr %sums, i64 %step",
    PLAIN: "ptr %job, i64 %begin, i64 %end",
    PRODUCT: "ptr %job, i64 %units",
}
_FINISH = "ptr %args, i64 %batch, i64 %row, i64 %count, i64 %column, ptr %sums, i64 %step"


Dtypes = tuple[torch.dtype, torch.dtype]  # of the factors: what is not float32 is widened where it is packed
FLOATS = F32, F32


def named(name: str, *dtypes: torch.dtype) -> str:
    """What a function is called that reads factors of such dtypes."""
    return "_".join((name, *(MEMORY[d] for d in dtypes)))


def _types(name: str) -> list[str]:
    return [p.split()[0] for p in _SHARED[name].split(", ")]


def _call(e: Emitter, name: str, *arguments: str | int, dtypes: Sequence[torch.dtype] = ()) -> None:
    given = (f"{t} {a}" for t, a in zip(_types(name), arguments, strict=True))
    e.do(f"call void @{named(name, *dtypes)}({', '.join(given)})")


def declare(module: ModuleText, dtypes: Dtypes) -> None:
    """Let a module call what computes blocks, one of `symbols`."""
    module.declare(named(BLOCK, *dtypes), f"void ({', '.join(_types(BLOCK))})")


def symbols(kernels: Iterable[Kernel]) -> dict[str, int]:
    """Addresses of what kernels declare."""
    kinds = {(c.left.dtype, c.right.dtype) for c in map(contraction, kernels) if c}
    return {(name := named(BLOCK, *dtypes)): _loaded(dtypes).address(name) for dtypes in kinds}


@cache
def _loaded(dtypes: Dtypes) -> engine.Module:
    return engine.compile_module(shared(host(), dtypes), symbols=threads.symbols())


def shared(target: Target, dtypes: Dtypes = FLOATS) -> str:
    """The module that all products of such factors share; those of float32 can be had plain."""
    module = ModuleText(target)
    threads.declare(module)

    def function(name: str, write: Callable[..., None], *read: torch.dtype) -> None:
        e = Floats(module)
        write(e, *read)
        e.do("ret void")
        e.function(f"void @{named(name, *read)}({_SHARED[name]})")

    for dtype in dict.fromkeys(dtypes):
        for name, pack in ((PACK, _pack), (PACK_TURNED, _pack_turned), (PACK_ROWS, _pack_rows)):
            function(name, pack, dtype)
    function(TILE, _tile)
    function(BLOCK, _block, *dtypes)
    for name, write in ((KEEP, _keep), (PLAIN, _plain), (PRODUCT, _product)) if dtypes == FLOATS else ():
        function(name, write)
    return module.text()


def _pack(e: Floats, dtype: torch.dtype) -> None:
    def step(k: str) -> None:
        source, place = e.place("%from", e.times(k, "%along"), dtype), e.place("%to", e.times(k, "%step"))

        def one(i: str) -> None:
            element = e.place(source, e.times(e.least(i, "%last"), "%across"), dtype)
            e.write(e.read(element, 1, dtype), e.place(place, i))

        e.each("0", "%width", 1, one)

    e.each("0", "%depth", 1, step)


def _pack_rows(e: Floats, dtype: torch.dtype) -> None:
    """Rows, and asks for what lies behind them: the next panel's."""
    lanes, width = e.target.lanes("f32"), tile(e.target)[1]

    def step(k: str) -> None:
        source, place = e.place("%from", e.times(k, "%along"), dtype), e.place("%to", e.times(k, "%step"))
        behind = e.place(source, "%width", dtype)
        for line in range(0, width, CACHE_LINE // dtype.itemsize):
            e.prefetch(e.place(behind, line, dtype), 2)
        whole = e.emit(f"and i64 %width, {-lanes}")

        def copy(count: int) -> Callable[[str], None]:
            return lambda i: e.write(e.read(e.place(source, i, dtype), count, dtype), e.place(place, i))

        e.each("0", whole, lanes, copy(lanes))
        e.each(whole, "%width", 1, copy(1))

    e.each("0", "%depth", 1, step)


def _pack_turned(e: Floats, dtype: torch.dtype) -> None:
    """Squares, which are transposed in registers, and what remains element by element; asks for the next panel.

    A panel of weights that lie outside of the caches takes as long to fetch as a quarter of its products.
    """
    width = tile(e.target)[1]
    side = min(8, e.target.lanes("f32"))
    whole = e.emit(f"and i64 %depth, {-side}")

    def part(first: str) -> None:
        numbers = [e.least(e.plus(first, s), "%last") for s in range(side)]
        columns = [e.place("%from", e.times(n, "%across"), dtype) for n in numbers]
        further = [e.place(c, e.times("%across", width), dtype) for c in columns]
        to = e.place("%to", first)

        def square(k: str) -> None:
            place = e.place(to, e.times(k, width))
            for c in further:
                e.prefetch(e.place(c, k, dtype), 2)
            for s, v in enumerate(transposed([e.read(e.place(c, k, dtype), side, dtype) for c in columns])):
                e.write(v, e.place(place, s * width))

        def line(k: str) -> None:
            place = e.place(to, e.times(k, width))
            for s, c in enumerate(columns):
                e.write(e.read(e.place(c, k, dtype), 1, dtype), e.place(place, s))

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


def _block(e: Floats, left_dtype: torch.dtype, right_dtype: torch.dtype) -> None:
    height, width = tile(e.target)
    widens = left_dtype is not F32

    def room(rows: str | int, columns: str | int) -> str:
        return e.emit(f"alloca float, i64 {e.times(str(rows), columns)}, align 64")

    # A left factor whose rows do not lie one after another along the inner axis, or are widened, is copied by blocks.
    turns, in_pieces = e.emit("icmp ne i64 %left.along, 1"), e.emit("icmp sgt i64 %size, %depth")
    copies = "true" if widens else turns
    step = e.choice(in_pieces, "%block.columns", width)  # from row to row of the sums
    panel, sums = room("%depth", width), room(e.choice(in_pieces, "%block.rows", height), step)
    copied = room(e.choice(copies, "%depth", 0), "%block.rows")

    def piece(start: str) -> None:
        depth, first = e.least(e.minus("%size", start), "%depth"), e.emit(f"icmp eq i64 {start}, 0")
        done = e.emit(f"icmp sge i64 {e.plus(start, '%depth')}, %size")
        left, right = (
            e.place(f"%{side}", e.times(start, f"%{side}.along"), dtype)
            for side, dtype in (("left", left_dtype), ("right", right_dtype))
        )
        e.choose(copies, lambda: copy_rows(e.place(left, e.times("%row", "%left.across"), left_dtype), depth))

        def tiles(column: str) -> None:
            pack(e.place(right, e.times(column, "%right.across"), right_dtype), column, depth)

            def one(row: str) -> None:
                below, beside = e.minus(row, "%row"), e.minus(column, "%column")
                place = e.place(sums, e.choice(in_pieces, e.plus(e.times(below, step), beside), 0))
                count = e.least(e.minus("%row.end", row), height)
                own = (
                    e.place(copied, e.times(below, "%depth")) if widens else e.place(left, e.times(row, "%left.across"))
                )
                across, along = (
                    e.choice(turns, 1, "%depth" if widens else "%left.across"),
                    e.choice(turns, "%block.rows", 1),
                )
                source = e.choice(turns, e.place(copied, below), own, kind="ptr")
                _call(e, TILE, source, across, along, e.minus(count, 1), panel, depth, place, step, first)
                given = f"ptr %args, i64 %batch, i64 {row}, i64 {count}, i64 {column}, ptr {place}, i64 {step}"
                e.choose(done, lambda: e.do(f"call void %finish({given})"))

            e.each("%row", "%row.end", height, one)

        e.each("%column", "%column.end", width, tiles)

    def copy_rows(place: str, depth: str) -> None:
        count, dtypes = e.minus("%row.end", "%row"), (left_dtype,)

        def turned() -> None:
            sizes = depth, count, copied, "%block.rows"
            e.choose(
                e.emit("icmp eq i64 %left.across, 1"),
                lambda: _call(e, PACK_ROWS, place, "%left.along", *sizes, dtypes=dtypes),
                lambda: _call(e, PACK, place, "%left.along", "%left.across", e.minus(count, 1), *sizes, dtypes=dtypes),
            )

        if widens:
            rows = place, "%left.across", count, depth, copied, "%depth"
            e.choose(turns, turned, lambda: _call(e, PACK_ROWS, *rows, dtypes=dtypes))
        else:
            turned()

    def pack(place: str, column: str, depth: str) -> None:
        """A panel of the right factor: for each step along the inner axis its columns, the last one repeated."""
        last, dtypes = e.minus(e.minus("%columns", 1), column), (right_dtype,)
        whole = e.emit(f"icmp sge i64 {last}, {width - 1}")
        in_rows = e.emit(f"and i1 {whole}, {e.emit('icmp eq i64 %right.across, 1')}")
        e.choose(
            in_rows,
            lambda: _call(e, PACK_ROWS, place, "%right.along", depth, width, panel, width, dtypes=dtypes),
            lambda: e.choose(
                e.emit("icmp eq i64 %right.along, 1"),
                lambda: _call(e, PACK_TURNED, place, "%right.across", last, depth, panel, dtypes=dtypes),
                lambda: _call(
                    e, PACK, place, "%right.along", "%right.across", last, depth, width, panel, width, dtypes=dtypes
                ),
            ),
        )

    e.each("0", "%size", "%depth", piece)


def _keep(e: Floats) -> None:
    (_, width), lanes, job = tile(e.target), e.target.lanes("f32"), Job.read(e)
    count = e.least(e.minus(job["columns"], "%column"), width)
    whole = e.emit(f"and i64 {count}, {-lanes}")

    def line(r: str) -> None:
        number = e.plus(e.times("%batch", job["rows"]), e.plus("%row", r))
        to = e.place(job["result"], e.plus(e.times(number, job["columns"]), "%column"))
        source = e.place("%sums", e.times(r, "%step"))

        def copy(size: int) -> Callable[[str], None]:
            return lambda i: e.write(e.read(e.place(source, i), size), e.place(to, i))

        e.each("0", whole, lanes, copy(lanes))
        e.each(whole, count, 1, copy(1))

    e.each("0", "%count", 1, line)


def _plain(e: Floats) -> None:
    job = Job.read(e)

    def one(unit: str) -> None:
        rest, group = e.parts(unit, job["column_blocks"])
        batch, number = e.parts(rest, job["row_blocks"])
        factors = []
        for side in ("left", "right"):
            place = e.place(job[side], e.times(batch, job[f"{side}_batch"]))
            factors += [place, job[f"{side}_across"], job[f"{side}_along"]]
        row, column = e.times(number, job["block_rows"]), e.times(group, job["block_columns"])
        ends = [e.least(e.plus(at, job[f"block_{n}"]), job[n]) for at, n in ((row, "rows"), (column, "columns"))]
        sizes = [job[n] for n in ("columns", "inner", "depth", "block_rows", "block_columns")]
        _call(e, BLOCK, *factors, row, ends[0], column, ends[1], *sizes, f"@{KEEP}", "%job", batch, dtypes=FLOATS)

    e.each("%begin", "%end", 1, one)


def _product(e: Floats) -> None:
    e.do(f"call void @{threads.PARALLEL}(ptr @{PLAIN}, ptr %job, i64 %units, i64 1)")


class Job(ctypes.Structure):
    """A plain product: addresses of its operands, strides of its factors, and its sizes."""

    names = (
        "left", "left_batch", "left_across", "left_along", "right", "right_batch", "right_across", "right_along",
        "result", "rows", "columns", "inner", "depth", "block_rows", "block_columns", "row_blocks", "column_blocks",
    )  # fmt: skip
    _fields_ = [(name, ctypes.c_int64) for name in names]

    @classmethod
    def read(cls, e: Floats) -> dict[str, str]:
        """Its fields, inside of a function that is given it."""
        kinds = {n: "ptr" if n in ("left", "right", "result") else "i64" for n in cls.names}
        places = {n: e.emit(f"getelementptr i64, ptr %job, i64 {i}") for i, n in enumerate(cls.names)}
        return {n: e.emit(f"load {kinds[n]}, ptr {place}") for n, place in places.items()}


def product() -> Callable[[Job, int], None]:
    """What computes a plain product of so many blocks."""
    function = ctypes.CFUNCTYPE(None, ctypes.POINTER(Job), ctypes.c_int64)(_loaded(FLOATS).address(PRODUCT))
    return lambda job, units: function(job, units)


# One product ----------------------------------------------------------------------------------------------


class ProductWriter(KernelWriter):
    """Writes a kernel that is a product."""

    e: Floats

    def write(self) -> list[Part]:
        found, axes, target = contraction(self.kernel), self.kernel.axes, self.module.target
        assert found is not None
        self.found, self.rows, self.columns = found, axes[found.rows], axes[found.columns]
        self.block = blocks(target, [axes[a] for a in found.batch], self.rows, self.columns, axes[found.inner])
        self.width, self.outer = tile(target)[1], {}
        self.dtypes = found.left.dtype, found.right.dtype
        declare(self.module, self.dtypes)
        self._begin()
        self.e.each("%begin", "%end", 1, self._one)
        self._end(self.kernel.name, "ptr %args, i64 %begin, i64 %end")
        self._begin()
        if any(isinstance(v, Place) for v in self.values):
            self.report = addresses.Report.at(self.e, len(self.starts), self.binding.check)
        self._finish()
        self._end(self._finisher, _FINISH)
        return [Part("", self.block.units)]

    @property
    def _finisher(self) -> str:
        return f"{self.kernel.name}.finish"

    def _begin(self) -> None:
        self.e = Floats(self.module)
        self.pointers = {b: addresses.pointer(self.e, i) for i, b in enumerate(self.starts)}

    def _end(self, name: str, signature: str) -> None:
        self.e.do("ret void")
        self.e.function(f"void @{name}({signature})")

    def _positions(self, number: str) -> Positions:
        """Where in the batch a product is."""
        at: Positions = {}
        for axis in reversed(self.found.batch):
            number, at[axis] = self.e.parts(number, self.kernel.axes[axis])
        return at

    def _one(self, unit: str) -> None:
        e, block, found = self.e, self.block, self.found
        rest, group = e.parts(unit, -(-self.columns // block.columns))
        batch, number = e.parts(rest, -(-self.rows // block.rows))
        at, factors = self._positions(batch), list[str | int]()
        for load, across in ((found.left, found.rows), (found.right, found.columns)):
            access = load.access
            place = e.place(self.pointers[access.buffer], self._offset(access, at), load.dtype)
            factors += [place, access.strides[across], access.strides[found.inner]]
        row, column = e.times(number, block.rows), e.times(group, block.columns)
        ends = e.least(e.plus(row, block.rows), self.rows), e.least(e.plus(column, block.columns), self.columns)
        sizes = self.columns, self.kernel.axes[found.inner], block.depth, block.rows, block.columns
        finish = f"@{self._finisher}", "%args", batch
        _call(e, BLOCK, *factors, row, ends[0], column, ends[1], *sizes, *finish, dtypes=self.dtypes)

    def _finish(self) -> None:
        """What the kernel stores of a tile."""
        e, found, batch = self.e, self.found, self._positions("%batch")

        def points(width: int, place: str, at: Positions) -> None:
            self.row = {id(found.total): e.read(place, width)}
            local: dict[int, Value] = {}
            for s in self.kernel.stores:
                self._store(s.access, self._get(s.value, width, at, local), width, at)

        def line(r: str) -> None:
            place, at = e.place("%sums", e.times(r, "%step")), {**batch, found.rows: e.plus("%row", r)}

            def one(i: str) -> None:
                points(1, e.place(place, i), {**at, found.columns: e.plus("%column", i)})

            e.choose(
                e.emit(f"icmp sle i64 {e.plus('%column', self.width)}, {self.columns}"),
                lambda: points(self.width, place, {**at, found.columns: "%column"}),
                lambda: e.each("0", e.minus(self.columns, "%column"), 1, one),
            )

        e.each("0", "%count", 1, line)
