"""Axes cut where a result begins to come from another tensor: between two cuts it is known which one it is."""

from __future__ import annotations

from collections.abc import Sequence

from primexec.executors.llvm.ir import Within
from primexec.executors.llvm.layout import Axis

MOST_SEGMENTS = 8  # of an axis; the code of a loop is written for each
MOST_VARIANTS = 16  # of a kernel


def decided(withins: Sequence[Within], axis: Axis) -> list[tuple[Within, int, int]]:
    """The conditions that depend on one axis alone, each with the range of it where it holds."""
    found = []
    for w in withins:
        step = w.strides[axis.axis]
        if w.indirect or not step or any(s for a, s in enumerate(w.strides) if a != axis.axis):
            continue
        if step > 0:
            low, high = -((w.offset - w.low) // step), -((w.offset - w.high) // step)
        else:
            low, high = (w.offset - w.high) // -step + 1, (w.offset - w.low) // -step + 1
        found.append((w, max(0, min(low, axis.size)), max(0, min(high, axis.size))))
    return found


def edges(withins: Sequence[Within], axis: Axis) -> list[int]:
    """0, the places where a condition changes, and the axis's size; no places where they are too many."""
    points = {p for _, low, high in decided(withins, axis) for p in (low, high)} - {0, axis.size}
    return [0, *sorted(points if len(points) < MOST_SEGMENTS else ()), axis.size]


def known(withins: Sequence[Within], axis: Axis, start: int) -> dict[int, bool]:
    """What the conditions are, by id, in the segment that begins at a place."""
    if len(edges(withins, axis)) == 2 and any(0 < p < axis.size for _, *ps in decided(withins, axis) for p in ps):
        return {}
    return {id(w): low <= start < high for w, low, high in decided(withins, axis)}
