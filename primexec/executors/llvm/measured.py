"""Which way to compute a product is the fastest on this machine: ATen's, oneDNN's, or a kernel of ours.

ATen's products go to the BLAS that torch was built with; which is faster depends on the processor and on the shape. It
is measured once a process for each shape, with right factors that lie outside of the caches, as a model's weights do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from primexec.effects import storage_bytes
from primexec.executors.llvm import matmul
from primexec.executors.llvm.contraction import HALVES, blocks, sides
from primexec.executors.llvm.target import host

SMALLEST = 1 << 22  # multiplications from which on oneDNN may be worth a call
SMALLEST_KERNEL = 1 << 17  # from which on a measurement is worth its time
LARGEST = 1 << 26  # multiplications of one measured run, each thread's; of larger products a part is measured:
ROWS = COLUMNS = 1 << 8  # at least; of 116 columns in place of 384 every way takes longer, and which one tells nothing
GAIN = {torch.float32: 0.9, torch.bfloat16: 1.0}  # of ATen's time that oneDNN may take
KERNEL_GAIN = 1.05  # of either's that a kernel may take, which ends no region and computes what follows as well
CALL_SECONDS = 1e-5  # and so much more: what a call between regions costs, and that of the kernel from Python here
ROUNDS, CLEAR = 2, 1.3
SECONDS = 0.02  # that one measurement takes, or four runs of each
COLD_BYTES = 1 << 25  # factors of so many bytes together lie outside of most caches

Product = Callable[[Tensor], Any]  # of a right factor


@cache
def linear() -> Any:
    """oneDNN's product with a plain weight, called as `(x, weight, bias, "none", [], "")`; None where there is none."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operator is None else operator.default


@cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Of the products that oneDNN has fast code for on this machine."""
    if linear() is None:
        return ()
    return (torch.float32, torch.bfloat16) if _has_code(torch.bfloat16) else (torch.float32,)


@cache
def widened() -> frozenset[torch.dtype]:
    """16-bit floats for whose products PyTorch has no fast code on this machine: kernels, which widen them, are faster.

    In one thread of AVX2, 64 x 512 x 2048: PyTorch 7.8 ms, or 256 where the right factor lies in rows; a kernel 1.5.
    With AVX-512 but no instructions for bfloat16, BERT on 128 tokens: PyTorch 396 ms, kernels 84.
    """
    return frozenset(dtype for dtype in HALVES if _has_code(dtype) is False)


def _has_code(dtype: torch.dtype) -> bool | None:
    """Whether oneDNN has fast code for 16-bit floats on this processor; None where it does not tell."""
    element, name = {
        torch.bfloat16: ("bf16", "_is_mkldnn_bf16_supported"),
        torch.float16: ("f16", "_is_mkldnn_fp16_supported"),
    }[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return None if supported is None else host().multiplies(element) and bool(supported())


@dataclass(frozen=True)
class Shape:
    """What the time of a product depends on.

    Attributes:
        left, right: strides of the factors, those of a batch apart.
        batch: how many products there are.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    left: tuple[int, int]
    right: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Shape:
        rows, inner = a.shape[-2:]
        batch = a.shape[0] if a.dim() == 3 else 1
        (r, k), (j, c) = (t.stride()[-2:] for t in (a, b))
        return cls(batch, rows, inner, b.shape[-1], (r, k), (j, c), a.dtype)

    @property
    def size(self) -> int:
        """Multiplications."""
        return self.batch * self.rows * self.inner * self.columns

    @property
    def is_turned(self) -> bool:
        """Whether the left factor is a transposed matrix, as in the gradient of a weight."""
        return self.left != (self.inner, 1) and self.left == (1, self.rows)

    @property
    def fits_library(self) -> bool:
        """Whether oneDNN takes the factors as they are, or the left one turned."""
        if self.batch > 1 or self.size < SMALLEST or self.dtype not in dtypes():
            return False
        is_left = self.is_turned or self.left == (self.inner, 1)
        is_right = self.right in ((1, self.inner), (self.columns, 1))
        return is_left and is_right


