"""What a kernel asks memory for before it needs it: the processor itself follows a row, and stops where it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from primexec.executors.llvm.ir import Access, Kernel
from primexec.executors.llvm.layout import Layout
from primexec.executors.llvm.memory import CACHE_LINE
from primexec.executors.llvm.target import Target

NEAR_BYTES = 1 << 12  # of a unit's reads that are fetched into the first cache; with 8 KiB, 1.4 times the time
LARGE_BYTES = 1 << 20  # of operands, below which a kernel of one pass finds them in a cache
ROW_BYTES = 1 << 10  # of rows that are worth it: 0.65 to 0.9 of the time, of shorter ones up to 1.15


def asked_for(
    kernel: Kernel, layout: Layout, reads: Sequence[Access], passes: int, target: Target
) -> list[tuple[Access, int, int]]:
    """What is read next, how many elements further on it lies, and the cache that it is fetched into.

    Later passes run from the cache, and ask for what the next unit reads first. A kernel of one pass asks for rows that
    do not follow one another.

    Args:
        reads: of the first pass.
    """
    if not layout.outer or layout.pieces > 1 or layout.columns or layout.lane is None:
        return []
    axes = [a.axis for a in (*layout.outer, *layout.inner)]
    step, length = (axes[-2], layout.inner[-1].size) if passes == 1 else (layout.outer[-1].axis, layout.unit_size)
    plain = [a for a in reads if a.strides[layout.lane.axis] == 1 and not a.indirect and a.strides[step]]
    if passes == 1:
        plain = list(_apart(plain, step, length, kernel)) if layout.across is None else []
    size = sum(length * a.dtype.itemsize for a in plain)
    cache = 1 if size <= NEAR_BYTES else 2
    return [(a, a.strides[step], cache) for a in plain] if size <= target.cache_bytes // 2 else []


def _apart(reads: Sequence[Access], axis: int, length: int, kernel: Kernel) -> Iterator[Access]:
    """Reads of large operands whose next row begins elsewhere than the last one ends, each line of memory once."""
    found = [(a.buffer, a.offset) for a in reads]
    for a in reads:
        step, size = a.strides[axis], a.dtype.itemsize
        near = any(b == a.buffer and abs(a.offset + step - offset) < CACHE_LINE // size for b, offset in found)
        large = length * size >= ROW_BYTES and math.prod(kernel.axes) * size >= LARGE_BYTES
        if large and step != length and not near:
            found.append((a.buffer, a.offset + step))
            yield a
