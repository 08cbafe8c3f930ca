"""Where intermediates lie in the arena: those that are not needed at the same time share their places."""

from __future__ import annotations

import math

from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.layout import accesses
from primexec.executors.llvm.pool import ALIGNMENT
from primexec.executors.llvm.schedule import Buffer, Schedule


def slots(schedule: Schedule) -> tuple[list[int], int]:
    """The offset in bytes of each buffer of the arena, in order, and the size of the arena.

    A buffer keeps its place from the first kernel that touches it to the last one: kernels run one after another.
    """
    lives: dict[int, tuple[int, int]] = {}
    for number, kernel in enumerate(schedule.kernels):
        for b in touched(kernel):
            lives[b] = lives.get(b, (number, number))[0], number
    arena = [i for i, b in enumerate(schedule.buffers) if b.kind == "arena"]
    sizes = {i: _nbytes(schedule.buffers[i]) for i in arena}
    places: dict[int, int] = {}
    held: list[list[int]] = [[] for _ in range(len(schedule.kernels) or 1)]  # at each kernel, those that have a place
    for i in sorted(arena, key=sizes.__getitem__, reverse=True):
        first, last = lives.get(i, (0, 0))
        life = held[first : last + 1]
        offset = 0
        for start, other in sorted((places[other], other) for other in set().union(*life)):
            if start < offset + sizes[i]:
                offset = max(offset, start + sizes[other])
        places[i] = offset
        for others in life:
            others.append(i)
    return [places[i] for i in arena], max((places[i] + sizes[i] for i in arena), default=0)


def touched(kernel: Kernel) -> set[int]:
    """The numbers of the buffers that a kernel reads or writes."""
    return {a.buffer for a in accesses(kernel)}


def _nbytes(b: Buffer) -> int:
    return -(-max(math.prod(b.shape), 1) * b.dtype.itemsize // ALIGNMENT) * ALIGNMENT