def fastest(shape: Shape) -> str:
    """`kernel`, `oneDNN` or `ATen`."""
    largest = LARGEST * torch.get_num_threads()
    rows = min(shape.rows, max(ROWS, largest // (shape.inner * shape.columns)))
    columns = min(shape.columns, max(COLUMNS, largest // (rows * shape.inner)))
    batch = min(shape.batch, max(1, largest // (rows * shape.inner * columns)))
    left = (1, rows) if shape.is_turned else shape.left
    # For parts of longer rows oneDNN takes 100 times as long: a first call with a weight of 4096 x 1024 took 20 s.
    right = (columns, 1) if shape.right == (shape.columns, 1) else shape.right
    part = replace(shape, rows=rows, columns=columns, batch=batch, left=left, right=right)
    return _fastest(part, shape.fits_library)


@cache
def _fastest(shape: Shape, with_library: bool) -> str:
    """By medians, which what else the machine does moves little."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        ways: dict[str, Product] = {"ATen": _aten(shape)}
        if with_library:
            ways["oneDNN"] = _library(shape)
        if shape.dtype is torch.float32 and shape.size >= SMALLEST_KERNEL and (made := _kernel(shape)):
            ways["kernel"] = made
        return _measured(ways, shape) if len(ways) > 1 else "ATen"


def _measured(ways: dict[str, Product], shape: Shape) -> str:
    def factor() -> Tensor:
        return _factor(shape.batch, shape.inner, shape.columns, shape.right, shape.dtype)

    weights = [factor()]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for function in ways.values():
        function(weights[0])  # the first call prepares what later ones use
    started = time.perf_counter()
    for function in ways.values():
        function(weights[0])
    cold = COLD_BYTES // weights[0].untyped_storage().nbytes()
    count = max(2, min(16, cold, int(SECONDS / ROUNDS / (time.perf_counter() - started))))
    weights += [factor() for _ in range(1, count)]
    found: dict[str, float] = {}
    while not found or (len(seconds["ATen"]) < ROUNDS * count and not _is_clear(found)):
        for name, function in ways.items():
            for weight in weights:
                started = time.perf_counter()
                function(weight)
                seconds[name].append(time.perf_counter() - started)
        found = {name: median(taken) for name, taken in seconds.items()}
    best = "oneDNN" if found.get("oneDNN", found["ATen"]) < GAIN[shape.dtype] * found["ATen"] else "ATen"
    limit = KERNEL_GAIN * found[best] + CALL_SECONDS
    return "kernel" if found.get("kernel", math.inf) < limit else best


def _is_clear(found: dict[str, float]) -> bool:
    """Whether the fastest way is so much faster than the next one that one round tells."""
    first, second, *_ = sorted(found.values())
    return second > CLEAR * first


def _factor(batch: int, rows: int, columns: int, strides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Ones, laid out like a factor that is a matrix of its own or part of a larger one."""
    size = _extent(rows, columns, strides)
    t = torch.ones(batch * size, dtype=dtype).as_strided((batch, rows, columns), (size, *strides))
    return t[0] if batch == 1 else t


def _extent(rows: int, columns: int, strides: tuple[int, int]) -> int:
    """Elements from the first one of a matrix to its last."""
    return storage_bytes((rows, columns), strides, torch.int8)


def _left(shape: Shape) -> Tensor:
    return _factor(shape.batch, shape.rows, shape.inner, shape.left, shape.dtype)


def _aten(shape: Shape) -> Product:
    left, product = _left(shape), torch.mm if shape.batch == 1 else torch.bmm
    return lambda w: product(left, w)


def _library(shape: Shape) -> Product:
    left, function = _left(shape), linear()
    if shape.is_turned:  # a kernel turns it first, which takes as long as a copy
        left = torch.ones(shape.rows, shape.inner, dtype=shape.dtype)
        return lambda w: function(left.clone(), w.t(), None, "none", [], "")
    return lambda w: function(left, w.t(), None, "none", [], "")


def _kernel(shape: Shape) -> Product | None:
    batch, rows, inner, columns = axes = shape.batch, shape.rows, shape.inner, shape.columns
    between = _extent(rows, inner, shape.left), _extent(inner, columns, shape.right)
    strides = (between[0], *shape.left, 0), (between[1], 0, *shape.right)
    if sides(axes, (False, False, True, False), *strides) is None:
        return None
    left, product = _left(shape), matmul.product()
    block = blocks(host(), [batch], rows, columns, inner)
    job = matmul.Job(
        left.data_ptr(), between[0], *shape.left, 0, between[1], *reversed(shape.right),
        0, rows, columns, inner, block.depth, block.rows, block.columns,
        -(-rows // block.rows), -(-columns // block.columns),
    )  # fmt: skip

    def run(weight: Tensor) -> Tensor:
        torch.get_num_threads()  # a thread that never ran ATen has not heard of torch.set_num_threads
        result = torch.empty(left.shape[:-1] + weight.shape[-1:])
        job.right, job.result = weight.data_ptr(), result.data_ptr()
        product(job, block.units)
        return result

    return run
