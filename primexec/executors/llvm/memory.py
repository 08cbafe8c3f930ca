"""Reads and writes of a kernel's operands, one vector at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set

from primexec.executors.llvm import addresses, spans
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import BF16, MEMORY, rounded, splat, to_memory
from primexec.executors.llvm.ir import Access, Const, Index, Kernel, Load, Op, Within, roots_of, walk
from primexec.executors.llvm.layout import Layout, accesses
from primexec.executors.llvm.target import ELEMENT_BYTES

STREAM_ALIGNMENT = 32  # bytes: of every vector that is written around the caches
CACHE_LINE = 64
LONG = 32  # vectors of a row that are worth two more at its edges, written both ways, so that those between are aligned
Positions = dict[int, str]  # from the kernel's axes to indices


class Memory:
    """What a writer of kernels knows of memory: pointers, and where operands start in the present unit."""

    def __init__(self, module: ModuleText, layout: Layout, precise: bool) -> None:
        self.module, self.layout, self.precise = module, layout, precise
        self.e = Emitter(module)
        self.pointers: dict[int, str] = {}  # by buffer
        self.starts: dict[int, int] = {}  # by buffer: the element that its pointer points to
        self.bases: dict[int, str] = {}  # by access
        self.streams: Set[int] = frozenset()  # buffers too large to stay in a cache; their starts are aligned
        self.aligned: dict[int, int] = {}  # accesses of theirs whose every vector is aligned, to so many bytes
        self.around: dict[int, int] = {}  # those that the present loop writes around the caches
        self.streamed = False
        self.again = True  # whether a point may be visited twice: nothing is read that is written
        self.masks = False  # whether a range may end in a vector of which some lanes do not count
        self.apart = False  # whether vectors hold what lies at even places before what lies at odd ones
        self.mask: Value | None = None  # the lanes that count, where not all do

    def _offset(self, access: Access | Index | Within, positions: Positions, start: str | None = None) -> str:
        total = str(self._distance(access)) if start is None else start
        for axis, index in positions.items():
            stride = access.strides[axis]
            if stride:
                step = index if stride == 1 else self.e.emit(f"mul i64 {index}, {stride}")
                total = step if total == "0" else self.e.emit(f"add i64 {total}, {step}")
        return total

    def _distance(self, access: Access | Index | Within) -> int:
        """The offset of an access from where its pointer points; that of an index itself."""
        return access.offset - (self.starts[access.buffer] if isinstance(access, Access) else 0)

    @property
    def _lane_axis(self) -> int:
        assert self.layout.lane is not None
        return self.layout.lane.axis

    def _places(
        self, access: Access, lanes: int, at: Positions, parts: Sequence[tuple[int, Value]] = ()
    ) -> tuple[list[str], int]:
        """Pointers to an access's elements (one where they follow each other), and their distance."""
        element = type_of(MEMORY[access.dtype])
        base = self.bases.get(id(access))
        total = self._offset(access, at, base)
        step = access.strides[self._lane_axis] if lanes > 1 else 0
        pointer = self.pointers[access.buffer]
        if parts:
            index = addresses.total(parts)
            if index.lanes > 1:
                start = self.e.emit(f"getelementptr {element}, ptr {pointer}, i64 {total}")
                if step:
                    index = index + addresses.ramp(Value(self.e, "i64", 1, "0"), step, lanes)
                return addresses.scattered(index, element, start), addresses.SCATTERED
            total = addresses.total([(1, Value(self.e, "i64", 1, total)), (1, index)]).name
        count = lanes if step not in (0, 1) else 1
        places = []
        for k in range(count):
            here = total if k == 0 else self.e.emit(f"add i64 {total}, {k * step}")
            places.append(self.e.emit(f"getelementptr {element}, ptr {pointer}, i64 {here}"))
        return places, step

    def _load(
        self,
        access: Access,
        lanes: int,
        at: Positions,
        parts: Sequence[tuple[int, Value]] = (),
        guard: Value | None = None,
    ) -> Value:
        element = MEMORY[access.dtype]
        places, step = self._places(access, lanes, at, parts)
        if guard is not None:
            if step == 1 and guard.lanes > 1 and addresses.reads_some(self.module.target, element):
                return addresses.masked(self.e, places[0], element, guard)
            places = addresses.guarded(self.e, places, guard)
        align = ELEMENT_BYTES[element]
        if step in (0, 1):
            width = lanes if step else 1
            return Value(
                self.e, element, width, self.e.emit(f"load {type_of(element, width)}, ptr {places[0]}, align {align}")
            )
        vector, scalar = type_of(element, lanes), type_of(element)
        made = "poison"
        for k, place in enumerate(places):
            one = self.e.emit(f"load {scalar}, ptr {place}, align {align}")
            made = self.e.emit(f"insertelement {vector} {made}, {scalar} {one}, i32 {k}")
        return Value(self.e, element, lanes, made)

    def _store(self, access: Access, v: Value, lanes: int, at: Positions) -> None:
        v = splat(v, lanes) if lanes > 1 or v.lanes == 1 else v
        v = to_memory(v if self.precise else rounded(v, access.dtype), access.dtype, self.apart)
        places, step = self._places(access, lanes, at)
        align = ELEMENT_BYTES[v.element]
        if self.mask is not None and v.lanes > 1:
            addresses.store_masked(v, places[0], self.mask)
            return
        if id(access) in self.around and v.lanes > 1:
            self.streamed = True
            self.e.do(f"store {v.type} {v.name}, ptr {places[0]}, align {self.around[id(access)]}, !nontemporal !0")
            return
        if step == 1 or v.lanes == 1:
            self.e.do(f"store {v.type} {v.name}, ptr {places[0]}, align {align}")
            return
        for k, place in enumerate(places):
            one = self.e.emit(f"extractelement {v.type} {v.name}, i32 {k}")
            self.e.do(f"store {type_of(v.element)} {one}, ptr {place}, align {align}")

    def _streaming(self, stores: Sequence[Access]) -> list[Access]:
        """Those that write large buffers, vector by vector."""
        if self.layout.lane is None:
            return []
        found = [a for a in stores if a.buffer in self.streams and a.strides[self._lane_axis] == 1 and not a.indirect]
        return [a for a in found if self.layout.lanes * _size(a) % STREAM_ALIGNMENT == 0]

    def _align(self, stores: Sequence[Access], even: bool) -> None:
        """Finds what is aligned as it is: its rows are, and vectors begin at multiples of their size, if `even`."""

        def alignment(a: Access) -> int:
            steps = (a.offset, *(s for axis, s in enumerate(a.strides) if axis != self._lane_axis))
            return math.gcd(CACHE_LINE, *(n * _size(a) for n in (*steps, self.layout.lanes)))

        found = {id(a): alignment(a) for a in self._streaming(stores)} if even else {}
        long = self.layout.lane is not None and self.layout.lane.size >= LONG * self.layout.lanes
        least = STREAM_ALIGNMENT if long else CACHE_LINE
        self.around = self.aligned = {a: n for a, n in found.items() if n >= least}

    def _vectors(
        self, begin: str, end: str, at: Positions, stores: Sequence[Access] = (), size: int = 0
    ) -> Iterator[spans.Span]:
        """The loops over a range of the lanes; while one is given, `around` says what it writes around the caches.

        Args:
            stores: what the loops write.
            size: of the whole range; 0 where it is unknown, or each point is to be visited once.
        """
        lanes = self.layout.lanes
        askew = [a for a in self._streaming(stores) if id(a) not in self.aligned]
        if not (size and self.again):
            found, around = spans.once(self.e, begin, end, lanes, self.masks), self.aligned
        elif askew and size >= LONG * lanes:
            first = self._first_aligned(askew[0], at, begin)
            found, around = spans.edged(self.e, begin, first, end, lanes), self._like(askew[0], askew)
        else:
            lanes = min(lanes, 1 << (size.bit_length() - 1))
            found, around = spans.back(self.e, begin, end, lanes, size % lanes), self.aligned
        for span in found:
            self.around = around if span.main else {}
            yield span
        self.mask = None

    def _at(self, span: spans.Span, index: str) -> str:
        """Where the vector of a loop lies; from here on, its mask counts."""
        self.mask = None
        if span.masked:
            self.mask = addresses.first_lanes(self.e, self.e.emit(f"sub i64 {span.stop}, {index}"), span.lanes)
        return span.place or index

    def _limits(self, places: Sequence[Value], access: Access | None = None) -> list[Value]:
        """The mask, where what is read differs from lane to lane."""
        if self.mask is None:
            return []
        differs = any(p.lanes > 1 for p in places) or (access is not None and access.strides[self._lane_axis] != 0)
        return [self.mask] if differs else []

    def _first_aligned(self, access: Access, at: Positions, begin: str) -> str:
        """The first place from `begin` on where vectors of an access can start that lie on lines of the cache."""
        index = self._offset(access, {**at, self._lane_axis: begin}, self.bases.get(id(access)))
        missing = self.e.emit(f"and i64 {self.e.emit(f'sub i64 0, {index}')}, {self._line(access) - 1}")
        return self.e.emit(f"add i64 {begin}, {missing}")

    def _line(self, access: Access) -> int:
        """Elements of a line of the cache, or of a vector where that has less."""
        return min(CACHE_LINE // _size(access), self.layout.lanes)

    def _like(self, access: Access, others: Sequence[Access]) -> dict[int, int]:
        """Those that are aligned wherever an access is, and to how many bytes all are."""
        size = _size(access)
        nbytes = self._line(access) * size

        def alike(a: Access) -> bool:
            pairs = zip((a.offset, *a.strides), (access.offset, *access.strides), strict=True)
            return _size(a) == size and all((p - q) * size % nbytes == 0 for p, q in pairs)

        return {id(a): nbytes for a in others if alike(a)}

    def _fence(self) -> None:
        """Makes what was written around the caches visible before the function ends."""
        if self.streamed and self.module.target.triple.startswith("x86_64"):
            self.e.call("void", "llvm.x86.sse.sfence", [])
        self.streamed = False

    def _prefetch(self, access: Access, lanes: int, at: Positions, distance: int, cache: int) -> None:
        """Asks for a vector that lies so many elements further on, into the first or the second cache."""
        size = ELEMENT_BYTES[MEMORY[access.dtype]]
        total = self._offset(access, at, self.bases.get(id(access)))
        for line in range(0, lanes * size, CACHE_LINE):
            index = self.e.emit(f"add i64 {total}, {distance + line // size}")
            start = f"ptr {self.pointers[access.buffer]}"
            place = self.e.emit(f"getelementptr {type_of(MEMORY[access.dtype])}, {start}, i64 {index}")
            self.e.prefetch(place, cache)


def may_part(kernel: Kernel, layout: Layout) -> bool:
    """Whether vectors may hold elements in another order than memory: no lane meets another, and all are bfloat16."""
    if layout.lane is None or layout.columns or layout.across or any(kernel.reduced):
        return False
    lane, values = layout.lane.axis, walk(roots_of(kernel))
    if not all(isinstance(v, (Const, Op)) or (isinstance(v, Load) and not v.guards) for v in values):
        return False
    along = [a for a in accesses(kernel) if a.strides[lane] or a.indirect]
    return all(a.strides[lane] == 1 and a.dtype is BF16 and not a.indirect for a in along)


def _size(access: Access) -> int:
    return ELEMENT_BYTES[MEMORY[access.dtype]]
