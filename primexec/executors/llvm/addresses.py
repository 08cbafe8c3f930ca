"""Instructions for places in memory that depend on data, and for the report of those that do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from primexec.executors.llvm.emit import INTRINSIC_NAMES, Emitter, Value, type_of
from primexec.executors.llvm.instructions import MEMORY, convert, splat
from primexec.executors.llvm.ir import Kernel, Place, Store, Within
from primexec.executors.llvm.layout import Layout, accesses
from primexec.executors.llvm.target import ELEMENT_BYTES, Target

SCATTERED = -1  # distance of elements that lie anywhere
CHECK_BITS = 16  # of a report: the number of the check from 1; the index stands above them
ZEROS = 512  # bytes, more than any vector of ours has
INDEX_LIMIT = 1 << (63 - CHECK_BITS)


def pointer(e: Emitter, number: int) -> str:
    """The pointer at a place among the arguments."""
    place = e.emit(f"getelementptr ptr, ptr %args, i64 {number}")
    return e.emit(f"load ptr, ptr {place}")


def materialised(v: Value) -> Value:
    """A constant under a name."""
    kind = "fadd" if v.is_float else "or"
    zero = v.const(-0.0 if v.is_float else 0).name
    return Value(v.e, v.element, 1, v.e.emit(f"{kind} {v.type} {v.name}, {zero}"))


def ramp(start: Value, step: int, lanes: int) -> Value:
    """`start + step · lane`; the scalar itself where that is the same in all lanes."""
    if lanes == 1 or not step:
        return start
    steps = "<" + ", ".join(f"i64 {k * step}" for k in range(lanes)) + ">"
    return splat(materialised(start), lanes) + Value(start.e, "i64", lanes, steps)


def total(parts: Sequence[tuple[int, Value]]) -> Value:
    """The sum of values times their factors."""
    lanes = max(v.lanes for _, v in parts)
    scaled = [splat(v if f == 1 else v * f, lanes) for f, v in parts]
    made = scaled[0]
    for v in scaled[1:]:
        made = made + v
    return made


def scattered(index: Value, element: str, start: str) -> list[str]:
    """Pointers to the elements with these numbers."""
    found = []
    for lane in range(index.lanes):
        one = index.e.emit(f"extractelement {index.type} {index.name}, i32 {lane}")
        found.append(index.e.emit(f"getelementptr {type_of(element)}, ptr {start}, i64 {one}"))
    return found


def within(v: Within, index: Value) -> Value:
    """Whether an index lies in a range, by one comparison without sign."""
    return (index - v.low).compare("ult", v.high - v.low)


def both(guards: Sequence[Value]) -> Value | None:
    """Whether all guards hold; None for no guard."""
    if not guards:
        return None
    lanes = max(g.lanes for g in guards)
    made = splat(guards[0], lanes)
    for g in guards[1:]:
        made = made & splat(g, lanes)
    return made


def guarded(e: Emitter, places: Sequence[str], guard: Value) -> list[str]:
    """Pointers, and pointers to zeros in place of those whose guard is false."""
    zeros = e.module.constant("zeros", f"[{ZEROS} x i8] zeroinitializer, align 64")
    found = []
    for lane, one in enumerate(places):
        if len(places) > 1 and guard.lanes > 1:
            holds = e.emit(f"extractelement {guard.type} {guard.name}, i32 {lane}")
        else:
            holds = guard.any()
        found.append(e.emit(f"select i1 {holds}, ptr {one}, ptr {zeros}"))
    return found


def masked(e: Emitter, start: str, element: str, guard: Value) -> Value:
    """Elements that follow each other; zeros where the guard is false, whose memory is not touched."""
    vector, suffix = type_of(element, guard.lanes), INTRINSIC_NAMES.get(element, element)
    operands = [
        ("ptr", start),
        ("i32", str(ELEMENT_BYTES[element])),
        (guard.type, guard.name),
        (vector, "zeroinitializer"),
    ]
    name = e.call(vector, f"llvm.masked.load.v{guard.lanes}{suffix}.p0", operands)
    return Value(e, element, guard.lanes, name)


def reads_some(target: Target, element: str) -> bool:
    """Whether a target reads some of the elements that follow each other without a branch for each."""
    return ELEMENT_BYTES[element] >= 4 or not target.triple.startswith("x86_64") or "+avx512bw" in target.features


def store_masked(v: Value, start: str, mask: Value) -> None:
    """Writes the lanes of a mask to places that follow each other."""
    suffix = INTRINSIC_NAMES.get(v.element, v.element)
    align = str(ELEMENT_BYTES[v.element])
    operands = [(v.type, v.name), ("ptr", start), ("i32", align), (mask.type, mask.name)]
    v.e.call("void", f"llvm.masked.store.v{v.lanes}{suffix}.p0", operands)


def first_lanes(e: Emitter, count: str, lanes: int) -> Value:
    """A mask of so many lanes, the first ones."""
    numbers = "<" + ", ".join(f"i32 {k}" for k in range(lanes)) + ">"
    last = Value(e, "i32", 1, e.emit(f"trunc i64 {count} to i32"))
    return Value(e, "i32", lanes, numbers).compare("ult", splat(last, lanes))


def can_mask(target: Target, layout: Layout, kernel: Kernel, moving: Sequence[Store]) -> bool:
    """Whether a target reads and writes some lanes of a kernel's vectors by one instruction."""
    if not target.triple.startswith("x86_64") or "+avx2" not in target.features or layout.lane is None:
        return False
    if any(kernel.reduced) and layout.columns and layout.pieces > 1:
        return False  # the workspace has no room for lanes that do not count
    small = any(ELEMENT_BYTES[MEMORY[a.dtype]] < 4 for a in accesses(kernel))
    stores = [s.access for s in (kernel.stores if layout.columns else moving)]
    plain = all(a.strides[layout.lane.axis] == 1 and not a.indirect for a in stores)
    return plain and ("+avx512bw" in target.features or not small)


