"""How a kernel's domain is walked: the order of its axes, which are joined, and which one goes along vector lanes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from primexec.executors.llvm import costs
from primexec.executors.llvm.contraction import Contraction, blocks, contraction
from primexec.executors.llvm.instructions import DEAR, F64
from primexec.executors.llvm.ir import Access, Index, Kernel, Load, Op, Reduce, Within, roots_of, walk
from primexec.executors.llvm.stencil import Stencil, stencil
from primexec.executors.llvm.target import Target

WIDE = 8  # bytes from which on vectors hold as few elements as float64
GRAIN = 32768  # points of a domain that are worth a thread
BLOCK = 2048  # elements of one unit of a kernel of one axis
NARROW = 8  # axes of fewer elements are worth no tile, nor vectors where they are reduced; of half as many, none at all
TILE = 64  # side of the squares of a kernel with operands that lie across
COLUMNS = 1024  # results of a reduction that are accumulated side by side, in the first cache
SPLIT_POINTS = 2 * GRAIN  # domains of fewer are not cut along reduced axes
WORKSPACE = 1 << 18  # bytes of partial results
HOISTED = 8  # operations that are saved at each point, from which on loops walk rows inside of blocks of columns
HOISTED_BYTES = 1 << 14  # of what the rows of such a block share
STENCIL_ROWS = 4  # whose vectors are summed up side by side
FEW_ROWS = 4  # of such a block that are worth a thread
PROCESSORS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop: its trip count, the axis of the kernel whose strides it steps by, and those that it goes over as well."""

    size: int
    axis: int
    joined: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Layout:
    """The loops of a kernel.

    Attributes:
        outer: kept axes, from the outermost; their product is cut into units for threads.
        inner: loops of each unit: the reduced axes, or the last axis of a kernel without reductions, or rows that share
            what is computed for their columns.
        lane: the axis along vector lanes: the last of `inner`, or with `columns` a kept axis of its own.
        columns: whether lanes hold different results of a reduction, or what rows share; units then are blocks of
            `width` columns.
        flat: whether the units are blocks of `width` elements of the only axis.
        lanes: elements of a vector.
        across: an axis that joins the lane's: units are squares of the two.
        terms: how many of the last inner loops are walked for each vector, whose sums stay in registers.
        pieces: into how many parts of `chunk` steps the outermost inner loop is cut: units of their own, whose partial
            results are joined.
    """

    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    lane: Axis | None
    columns: bool
    flat: bool
    lanes: int
    width: int = 1
    pieces: int = 1
    chunk: int = 0
    across: Axis | None = None
    terms: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of columns or elements, or squares."""
        if self.across and self.lane:
            return -(-self.across.size // TILE) * -(-self.lane.size // TILE)
        return -(-self.lane.size // self.width) if (self.columns or self.flat) and self.lane else 1

    @property
    def results(self) -> int:
        """Units before they are cut into pieces."""
        return math.prod(a.size for a in self.outer) * self.blocks

    @property
    def units(self) -> int:
        """How many units of work there are."""
        return self.results * self.pieces

    @property
    def unit_size(self) -> int:
        """Points of the domain in one unit."""
        if self.flat or self.across:
            return self.width
        points = math.prod(a.size for a in self.inner) * (self.width if self.columns else 1)
        return -(-points // self.pieces)


def strides_of(kernel: Kernel) -> list[tuple[int, ...]]:
    """The strides by which the domain's axes move each operand; the stores' first."""
    values = walk(roots_of(kernel))
    found = [s.access.strides for s in kernel.stores]
    found += [e.access.strides for e in values if isinstance(e, Load)]
    return found + [e.strides for e in values if isinstance(e, (Index, Within))]


def accesses(kernel: Kernel) -> list[Access]:
    """The operands in memory, those written first."""
    values = walk(roots_of(kernel))
    return [*(s.access for s in kernel.stores), *(e.access for e in values if isinstance(e, Load))]


def plan(kernel: Kernel, target: Target) -> Layout:
    """The layout of a kernel on a target."""
    if product := contraction(kernel):
        return _of_product(kernel, product, target)
    strides = strides_of(kernel)
    alive = [a for a, n in enumerate(kernel.axes) if n != 1]
    reducing = any(kernel.reduced)
    loads = strides[len(kernel.stores) :] or strides
    kept = _joined(kernel, [a for a in alive if not kernel.reduced[a]], strides[0], strides)
    reduced = _joined(kernel, [a for a in alive if kernel.reduced[a]], loads[0], strides)
    if kept and (found := stencil(kernel)):
        return _of_stencil(kernel, found, kept, reduced, target)
    narrow = NARROW if reducing else NARROW // 2
    # What does not move along a reduced axis is read or written once a result.
    memory = [s for *_, s in dict.fromkeys((a.buffer, a.offset, a.strides) for a in accesses(kernel))]
    often = [s for s in memory if any(s[a.axis] for a in reduced)] or memory
    lane = max((*kept, *reduced), key=lambda a: _score(kernel, a, often, narrow), default=None)
    if reducing and not reduced:
        reduced = [Axis(1, kernel.reduced.index(True))]
        lane = lane or reduced[0]
    width = max((a.dtype.itemsize for a in accesses(kernel)), default=4)
    lanes = _vectors(kernel) * target.lanes("f64" if width >= WIDE else "f32")
    if lane is None:
        return Layout((), (), None, False, False, lanes)
    lanes = min(lanes, 1 << max(lane.size, 1).bit_length() - 1)
    if lane in reduced:
        inner = (*(a for a in reduced if a != lane), lane)
        return _split(kernel, Layout(tuple(kept), inner, lane, False, False, lanes))
    outer = tuple(a for a in kept if a != lane)
    if reducing:
        lanes = min(lanes, 2 * target.lanes("f32"))
        blocks = max(1, -(-lane.size // COLUMNS))
        side = max(lanes, -(-lane.size // blocks // lanes) * lanes)
        return _split(kernel, Layout(outer, tuple(reduced), lane, True, False, lanes, side))
    across = _across(kernel, lane, outer)
    if across is not None:
        rest = tuple(a for a in outer if a != across)
        return Layout(rest, (across, lane), lane, False, False, lanes, TILE * TILE, across=across)
    rows = _rows(kernel, lane, outer)
    if rows is not None:
        return _over_rows(kernel, lane, rows, outer, lanes)
    return Layout(outer, (lane,), lane, False, not outer, lanes, 1 if outer else BLOCK)


def _of_product(kernel: Kernel, product: Contraction, target: Target) -> Layout:
    """Units are blocks of rows and columns."""
    *batch, rows, columns, inner = [*product.batch, product.rows, product.columns, product.inner]
    axes = kernel.axes
    sizes = blocks(target, [axes[a] for a in batch], axes[rows], axes[columns], axes[inner])
    loops = Axis(sizes.rows, rows), Axis(axes[inner], inner), Axis(sizes.columns, columns)
    return Layout((Axis(sizes.units, rows),), loops, loops[-1], False, False, target.lanes("f32"))


def _of_stencil(kernel: Kernel, found: Stencil, kept: list[Axis], reduced: list[Axis], target: Target) -> Layout:
    """Units are rows, of one plane perhaps; vectors of several rows share the weights, where these are the same."""
    strides = strides_of(kernel)
    lane = max(kept, key=lambda a: _score(kernel, a, strides, 1))
    others = [a for a in kept if a is not lane]

    def alike(a: Axis) -> tuple[bool, int]:
        return all(not w.access.strides[a.axis] for w in found.weights), -abs(strides[0][a.axis])

    rows = max(others, key=alike, default=None)
    lanes = 2 * target.lanes("f64" if found.total.dtype is F64 else "f32")
    lanes = min(lanes, 1 << lane.size.bit_length() - 1)
    outer = tuple(a for a in others if a is not rows)
    loops = (lane,) if rows is None else (rows, lane)
    layout = Layout(outer, (*loops, *reduced), lane, False, False, lanes, terms=len(reduced))
    step = lanes if rows is None else STENCIL_ROWS
    chunk = -(-loops[0].size // max(1, layout.unit_size // GRAIN) // step) * step
    return replace(layout, pieces=-(-loops[0].size // chunk), chunk=chunk)


def _rows(kernel: Kernel, lane: Axis, outer: tuple[Axis, ...]) -> Axis | None:
    """The axis from which most of what is computed along the lanes does not depend; None where that is little."""
    fit = [a for a in outer if a.size > 1 and lane.size >= NARROW]
    gains = {a: costs.saved(kernel, lane.axis, a.axis) * (a.size - 1) // a.size for a in fit}
    best = max(reversed(fit), key=gains.__getitem__, default=None)
    return best if best is not None and gains[best] >= HOISTED else None


def _over_rows(kernel: Kernel, lane: Axis, rows: Axis, outer: tuple[Axis, ...], lanes: int) -> Layout:
    """Blocks of columns, for which what all rows share is computed first; as many rows as are worth a thread."""
    nbytes = sum(v.dtype.itemsize for v in costs.shared(kernel, lane.axis, rows.axis))
    width = max(lanes, min(HOISTED_BYTES // max(1, nbytes) // lanes * lanes, -(-lane.size // lanes) * lanes))
    layout = Layout(tuple(a for a in outer if a != rows), (rows,), lane, True, False, lanes, width)
    pieces = min(rows.size // FEW_ROWS, layout.unit_size // GRAIN)
    if pieces < 2:
        return layout
    chunk = -(-rows.size // pieces)
    return replace(layout, pieces=-(-rows.size // chunk), chunk=chunk)


def lies_across(access: Access, lane: int, across: int) -> bool:
    """Whether an operand's elements follow each other along another axis than the lane's."""
    return access.strides[across] == 1 and access.strides[lane] not in (0, 1) and not access.indirect


def _across(kernel: Kernel, lane: Axis, outer: tuple[Axis, ...]) -> Axis | None:
    """The axis along which operands follow each other that do not along the lane's."""
    values = walk(roots_of(kernel))
    if lane.size < NARROW or any(isinstance(v, Load) and v.guards for v in values):
        return None

    def count(axis: Axis) -> int:
        return sum(lies_across(a, lane.axis, axis.axis) for a in accesses(kernel))

    best = max((a for a in outer if a.size >= NARROW), key=count, default=None)
    return best if best is not None and count(best) else None


