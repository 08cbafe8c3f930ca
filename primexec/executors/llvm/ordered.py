"""Kernels that walk axes point by point, in order: scans, and writes whose points may meet at an element.

The other axes are independent: their points are the units of threads, and one of them goes along vector lanes. Scans
along what lies together in memory go along lanes themselves where the order of joining does not show; others take a
few rows for lanes: each element of a row waits for the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from primexec.executors.llvm import spans
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.emit import Value, literal, picked, type_of
from primexec.executors.llvm.instructions import (
    BF16,
    F16,
    F64,
    FLOATS,
    MEMORY,
    REGISTER,
    SIGNED,
    bits,
    from_memory,
    pointwise,
    rounded,
    splat,
    to_memory,
)
from primexec.executors.llvm.ir import Expr, Kernel, Scan, Store, roots_of, walk
from primexec.executors.llvm.layout import WIDE, Axis, Layout, accesses
from primexec.executors.llvm.memory import Positions
from primexec.executors.llvm.target import ELEMENT_BYTES, Target
from primexec.executors.llvm.vmath import FUNCTIONS

VECTORS = 16  # of a row that are written one after the other: of a single one, each write would touch another line
ROWS = 4  # that are scanned side by side; more meet in the first cache where they lie 2^k bytes apart


def plan(kernel: Kernel, target: Target) -> Layout:
    """The independent axes outside, that which all stores walk element by element along lanes; the others inside.

    Where there is no such axis, that of a scan goes along lanes itself, or the longest of the others.
    """
    alive = [Axis(n, a) for a, n in enumerate(kernel.axes) if n != 1]
    kept = [a for a in alive if not kernel.reduced[a.axis]]
    inner = tuple(a for a in alive if kernel.reduced[a.axis])
    width = max(a.dtype.itemsize for a in accesses(kernel))
    lanes = 2 * target.lanes("f64" if width >= WIDE else "f32")
    fits = [a for a in kept if a.size >= lanes and all(s.access.strides[a.axis] == 1 for s in kernel.stores)]
    lane, scans = fits[-1] if fits else None, [v for v in walk(roots_of(kernel)) if isinstance(v, Scan)]
    if lane is None and scans and _goes_along(kernel, scans, inner, lanes):
        return Layout(tuple(kept), inner, inner[0], False, False, lanes)
    if lane is None and kept and scans:
        lanes = ROWS
        lane = max((a for a in kept if a.size >= lanes), key=lambda a: a.size, default=None)
    outer = tuple(a for a in kept if a != lane)
    width = min(-(-lane.size // lanes), VECTORS) * lanes if lane and not scans else lanes
    return Layout(outer, inner, lane, lane is not None, False, lanes if lane else 1, width)


def _goes_along(kernel: Kernel, scans: Sequence[Scan], inner: Sequence[Axis], lanes: int) -> bool:
    """Whether the axis of scans goes along lanes: parts may be joined in any order, and are written where they lie."""
    if len(inner) != 1 or inner[0].size < 2 * lanes:
        return False
    plain = all(s.access.strides[inner[0].axis] == 1 and not s.how and not s.access.indirect for s in kernel.stores)
    return plain and all(s.kind in ("amax", "amin") or _is_exact(s) for s in scans)


def _is_exact(s: Scan) -> bool:
    """Whether sums and products of parts are joined without a rounding that shows."""
    return s.kind in ("sum", "prod") and (s.dtype not in FLOATS or (_element(s) == "f64" and s.dtype is not F64))


class OrderedWriter(KernelWriter):
    """Writes one such kernel."""

    def _make_scratch(self) -> None:
        self.scans = [v for v in self.values if isinstance(v, Scan)]
        self.state: dict[int, Value] = {}

    def _body(self, block: str) -> None:
        self.row = {}
        axis, lanes = self.layout.lane, self.layout.lanes
        if axis is None:
            self._walk(1, {})
            return
        if not self.scans:
            self._write_rows(block, axis)
            return
        if not self.layout.columns:
            self._along(axis)
            return
        start = self.e.emit(f"mul i64 {block}, {lanes}")
        if axis.size % lanes == 0:
            self._walk(lanes, {axis.axis: start})
            return
        full, rest, join = (self.e.new_label(s) for s in ("full", "rest", "join"))
        whole = self.e.emit(f"icmp slt i64 {block}, {axis.size // lanes}")
        self.e.do(f"br i1 {whole}, label %{full}, label %{rest}")
        self.e.start(full)
        self._walk(lanes, {axis.axis: start})
        self.e.do(f"br label %{join}")
        self.e.start(rest)

        def one(i: str, _: list[str]) -> Sequence[str]:
            self._walk(1, {axis.axis: i})
            return ()

        self.e.loop(start, str(axis.size), 1, one)
        self.e.do(f"br label %{join}")
        self.e.start(join)

    def _write_rows(self, block: str, axis: Axis) -> None:
        """The ordered axes, and at each of their points a part of a row."""
        start = self.e.emit(f"mul i64 {block}, {self.layout.width}")
        stop = self.e.least(self.e.emit(f"add i64 {start}, {self.layout.width}"), axis.size)
        parts = spans.once(self.e, start, stop, self.layout.lanes, masked=False)

        def row(at: Positions, names: list[str]) -> list[str]:
            for part in parts:

                def one(i: str, _: list[str], lanes: int = part.lanes) -> Sequence[str]:
                    return self._point_in_order(lanes, {**at, axis.axis: i}, [])

                self.e.loop(part.start, part.stop, part.step, one)
            return names

        self._nest_in_order(1, {}, row)

    def _along(self, axis: Axis) -> None:
        """The axis of the scans in vectors."""
        types, names = [type_of(_element(s)) for s in self.scans], [_initial(s, 1) for s in self.scans]
        for span in spans.once(self.e, "0", str(axis.size), self.layout.lanes, masked=False):

            def one(i: str, inside: list[str], lanes: int = span.lanes) -> Sequence[str]:
                return self._point_in_order(lanes, {axis.axis: i}, inside)

            names = self.e.loop(span.start, span.stop, span.step, one, list(zip(types, names, strict=True)))

    def _walk(self, lanes: int, at: Positions) -> None:
        self._nest_in_order(lanes, at, lambda at, names: self._point_in_order(lanes, at, names))

    def _nest_in_order(self, lanes: int, at: Positions, point: Callable[[Positions, list[str]], list[str]]) -> None:
        """The ordered axes, the first of them outermost."""

        def nest(loops: tuple[Axis, ...], at: Positions, names: list[str]) -> list[str]:
            if not loops:
                return point(at, names)
            axis = loops[0]

            def one(i: str, inside: list[str]) -> Sequence[str]:
                return nest(loops[1:], {**at, axis.axis: i}, inside)

            types = [type_of(_element(s), lanes) for s in self.scans]
            return self.e.loop("0", str(axis.size), 1, one, list(zip(types, names, strict=True)))

        nest(self.layout.inner, at, [_initial(s, lanes) for s in self.scans])

    def _point_in_order(self, lanes: int, at: Positions, names: list[str]) -> list[str]:
        width = lanes if self.layout.columns else 1
        self.state = {id(s): Value(self.e, _element(s), width, name) for s, name in zip(self.scans, names, strict=True)}
        local: dict[int, Value] = {}
        for s in self.scans:
            self._get(s, lanes, at, local)
        for store in self.kernel.stores:
            self._change(store, lanes, at, local)
        return [self.state[id(s)].name for s in self.scans]

    def _value(self, v: Expr, lanes: int, at: Positions, local: dict[int, Value]) -> Value:
        if not isinstance(v, Scan):
            return super()._value(v, lanes, at, local)
        new = splat(self._get(v.arg, lanes, at, local), lanes)
        element = _element(v)
        new = new if new.element == element else new.cast("fpext", element)
        before = self.state[id(v)]
        if before.lanes < lanes:
            made = _so_far(v, new)
            self.state[id(v)] = _joined(v, before, picked(made, [lanes - 1]))
            made = _joined(v, splat(before, lanes), made)
        else:
            self.state[id(v)] = made = _joined(v, before, new)
        held = REGISTER[v.dtype]
        return rounded(made if element == held else made.cast("fptrunc", held), v.dtype)

    def _change(self, s: Store, lanes: int, at: Positions, local: dict[int, Value]) -> None:
        """Writes a value, joined with what stands there."""
        access, element = s.access, MEMORY[s.access.dtype]
        new = splat(self._get(s.value, lanes, at, local), lanes)
        parts = [(f, self._get(i, lanes, at, local)) for f, i in access.indirect]
        places, step = self._places(access, lanes, at, parts)
        width = lanes if len(places) == 1 and step == 1 else 1
        for k, place in enumerate(places):
            value = new
            if len(places) > 1:
                value = Value(self.e, new.element, 1, self.e.emit(f"extractelement {new.type} {new.name}, i32 {k}"))
            align = ELEMENT_BYTES[element]
            if s.how:
                name = self.e.emit(f"load {type_of(element, width)}, ptr {place}, align {align}")
                old = from_memory(Value(self.e, element, width, name), access.dtype)
                emit = pointwise(s.how, access.dtype)
                assert emit is not None, s.how
                made = emit(old, value)
                value = rounded(made, access.dtype) if made.element == "f32" else made
            stored = to_memory(value if self.precise else rounded(value, access.dtype), access.dtype)
            self.e.do(f"store {stored.type} {stored.name}, ptr {place}, align {align}")


# What a scan carries along --------------------------------------------------------------------------------


def _element(s: Scan) -> str:
    """Sums and products of float32 are carried in float64, those of half precision in float32, as in eager."""
    wide = s.kind in ("sum", "prod", "logaddexp") and s.dtype in FLOATS and s.dtype not in (BF16, F16)
    return "f64" if wide else REGISTER[s.dtype]


def _initial(s: Scan, lanes: int) -> str:
    element = _element(s)
    text = literal(element, _neutral(s))
    return text if lanes == 1 else f"splat ({type_of(element)} {text})"


def _neutral(s: Scan) -> float:
    if s.kind in ("sum", "prod"):
        return float(s.kind == "prod")
    low = s.kind != "amin"
    if s.dtype in FLOATS:
        return -math.inf if low else math.inf
    if s.dtype is torch.bool:
        return not low
    width = bits(s.dtype)
    smallest, largest = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if s.dtype in SIGNED else (0, -1)
    return smallest if low else largest


def _so_far(s: Scan, v: Value) -> Value:
    """The scan of a vector's elements, in as many steps as its lanes have bits (Hillis and Steele, 1986)."""
    none, by = Value(v.e, v.element, v.lanes, _initial(s, v.lanes)), 1
    while by < v.lanes:
        v, by = _joined(s, picked(none, [*range(by), *range(v.lanes, 2 * v.lanes - by)], v), v), 2 * by
    return v


def _joined(s: Scan, old: Value, new: Value) -> Value:
    if s.kind == "logaddexp":
        return _log_add_exp(old, new)
    if s.dtype is torch.bool:
        return old | new if s.kind in ("sum", "amax") else old & new
    if s.kind in ("sum", "prod"):
        return old + new if s.kind == "sum" else old * new
    how = "ge" if s.kind == "amax" else "le"
    if new.is_float:
        return (new.compare("o" + how, old) | new.is_nan()).select(new, old)
    return new.compare(("s" if s.dtype in SIGNED else "u") + how, old).select(new, old)


def _log_add_exp(old: Value, new: Value) -> Value:
    """log(exp(old) + exp(new)) without overflow; equal infinities stay."""
    larger = old.compare("ogt", new)
    high, low = larger.select(old, new), larger.select(new, old)
    exp, log1p = FUNCTIONS["exp", old.element], FUNCTIONS["log1p", old.element]
    made = log1p(exp(low - high)) + high
    same = high.compare("oeq", low) & high.abs().compare("oeq", math.inf)
    nan = old.is_nan() | new.is_nan()
    return nan.select(old + new, same.select(high, made))
