"""How a kernel's domain is walked: the order of its axes, which are joined, and which one goes along vector lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from primexec.executors.llvm.ir import Access, Index, Kernel, Load, Within, walk
from primexec.executors.llvm.target import Target

WIDE = 8  # bytes from which on vectors hold as few elements as float64


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop: its trip count, and the axis of the kernel whose strides it steps by."""

    size: int
    axis: int


@dataclass(frozen=True)
class Layout:
    """The loops of a kernel.

    Attributes:
        outer: kept axes, from the outermost; their product is cut into units for threads.
        inner: loops of each unit: the reduced axes, or the last axis of a kernel without reductions.
        lane: the axis along vector lanes: the last of `inner`, or with `columns` a kept axis of its own.
        columns: whether lanes hold different results of a reduction; units then are blocks of `lanes` columns.
        flat: whether the units are the elements of the only axis.
    """

    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    lane: Axis | None
    columns: bool
    flat: bool
    lanes: int

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.lane.size // self.lanes) if self.columns and self.lane else 1

    @property
    def units(self) -> int:
        """How many units of work there are."""
        if self.flat and self.lane:
            return self.lane.size
        return math.prod(a.size for a in self.outer) * self.blocks

    @property
    def unit_size(self) -> int:
        """Points of the domain in one unit."""
        return 1 if self.flat else math.prod(a.size for a in self.inner) * (self.lanes if self.columns else 1)


def strides_of(kernel: Kernel) -> list[tuple[int, ...]]:
    """The strides by which the domain's axes move each operand; the stores' first."""
    values = walk(tuple(s.value for s in kernel.stores))
    found = [s.access.strides for s in kernel.stores]
    found += [e.access.strides for e in values if isinstance(e, Load)]
    return found + [e.strides for e in values if isinstance(e, (Index, Within))]


def accesses(kernel: Kernel) -> list[Access]:
    """The operands in memory, those written first."""
    values = walk(tuple(s.value for s in kernel.stores))
    return [*(s.access for s in kernel.stores), *(e.access for e in values if isinstance(e, Load))]


def plan(kernel: Kernel, target: Target) -> Layout:
    """The layout of a kernel on a target."""
    strides = strides_of(kernel)
    alive = [a for a, n in enumerate(kernel.axes) if n != 1]
    reducing = any(kernel.reduced)
    loads = strides[len(kernel.stores) :] or strides
    kept = _joined(kernel, [a for a in alive if not kernel.reduced[a]], strides[0], strides)
    reduced = _joined(kernel, [a for a in alive if kernel.reduced[a]], loads[0], strides)
    lane = max((*kept, *reduced), key=lambda a: _score(a, strides), default=None)
    if reducing and not reduced:
        reduced = [Axis(1, kernel.reduced.index(True))]
        lane = lane or reduced[0]
    width = max((a.dtype.itemsize for a in accesses(kernel)), default=4)
    lanes = 2 * target.lanes("f64" if width >= WIDE else "f32")
    if lane is None:
        return Layout((), (), None, False, False, lanes)
    if lane in reduced:
        inner = (*(a for a in reduced if a != lane), lane)
        return Layout(tuple(kept), inner, lane, False, False, lanes)
    outer = tuple(a for a in kept if a != lane)
    if reducing:
        return Layout(outer, tuple(reduced), lane, True, False, 2 * lanes)
    return Layout(outer, (lane,), lane, False, not outer, lanes)


def _joined(kernel: Kernel, axes: list[int], by: tuple[int, ...], strides: list[tuple[int, ...]]) -> list[Axis]:
    """The axes from the largest stride to the smallest, those joined that all operands walk as one."""
    found: list[Axis] = []
    for axis in sorted(axes, key=lambda a: -abs(by[a])):
        size = kernel.axes[axis]
        if found and all(s[found[-1].axis] == s[axis] * size for s in strides):
            found[-1] = Axis(found[-1].size * size, axis)
        else:
            found.append(Axis(size, axis))
    return found


def _score(axis: Axis, strides: list[tuple[int, ...]]) -> tuple[int, int]:
    steps = [s[axis.axis] for s in strides]
    return sum(s == 1 for s in steps) - sum(s not in (0, 1) for s in steps), axis.size
