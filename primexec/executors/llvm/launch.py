"""The way from Python to compiled code: pointers in, new tensors out.

The pointers are packed into a bytes object, which lives as long as the call and belongs to it alone: calls may come
from many threads, and from inside one another.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primexec._torch import empty_strided_cpu
from primexec.executors.llvm import pool

# Releasing and taking the GIL costs as much as touching some kilobytes.
RELEASE_GIL_BYTES = 1 << 15


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a program makes: sizes and strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return pool.storage_bytes(self.shape, self.strides, self.dtype)


def bind(
    address: int,
    inputs: int,
    outputs: Sequence[Output],
    *,
    slots: Sequence[int] = (),
    arena_bytes: int = 0,
    work_bytes: int = 0,
    keep: object = None,
) -> Callable[..., list[Tensor]]:
    """A callable from tensors to new tensors around `void @program(ptr %args)`.

    `args` holds the data pointers of the inputs, then the outputs', then one for each slot of the arena.

    Args:
        address: of the program.
        inputs: their number. Nothing is checked: guards have seen to devices, shapes, strides and dtypes.
        outputs: what to allocate, in order.
        slots: offsets into the arena in bytes.
        arena_bytes: the arena's size.
        work_bytes: bytes that the program reads and writes, about; the GIL is released where they are many.
        keep: lives as long as the callable, the module of the address for instance.

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
    >>> twice = bind(module.address("twice"), 1, [Output((1,), (1,), torch.float32)], keep=module)
    >>> twice(torch.tensor([21.0]))
    [tensor([42.])]
    """
    touched = work_bytes + sum(o.nbytes for o in outputs) + arena_bytes
    large = touched > RELEASE_GIL_BYTES
    prototype = ctypes.CFUNCTYPE if large else ctypes.PYFUNCTYPE
    names = [f"a{i}" for i in range(inputs)]
    made = [f"o{i}" for i in range(len(outputs))]
    pointers = [f"{name}.data_ptr()" for name in names + made]
    scope: dict[str, Any] = {
        "call": prototype(None, ctypes.c_char_p)(address),
        "empty": empty_strided_cpu,
        "pooled": pool.outputs.empty,
        "take": pool.arenas.take,
        "give_back": pool.arenas.give_back,
        "wake_threads": torch.get_num_threads,
        "keep": keep,
    }
    lines = [f"def launch({', '.join(names)}):"]
    for i, output in enumerate(outputs):
        scope |= {f"shape{i}": output.shape, f"strides{i}": output.strides, f"dtype{i}": output.dtype}
        nbytes = output.nbytes
        maker, size = ("pooled", f", {nbytes}") if nbytes >= pool.SMALLEST else ("empty", "")
        lines.append(f"    o{i} = {maker}(shape{i}, strides{i}, dtype{i}{size})")
    if large:
        lines.append("    wake_threads()  # a thread that never ran ATen has not heard of torch.set_num_threads")
    if slots:
        lines += [f"    arena = take({arena_bytes})", "    base = arena.data_ptr()"]
        pointers += [f"base + {offset}" for offset in slots]
    scope["pack"] = struct.Struct(f"{len(pointers)}P").pack
    lines.append(f"    call(pack({', '.join(pointers)}))")
    if slots:
        lines.append("    give_back(arena)")
    lines.append(f"    return [{', '.join(made)}]")
    exec(compile("\n".join(lines), "<primexec launch>", "exec"), scope)
    return scope["launch"]  # type: ignore[no-any-return]
