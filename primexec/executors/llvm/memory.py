"""Reads and writes of a kernel's operands, one vector at a time."""

from __future__ import annotations

from collections.abc import Sequence

from primexec.executors.llvm import addresses
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import MEMORY, rounded, splat, to_memory
from primexec.executors.llvm.ir import Access, Index, Within
from primexec.executors.llvm.layout import Layout
from primexec.executors.llvm.target import ELEMENT_BYTES

STREAM_ALIGNMENT = 32  # bytes: of every vector that is written around the caches
CACHE_LINE = 64
Positions = dict[int, str]  # from the kernel's axes to indices


class Memory:
    """What a writer of kernels knows of memory: pointers, and where operands start in the present unit."""

    def __init__(self, module: ModuleText, layout: Layout, precise: bool) -> None:
        self.module, self.layout, self.precise = module, layout, precise
        self.e = Emitter(module)
        self.pointers: dict[int, str] = {}  # by buffer
        self.bases: dict[int, str] = {}  # by access
        self.streams: frozenset[int] = frozenset()  # buffers too large to stay in a cache; their starts are aligned
        self.streamed = False
        self.even = True  # whether vectors begin at multiples of their size along the lanes

    def _offset(self, access: Access | Index | Within, positions: Positions, start: str | None = None) -> str:
        total = str(access.offset) if start is None else start
        for axis, index in positions.items():
            stride = access.strides[axis]
            if stride:
                step = index if stride == 1 else self.e.emit(f"mul i64 {index}, {stride}")
                total = step if total == "0" else self.e.emit(f"add i64 {total}, {step}")
        return total

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
            index = addresses.total([(1, Value(self.e, "i64", 1, total)), *parts])
            if index.lanes > 1:
                steps = [(1, addresses.ramp(Value(self.e, "i64", 1, "0"), step, lanes))]
                return addresses.scattered(addresses.total([*steps, (1, index)]), element, pointer), addresses.SCATTERED
            total = index.name
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
            if step == 1 and guard.lanes > 1:
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
        v = to_memory(v if self.precise else rounded(v, access.dtype), access.dtype)
        places, step = self._places(access, lanes, at)
        align = ELEMENT_BYTES[v.element]
        if step == 1 and v.lanes > 1 and self._passes_caches(access, v.lanes * align):
            self.streamed = True
            self.e.do(f"store {v.type} {v.name}, ptr {places[0]}, align {STREAM_ALIGNMENT}, !nontemporal !0")
            return
        if step == 1 or v.lanes == 1:
            self.e.do(f"store {v.type} {v.name}, ptr {places[0]}, align {align}")
            return
        for k, place in enumerate(places):
            one = self.e.emit(f"extractelement {v.type} {v.name}, i32 {k}")
            self.e.do(f"store {type_of(v.element)} {one}, ptr {place}, align {align}")

    def _passes_caches(self, access: Access, width: int) -> bool:
        """Whether a vector of so many bytes may be written around the caches: to a large buffer, at aligned places."""
        if access.buffer not in self.streams or access.indirect or not self.even:
            return False
        steps = [s for a, s in enumerate(access.strides) if a != self._lane_axis]
        size = ELEMENT_BYTES[MEMORY[access.dtype]]
        return all(n % STREAM_ALIGNMENT == 0 for n in (width, access.offset * size, *(s * size for s in steps)))

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
            self.e.call("void", "llvm.prefetch.p0", [("ptr", place), *(("i32", n) for n in ("0", str(4 - cache), "1"))])