@dataclass(frozen=True, slots=True)
class Report:
    """Where a kernel reports places that do not exist.

    Attributes:
        flags: the pointer to the report.
        first: the number under which the check `base` of the kernel is reported.
    """

    flags: str
    first: Value
    base: int

    @classmethod
    def at(cls, e: Emitter, number: int, base: int) -> Report:
        """The pointer at a place among the arguments, and the number behind it."""
        behind = e.emit(f"getelementptr i64, ptr %args, i64 {number + 1}")
        return cls(pointer(e, number), Value(e, "i64", 1, e.emit(f"load i64, ptr {behind}")), base)


def place(v: Place, found: Value, guard: Value | None, report: Report) -> Value:
    """An index inside of its dimension; one that is not is reported, and replaced by 0."""
    index = convert(found, v.arg.dtype, torch.int64)
    here = index.compare("slt", 0).select(index + v.size, index) if v.wraps else index
    outside = here.compare("uge", v.size)
    lanes = outside.lanes if guard is None else max(outside.lanes, guard.lanes)
    outside, index, here = (splat(x, lanes) for x in (outside, index, here))
    _report(outside if guard is None else outside & splat(guard, lanes), index, v.check, report)
    return outside.select(here.const(0), here)


def _report(outside: Value, index: Value, check: int, report: Report) -> None:
    """Writes one of the indices, with the number of its check, where any is outside."""
    e, seldom, join = outside.e, outside.e.new_label("outside"), outside.e.new_label("checked")
    e.do(f"br i1 {outside.any()}, label %{seldom}, label %{join}, !prof !1")
    e.start(seldom)
    near = index.intrinsic("smin", INDEX_LIMIT - 1).intrinsic("smax", -INDEX_LIMIT)
    code = (near << CHECK_BITS) | splat(report.first + (check - report.base + 1), near.lanes)
    one = code.name
    if code.lanes > 1:
        one = "0"
        for lane in range(code.lanes):
            bad = e.emit(f"extractelement {outside.type} {outside.name}, i32 {lane}")
            this = e.emit(f"extractelement {code.type} {code.name}, i32 {lane}")
            one = e.emit(f"select i1 {bad}, i64 {this}, i64 {one}")
    e.do(f"store atomic i64 {one}, ptr {report.flags} monotonic, align 8")
    e.do(f"br label %{join}")
    e.start(join)


def reported(code: int) -> tuple[int, int | None]:
    """The number of the check and the index that a report holds (None for an index that it has no room for)."""
    check, index = code & ((1 << CHECK_BITS) - 1), code >> CHECK_BITS
    return check - 1, index if -INDEX_LIMIT < index < INDEX_LIMIT - 1 else None
