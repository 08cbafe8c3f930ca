"""Axes cut where a result begins to come from another tensor: between two cuts it is known which one it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from primexec.executors.llvm.ir import Within
from primexec.executors.llvm.layout import Axis

MOST_SEGMENTS = 8  # of an axis; the code of a loop is written for each
MOST_VARIANTS = 16  # of a kernel
LONG = 4  # where there would be more segments, only those of such a part of the axis are cut out


def decided(withins: Sequence[Within], axis: Axis) -> list[tuple[Within, int, int]]:
    """The conditions that depend on one axis alone, each with the range of it where it holds."""
    found = []
    own = {axis.axis, *axis.joined}
    for w in withins:
        step = w.strides[axis.axis]
        if w.indirect or not step or any(s for a, s in enumerate(w.strides) if a not in own):
            continue
        if step > 0:
            low, high = -((w.offset - w.low) // step), -((w.offset - w.high) // step)
        else:
            low, high = (w.offset - w.high) // -step + 1, (w.offset - w.low) // -step + 1
        found.append((w, max(0, min(low, axis.size)), max(0, min(high, axis.size))))
    return found


def edges(withins: Sequence[Within], axis: Axis) -> list[int]:
    """0, the places where a condition changes, and the axis's size; of too many places those around long segments."""
    points = sorted({0, axis.size, *(p for _, low, high in decided(withins, axis) for p in (low, high))})
    if len(points) - 1 <= MOST_SEGMENTS:
        return points if len(points) > 1 else [0, axis.size]
    long = [pair for pair in itertools.pairwise(points) if LONG * (pair[1] - pair[0]) >= axis.size]
    return sorted({0, axis.size, *itertools.chain(*long)})


def known(withins: Sequence[Within], axis: Axis, start: int, stop: int) -> dict[int, bool]:
    """What the conditions are, by id, of which each is the same all along a segment."""
    rows = decided(withins, axis)
    return {id(w): low <= start < high for w, low, high in rows if not any(start < p < stop for p in (low, high))}
