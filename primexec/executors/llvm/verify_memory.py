"""Whether kernels find in memory, once buffers share it, what they find while each buffer has its own."""

from __future__ import annotations

import math

from primexec.effects import storage_bytes
from primexec.errors import ExecutorError
from primexec.executors.llvm import arena
from primexec.executors.llvm.layout import accesses
from primexec.executors.llvm.schedule import Schedule

Write = tuple[str, int]  # a kernel and the number of its store; of an input ("", its number)
ARENA = -1


class _Memory:
    """What was written where, in order."""

    def __init__(self, schedule: Schedule) -> None:
        slots = iter(arena.slots(schedule)[0])
        self._places: list[tuple[int, int, int]] = []
        self._written: dict[int, list[tuple[int, float, Write]]] = {ARENA: []}
        for i, b in enumerate(schedule.buffers):
            in_arena = b.kind == "arena"
            root, start = (ARENA, next(slots)) if in_arena else (schedule.places.get(i, i), schedule.starts.get(i, 0))
            self._places.append((root, start, start + max(1, storage_bytes(b.shape, b.strides, b.dtype))))
            self._written[i] = [(0, math.inf, ("", i))] if b.kind == "input" else []

    def write(self, buffer: int, write: Write) -> None:
        root, start, end = self._places[buffer]
        self._written[root].append((start, end, write))

    def holds(self, buffer: int, writes: tuple[Write, ...]) -> bool:
        """Whether these are the last writes to the memory of a buffer."""
        root, start, end = self._places[buffer]
        found = (w for begin, stop, w in reversed(self._written[root]) if begin < end and start < stop)
        return all(next(found, None) == w for w in reversed(writes))


def verify(apart: Schedule, shared: Schedule) -> Schedule:
    """The second schedule: the first one, where buffers lie in each other's places and some copies are left out.

    Raises:
        ExecutorError: a kernel, or who takes a result, would find what others wrote.
    """
    memory, kernels = _Memory(shared), {k.name: k for k in shared.kernels}
    writes: dict[int, tuple[Write, ...]] = {i: (("", i),) for i, b in enumerate(apart.buffers) if b.kind == "input"}

    def check(buffer: int, reader: str) -> None:
        if not memory.holds(buffer, writes.get(buffer, ())):
            raise ExecutorError(f"b{buffer} is written over before {reader} reads it:\n{shared}")

    for kernel in apart.kernels:
        count = len(kernel.stores)
        loads = [a.buffer for a in accesses(kernel)[count:]]
        if kernel.name not in kernels:
            writes[kernel.stores[0].access.buffer] = writes[loads[0]]
            continue
        for b in dict.fromkeys(loads):
            check(b, kernel.name)
        for number, (own, common) in enumerate(zip(kernel.stores, kernels[kernel.name].stores, strict=True)):
            write = kernel.name, number
            writes[own.access.buffer] = (*writes.get(own.access.buffer, ()), write)
            memory.write(common.access.buffer, write)
    for b in apart.outputs:
        check(b, "the caller")
    return shared
