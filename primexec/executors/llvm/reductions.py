"""Accumulators: how partial results of a reduction are kept, joined and finished.

Sums of float32 and half precision are accumulated in float64, those of float64 with the rounding error of every
addition (Knuth's TwoSum), so that the error does not grow with the number of elements, unless it is rounded away. In
long sums along lanes, and in those of numbers that do not cancel, few elements are added in float32 first, or all of
them where a lane has few, for conversions take most of the time.
"""

from __future__ import annotations

import math

import torch

from primexec.executors.llvm.emit import INTEGER_OF, Emitter, Value, literal, picked, type_of
from primexec.executors.llvm.instructions import F64, FLOATS, REGISTER, SIGNED, bits, convert, rounded
from primexec.executors.llvm.ir import Reduce, never_negative

FOLDED_LANES = 8
WIDENED_LANES = 4  # of those in float32, where they are joined
FEW, FEW_UNSIGNED = 16, 64  # elements that a lane adds up in float32; of eager's lanes one adds up half as many
LONG = 64  # elements, which eager adds in float32 as well, in a sum of more roundings


def _halves(v: Value) -> tuple[Value, Value]:
    half = v.lanes // 2
    return picked(v, range(half)), picked(v, range(half, v.lanes))


class Accumulator:
    """The accumulator of one reduction.

    Args:
        along: how many elements come along lanes, which may be added to fewer lanes of the state; 0 where the lanes are
            different results.
        terms: how many of them meet in one lane.
        rows: how many elements come one after the other, where lanes are different results.
        flags: whether vectors of extremes along lanes remember in a vector of half their lanes, apart, that there was a
            NaN: one comparison of two vectors tells.
    """

    def __init__(self, reduction: Reduce, along: int = 0, terms: int = 0, rows: int = 0, flags: bool = False) -> None:
        self.kind, self.dtype, self.source = reduction.kind, reduction.dtype, reduction.arg.dtype
        self.floats = self.dtype in FLOATS
        wide = self.floats and self.kind in ("sum", "prod")
        self.element = "f64" if wide else REGISTER[self.dtype]
        self.compensated = self.kind == "sum" and self.dtype is F64 and not reduction.rounded
        self.flags = flags and along > 0 and self.floats and self.kind in ("amax", "amin")
        # Numbers without a sign do not cancel: adding four in float32 first costs one unit of their sum at most.
        unsigned = never_negative(reduction.arg)
        sums = wide and self.kind == "sum" and self.dtype is not F64
        self.short = sums and (max(along, rows) >= LONG or unsigned)
        self.narrow = self.short and along >= LONG and terms <= (FEW_UNSIGNED if unsigned else FEW)
        self.most = FOLDED_LANES if along and wide and self.dtype is not F64 and not self.narrow else 1 << 20

    def initial(self, lanes: int) -> list[tuple[str, str]]:
        """Types and values before the first element, for vectors of so many lanes."""
        lanes, element = min(lanes, self.most), self._held(lanes)
        text = literal(element, self._neutral())
        if lanes > 1:
            text = f"splat ({type_of(element)} {text})"
        zero = literal("f64", 0.0) if lanes == 1 else "zeroinitializer"
        one = (type_of(element, lanes), text)
        if self.flags and lanes > 1:
            return [one, (type_of(INTEGER_OF[self.element], lanes // 2), "zeroinitializer" if lanes > 2 else "0")]
        return [one, (one[0], zero)] if self.compensated else [one]

    def _held(self, lanes: int) -> str:
        """The type of the elements of a state of so many lanes."""
        return "f32" if self.narrow and lanes > 1 else self.element

    def _neutral(self) -> float:
        if self.kind in ("sum", "prod"):
            return float(self.kind == "prod")
        low = self.kind == "amax"
        if self.floats:
            return -math.inf if low else math.inf
        if self.dtype is torch.bool:
            return not low
        width = bits(self.dtype)
        smallest, largest = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if self.dtype in SIGNED else (0, -1)
        return smallest if low else largest

    def values(self, e: Emitter, names: list[str], lanes: int) -> list[Value]:
        found = [Value(e, self._held(lanes), min(lanes, self.most), n) for n in names]
        if self.flags and lanes > 1:
            found[1] = Value(e, INTEGER_OF[self.element], lanes // 2, names[1])
        return found

    def add(self, state: list[Value], elements: list[Value], mask: Value | None = None) -> list[Value]:
        """With more elements (in each lane, or in those of the mask)."""
        found = [convert(v, self.source, self.dtype) for v in elements]
        while self.short and len(found) > 1:
            found = [a + b for a, b in zip(found[::2], found[1::2], strict=True)]
        for v in found:
            state = self._add(state, v if mask is None else mask.select(v, self._neutral()))
        return state

    def _add(self, state: list[Value], v: Value) -> list[Value]:
        width = state[0].lanes
        while self.short and v.lanes > width:
            low, high = _halves(v)
            v = low + high
        parts = [v] if v.lanes == width else [picked(v, range(k, k + width)) for k in range(0, v.lanes, width)]
        held = state[0].element
        parts = [p if p.element == held else p.cast("fpext", held) for p in parts]
        while len(parts) > 1:  # joined before they meet the state, which waits for itself
            parts = [self.merge([a], [b])[0] for a, b in zip(parts[::2], parts[1::2], strict=True)]
        if self.flags and width > 1:
            best, flags = state
            low, high = _halves(parts[0])
            return [self._better(best, parts[0]), flags | low.compare("uno", high).cast("sext", flags.element)]
        return self.merge(state, parts)

    def merge(self, state: list[Value], other: list[Value]) -> list[Value]:
        """With another partial result."""
        v = other[0]
        if self.compensated:
            total, lost = state
            made = total + v
            part = made - total
            error = (total - (made - part)) + (v - part)
            return [made, lost + error if len(other) == 1 else lost + error + other[1]]
        if self.kind == "sum":
            return [state[0] + v] if self.dtype is not torch.bool else [state[0] | v]
        if self.kind == "prod":
            return [state[0] * v] if self.dtype is not torch.bool else [state[0] & v]
        return [self._extreme(state[0], v)]

    def _extreme(self, old: Value, new: Value) -> Value:
        larger = self.kind == "amax"
        if self.dtype is torch.bool:
            return old | new if larger else old & new
        if self.floats:
            return new.is_nan().select(new, self._better(old, new))
        sign = "s" if self.dtype in SIGNED else "u"
        return new.compare(sign + ("gt" if larger else "lt"), old).select(new, old)

    def _better(self, old: Value, new: Value) -> Value:
        """The larger or smaller one, but the old value where either is NaN: one instruction of x86."""
        return new.compare("ogt" if self.kind == "amax" else "olt", old).select(new, old)

    def across(self, state: list[Value]) -> list[Value]:
        """The lanes' partial results joined: a scalar state."""
        lanes = state[0].lanes
        if lanes == 1:
            return state
        if self.flags:
            best, flags = state
            while best.lanes > 1:
                best = self._better(*_halves(best))
            nan = Value(best.e, "i1", 1, flags.compare("ne", 0).any())
            return [nan.select(math.nan, best)]
        while lanes > 1:
            if lanes <= WIDENED_LANES and state[0].element != self.element:
                state = [state[0].cast("fpext", self.element)]
            parts = zip(*map(_halves, state), strict=True)
            first, second = map(list, parts)
            state, lanes = self.merge(first, second), lanes // 2
        return state

    def finish(self, state: list[Value]) -> Value:
        """The result, in the register type of the reduction's dtype."""
        v = state[0]
        if self.compensated:
            total = v + state[1]
            return (v.abs().compare("olt", math.inf) & state[1].abs().compare("olt", math.inf)).select(total, v)
        if v.element != REGISTER[self.dtype]:
            v = rounded(v.cast("fptrunc", REGISTER[self.dtype]), self.dtype)
        return v
