"""Short rows: units walk several of them, so that where each row begins is counted up, not divided out."""

from __future__ import annotations

import math
from dataclasses import replace

from primexec.executors.llvm import costs, segments
from primexec.executors.llvm.instructions import DEAR
from primexec.executors.llvm.ir import Kernel, Op, Within, roots_of, walk
from primexec.executors.llvm.layout import BLOCK, Axis, Layout

SHORT = 8  # vectors


def with_rows(kernel: Kernel, layout: Layout) -> Layout:
    """The layout with outer axes moved into the units, as long as these are small."""
    lane = layout.lane
    if lane is None or len(layout.inner) > 1 or layout.columns or layout.flat or any(kernel.reduced):
        return layout
    if lane.size > SHORT * layout.lanes:
        return layout
    outer, inner, points = list(layout.outer), [lane], lane.size
    while outer and 2 * points <= BLOCK:
        inner.insert(0, outer.pop())
        points *= inner[0].size
    withins = [v for v in walk(roots_of(kernel)) if isinstance(v, Within)]
    variants = math.prod(len(segments.edges(withins, a)) - 1 for a in (*outer, *inner[:-1]))
    if len(inner) == 1 or not points or variants > segments.MOST_VARIANTS or _has_dear_rows(kernel, lane):
        return layout
    step = points // inner[0].size
    pieces = -(-inner[0].size // max(1, BLOCK // step))
    chunk = -(-inner[0].size // pieces)
    return replace(layout, outer=tuple(outer), inner=tuple(inner), pieces=-(-inner[0].size // chunk), chunk=chunk)


def _has_dear_rows(kernel: Kernel, lane: Axis) -> bool:
    """Whether something dear is computed once a row, which each vector of it would compute again."""
    values = walk(roots_of(kernel))
    along = costs.depends(values, lane.axis)
    return any(isinstance(v, Op) and v.prim in DEAR and id(v) not in along for v in values)
