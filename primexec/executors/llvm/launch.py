"""The way from Python to compiled code: pointers in, new tensors out.

Pointers are packed into memory that belongs to the call alone: calls may come from many threads, and from inside one
another.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from primexec._torch import empty_strided_cpu
from primexec.effects import storage_bytes
from primexec.errors import ExecutorError
from primexec.executors.llvm import entry, pool

# Releasing and taking the GIL costs as much as touching some kilobytes.
RELEASE_GIL_BYTES = 1 << 15


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a program reads or makes: sizes and strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.shape, self.strides, self.dtype)

    def maker(self, *, pooled: bool, kept: bool) -> entry.Make:
        """What makes such a tensor, of a storage of the pool where it is large and `pooled`.

        Args:
            kept: whether it is a result of the program.
        """
        layout = self.shape, self.strides, self.dtype
        nbytes = self.nbytes
        large = pooled and nbytes >= (pool.SMALLEST if kept else pool.SMALLEST_INSIDE)
        if large:
            return pool.outputs.empty, (*layout, nbytes, not kept)
        return (pool.fresh, (*layout, nbytes)) if nbytes >= pool.HUGE else (empty_strided_cpu, layout)

    def fitted(self, t: Tensor, place: int) -> Tensor:
        """The tensor in memory laid out like this: results of other executors may differ, and zeros have none."""
        if t.shape != self.shape or t.dtype != self.dtype or t.device.type != "cpu":
            raise ExecutorError(
                f"operand {place} of a compiled program is {t.dtype} {tuple(t.shape)} on {t.device}, "
                f"and the program was compiled for {self.dtype} {self.shape} on the CPU"
            )
        if t.stride() == self.strides and not t._is_zerotensor():
            return t
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu").copy_(t)


def bind(
    address: int,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    *,
    slots: Sequence[int] = (),
    arena_bytes: int = 0,
    work_bytes: int = 0,
    keep: object = None,
    failed: Callable[[int], None] | None = None,
    pooled: bool = True,
    kept: Set[int] | None = None,
) -> Callable[..., list[Tensor]]:
    """A callable from tensors to new tensors around `void @program(ptr %args)`.

    `args` holds the data pointers of the inputs, then the outputs', then one for each slot of the arena.

    Args:
        address: of the program.
        inputs: what it takes. Tensors with other strides are copied.
        outputs: what to allocate, in order.
        slots: offsets into the arena in bytes.
        arena_bytes: the arena's size.
        work_bytes: bytes that the program reads and writes, about; the GIL is released where they are many.
        failed: for a program that returns an i64 instead of nothing: called with it where it is not 0; raises.
        keep: lives as long as the callable, the module of the address for instance.
        pooled: whether large outputs come from the pool, and a large arena is kept for later calls.
        kept: positions of the outputs that somebody outside of the program may see; None: all.

    Raises:
        ExecutorError: by the callable, for tensors of other shapes or dtypes, or on other devices.

    >>> from primexec.executors.llvm.engine import compile_module
    >>> module = compile_module(
    ...     '''define void @twice(ptr %args) {
    ...   %out.p = getelementptr ptr, ptr %args, i64 1
    ...   %in = load ptr, ptr %args
    ...   %out = load ptr, ptr %out.p
    ...   %x = load float, ptr %in
    ...   %y = fadd float %x, %x
    ...   store float %y, ptr %out
    ...   ret void
    ... }'''
    ... )
    >>> one = Operand((1,), (1,), torch.float32)
    >>> twice = bind(module.address("twice"), [one], [one], keep=module)
    >>> twice(torch.tensor([21.0]))
    [tensor([42.])]
    """
    shared = pooled or arena_bytes < pool.SMALLEST
    touched = work_bytes + sum(o.nbytes for o in outputs) + arena_bytes
    job = entry.Job(
        program=address,
        inputs=[(i.dtype, i.shape, i.strides) for i in inputs],
        makers=[o.maker(pooled=pooled, kept=kept is None or i in kept) for i, o in enumerate(outputs)],
        slots=slots,
        take=(pool.arenas.take if shared else pool.aligned, (arena_bytes,)),
        give_back=pool.arenas.give_back if shared else pool.dropped,
        # A thread that never ran ATen has not heard of torch.set_num_threads.
        before=torch.get_num_threads if touched > RELEASE_GIL_BYTES else None,
        failed=failed,
        keep=keep,
    )
    careful = _careful(job, inputs)
    return entry.native(job, careful) or careful


def _careful(job: entry.Job, inputs: Sequence[Operand]) -> Callable[..., list[Tensor]]:
    """The same in Python, for tensors that have to be copied first, and for machines without a native function."""
    prototype = ctypes.PYFUNCTYPE if job.before is None else ctypes.CFUNCTYPE
    program = prototype(None if job.failed is None else ctypes.c_int64, ctypes.c_char_p)(job.program)

    def call(pointers: list[int]) -> None:
        code = program(struct.pack(f"{len(pointers)}P", *pointers))
        if code and job.failed is not None:
            job.failed(code)

    def launch(*tensors: Tensor) -> list[Tensor]:
        if len(tensors) != len(inputs):
            raise ExecutorError(f"a compiled program takes {len(inputs)} tensors, not {len(tensors)}")
        tensors = tuple(operand.fitted(t, i) for i, (operand, t) in enumerate(zip(inputs, tensors, strict=True)))
        made = [make(*arguments) for make, arguments in job.makers]
        pointers = [t.data_ptr() for t in (*tensors, *made)]
        if job.before is not None:
            job.before()
        if not job.slots:
            call(pointers)
            return made
        make, arguments = job.take
        arena = make(*arguments)
        base = arena.data_ptr()
        pointers += [base + offset for offset in job.slots]
        call(pointers)
        job.give_back(arena)
        return made

    return launch