def _vectors(kernel: Kernel) -> int:
    """Hardware vectors in one of the kernel's: dear functions wait for themselves, so more run side by side."""
    values = walk(roots_of(kernel))
    return 4 if any(isinstance(v, Op) and v.prim in DEAR and v.dtype.itemsize < WIDE for v in values) else 2


def _split(kernel: Kernel, layout: Layout) -> Layout:
    """A reduction of few results cut into pieces, by sizes and the number of processors alone."""
    extent, points = layout.inner[0].size, layout.results * layout.unit_size
    if layout.results >= 4 * PROCESSORS or points < SPLIT_POINTS:
        return layout
    held = 16 * sum(isinstance(v, Reduce) for v in walk(roots_of(kernel)))
    held *= layout.results * (layout.width if layout.columns else 1)
    pieces = min(-(-16 * PROCESSORS // layout.results), points // GRAIN, math.isqrt(extent), WORKSPACE // held)
    if pieces < 2:
        return layout
    step = layout.lanes if layout.inner[0] == layout.lane else 1
    chunk = -(-extent // pieces // step) * step
    return replace(layout, pieces=-(-extent // chunk), chunk=chunk)


def _joined(kernel: Kernel, axes: list[int], by: tuple[int, ...], strides: list[tuple[int, ...]]) -> list[Axis]:
    """The axes from the largest stride to the smallest, those joined that all operands walk as one."""
    found: list[Axis] = []
    for axis in sorted(axes, key=lambda a: -abs(by[a])):
        size = kernel.axes[axis]
        if found and all(s[found[-1].axis] == s[axis] * size for s in strides):
            found[-1] = Axis(found[-1].size * size, axis, found[-1].joined | {found[-1].axis})
        else:
            found.append(Axis(size, axis))
    return found


def _score(kernel: Kernel, axis: Axis, strides: list[tuple[int, ...]], narrow: int) -> tuple[bool, int, int, int, int]:
    """How well an axis suits the lanes; of equals it is the one along which results follow each other.

    A transposition that writes whole vectors around the caches takes 0.4 of the time of one that reads them.
    """
    steps = [s[axis.axis] for s in strides]
    near = min((abs(s) for s in steps if s), default=1)
    along = sum(s == 1 for s in steps) - sum(s not in (0, 1) for s in steps)
    written = sum(s.access.strides[axis.axis] == 1 for s in kernel.stores)
    return axis.size >= narrow, along, -near, written, axis.size
