"""Results in the place of operands that nobody needs any more, and of what they are copies of: less memory traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import replace

import torch

from primexec.effects import storage_bytes
from primexec.executors.llvm.arena import touched
from primexec.executors.llvm.ir import Access, Kernel, Load, roots_of, walk
from primexec.executors.llvm.schedule import Buffer, Schedule

SMALLEST = 1 << 17  # bytes; less costs more to hand over than to make anew


def in_place(schedule: Schedule, donated: Set[int]) -> Schedule:
    """The schedule, with results in the place of inputs that are donated.

    A kernel writes over an input that no later kernel reads, of which each point takes its own element only: it has
    read that, in whatever passes, before it writes there. So do later kernels over what lies there by then.
    """
    if not donated:
        return schedule
    kernels, buffers = list(schedule.kernels), list(schedule.buffers)
    places: dict[int, int] = {}
    first = _first(kernels)
    last = {b: number for number, kernel in enumerate(kernels) for b in touched(kernel)}
    free = {*donated} - {*schedule.outputs}
    for number, kernel in enumerate(kernels):
        result = _result(kernel, buffers)
        if result is None or first[result.buffer] != number:
            continue
        found = _operand(kernel, result, buffers, {b for b in free if last.get(b) == number})
        if found is not None:
            store = kernel.stores[0]
            over = replace(store, access=replace(store.access, buffer=found))
            kernels[number] = replace(
                kernel, stores=(over,), why=(*kernel.why, f"writes over b{found}, needed no more")
            )
            made = {result.buffer, schedule.places.get(result.buffer, result.buffer)}
            for b in made:
                buffers[b] = replace(buffers[b], kind="none")
                places[b] = places.get(found, found)
            if made.isdisjoint(schedule.outputs):
                free.add(result.buffer)
    return replace(schedule, buffers=tuple(buffers), kernels=tuple(kernels), places={**schedule.places, **places})


def without_copies(schedule: Schedule) -> Schedule:
    """The schedule without kernels that copy a result, as it lies, from where others made it: it is made in place."""
    kernels, buffers, places = list[Kernel](), list(schedule.buffers), dict(schedule.places)
    first = _first(schedule.kernels)
    written = {s.access.buffer: number for number, k in enumerate(schedule.kernels) for s in k.stores}  # last
    for number, kernel in enumerate(schedule.kernels):
        copied = _copied(kernel, buffers)
        if copied is None or first[copied[1]] != number or max(written.get(b, 0) for b in copied) > number:
            kernels.append(kernel)
        else:
            made, result = copied
            buffers[made] = replace(buffers[made], kind="none")
            places[made] = result
    return replace(schedule, buffers=tuple(buffers), kernels=tuple(kernels), places=places)


def _first(kernels: Sequence[Kernel]) -> dict[int, int]:
    """Of each buffer the number of the first kernel that reads or writes it."""
    return {b: number for number, kernel in reversed(list(enumerate(kernels))) for b in touched(kernel)}


def _copied(kernel: Kernel, buffers: list[Buffer]) -> tuple[int, int] | None:
    """Of a kernel that copies all of an intermediate to the same places of a result: the numbers of these."""
    (store, *others), count = kernel.stores, math.prod(kernel.axes)
    made, to = store.value, store.access
    if (
        others
        or store.how
        or not isinstance(made, Load)
        or made.guards
        or to.indirect
        or not _is_there(made.access, to)
    ):
        return None
    pair = made.access.buffer, to.buffer
    sizes = {storage_bytes(b.shape, b.strides, b.dtype) for b in (buffers[i] for i in pair)}
    kinds = tuple(buffers[i].kind for i in pair)
    return pair if kinds == ("arena", "output") and sizes == {count * to.dtype.itemsize} else None


def _result(kernel: Kernel, buffers: list[Buffer]) -> Access | None:
    """Where a kernel writes its only result."""
    if kernel.ordered or len(kernel.stores) > 1:
        return None
    (store,) = kernel.stores
    fits = _extent(buffers[store.access.buffer])[1] >= SMALLEST and not store.how and not store.access.indirect
    return store.access if fits else None


def _operand(kernel: Kernel, result: Access, buffers: list[Buffer], donated: Set[int]) -> int | None:
    """The donated buffer in whose place a result can be."""
    loads: dict[int, list[Access]] = {}
    for v in walk(roots_of(kernel)):
        if isinstance(v, Load):
            loads.setdefault(v.access.buffer, []).append(v.access)
    fit = (b for b in loads if b in donated and _extent(buffers[b]) == _extent(buffers[result.buffer]))
    return next((b for b in fit if all(_is_there(a, result) for a in loads[b])), None)


def _extent(b: Buffer) -> tuple[torch.dtype, int]:
    return b.dtype, storage_bytes(b.shape, b.strides, b.dtype)


def _is_there(a: Access, b: Access) -> bool:
    return (a.offset, a.strides, a.indirect) == (b.offset, b.strides, ())
