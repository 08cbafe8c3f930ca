"""Where intermediates lie: those that are not needed at the same time share their places.

They lie in large results that nothing was written to yet, as far as there is room, the others in the arena.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from primexec.effects import storage_bytes
from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.layout import accesses
from primexec.executors.llvm.pool import ALIGNMENT
from primexec.executors.llvm.schedule import Buffer, Schedule

HOSTS, SMALLEST_HOST = 16, 1 << 17  # results that may hold intermediates, the largest ones; bytes

Life = tuple[int, int]  # the numbers of the first and of the last kernel that touch a buffer


class _Block:
    """Memory in which buffers have places, each as long as it lives: kernels run one after another."""

    def __init__(self, kernels: int) -> None:
        self._held: list[list[tuple[int, int]]] = [[] for _ in range(kernels or 1)]  # at each kernel, what is taken

    def gap(self, nbytes: int, life: Life) -> int:
        """Where so many bytes are free."""
        offset = 0
        for start, end in sorted(set().union(*self._held[life[0] : life[1] + 1])):
            if start < offset + nbytes:
                offset = max(offset, end)
        return offset

    def take(self, offset: int, nbytes: int, life: Life) -> None:
        for taken in self._held[life[0] : life[1] + 1]:
            taken.append((offset, offset + nbytes))


def in_results(schedule: Schedule) -> Schedule:
    """The schedule, with intermediates in large results that no kernel touches before they are needed no more."""
    lives, buffers = _lives(schedule), list(schedule.buffers)
    places, starts = dict(schedule.places), dict(schedule.starts)
    room = {i: storage_bytes(b.shape, b.strides, b.dtype) for i, b in enumerate(buffers) if b.kind == "output"}
    hosts = [i for i in sorted(room, key=room.__getitem__, reverse=True)[:HOSTS] if room[i] >= SMALLEST_HOST]
    blocks = {i: _Block(len(schedule.kernels)) for i in hosts}
    for i, size in _sizes(schedule).items():
        life = lives.get(i, (0, 0))
        for host in (h for h in hosts if life[1] < lives[h][0] and size <= room[h]):
            offset = blocks[host].gap(size, life)
            if offset + size <= room[host]:
                blocks[host].take(offset, size, life)
                places[i], starts[i], buffers[i] = host, offset, replace(buffers[i], kind="none")
                break
    return replace(schedule, buffers=tuple(buffers), places=places, starts=starts)


def slots(schedule: Schedule) -> tuple[list[int], int]:
    """The offset in bytes of each buffer of the arena, in order, and the size of the arena."""
    lives, sizes = _lives(schedule), _sizes(schedule)
    block, places = _Block(len(schedule.kernels)), dict[int, int]()
    for i, size in sizes.items():
        life = lives.get(i, (0, 0))
        places[i] = block.gap(size, life)
        block.take(places[i], size, life)
    return [places[i] for i in sorted(places)], max((places[i] + sizes[i] for i in places), default=0)


def touched(kernel: Kernel) -> set[int]:
    """The numbers of the buffers that a kernel reads or writes."""
    return {a.buffer for a in accesses(kernel)}


def _lives(schedule: Schedule) -> Mapping[int, Life]:
    """Of each buffer, and of what lies in its place."""
    lives: dict[int, Life] = {}
    for number, kernel in enumerate(schedule.kernels):
        for b in touched(kernel):
            for i in {b, schedule.places.get(b, b)}:
                lives[i] = lives.get(i, (number, number))[0], number
    return lives


def _sizes(schedule: Schedule) -> Mapping[int, int]:
    """Bytes of each buffer of the arena, the largest first."""
    sizes = {i: _nbytes(b) for i, b in enumerate(schedule.buffers) if b.kind == "arena"}
    return dict(sorted(sizes.items(), key=lambda item: item[1], reverse=True))


def _nbytes(b: Buffer) -> int:
    return -(-max(math.prod(b.shape), 1) * b.dtype.itemsize // ALIGNMENT) * ALIGNMENT
