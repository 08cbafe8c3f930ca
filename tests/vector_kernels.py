"""Kernels that apply one function of the vector math to arrays, and the measure of their error."""

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import torch

from primexec.executors.llvm import engine
from primexec.executors.llvm.emit import Emitter, ModuleText, literal, type_of
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.vmath import FUNCTIONS, emit_call

DTYPES = {"f32": torch.float32, "f64": torch.float64}
BINARY = {"atan2", "fmax", "fmin", "fmod", "hypot", "maximum", "minimum", "nextafter", "pow", "remainder"}
Kernel = Callable[..., torch.Tensor]


def symbol(name: str, dtype: str, lanes: int) -> str:
    return f"{name}_{dtype}_{lanes}"


def module_text(functions: Iterable[tuple[str, str]], target: Target, lanes: dict[str, int] | None = None) -> str:
    """`void @name_dtype_lanes(ptr x, ptr y, ptr out, i64 n)` for each; n a multiple of the lanes."""
    module = ModuleText(target)
    for name, dtype in functions:
        width = lanes[dtype] if lanes else target.lanes(dtype)
        kernel(module, name, dtype, width)
    return module.text()


def kernel(module: ModuleText, name: str, dtype: str, lanes: int) -> None:
    e, vector, scalar = Emitter(module), type_of(dtype, lanes), type_of(dtype)

    def place(pointer: str, i: str) -> str:
        return e.emit(f"getelementptr {scalar}, ptr {pointer}, i64 {i}")

    def body(i: str, _: list[str]) -> list[str]:
        pointers = ("%x", "%y") if name in BINARY else ("%x",)
        operands = [e.emit(f"load {vector}, ptr {place(p, i)}, align 4") for p in pointers]
        result = operands[0] if name == "copy" else emit_call(e, name, dtype, operands, lanes)
        e.do(f"store {vector} {result}, ptr {place('%out', i)}, align 4")
        return []

    e.loop("0", "%n", lanes, body)
    e.do("ret void")
    e.function(f"void @{symbol(name, dtype, lanes)}(ptr %x, ptr %y, ptr %out, i64 %n)")


class Kernels:
    """The table's functions as functions from tensors to tensors; sizes are padded to the lanes."""

    def __init__(
        self, functions: Iterable[tuple[str, str]] = FUNCTIONS, target: Target | None = None, lanes: int | None = None
    ) -> None:
        target = target or host()
        self.lanes = {d: lanes or target.lanes(d) for d in DTYPES}
        self.module = engine.compile_module(module_text(functions, target, self.lanes), target)
        self.prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)

    def raw(self, name: str, dtype: str) -> Callable[[int, int, int, int], None]:
        """(address of x, of y, of out, n)."""
        return self.prototype(self.module.address(symbol(name, dtype, self.lanes[dtype])))

    def __call__(self, name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        dtype = {v: k for k, v in DTYPES.items()}[x.dtype]
        count, lanes = len(x), self.lanes[dtype]
        padded = -(-count // lanes) * lanes
        operands = [torch.nn.functional.pad(v, (0, padded - count)).contiguous() for v in (x, x if y is None else y)]
        out = torch.empty(padded, dtype=x.dtype)
        self.raw(name, dtype)(operands[0].data_ptr(), operands[1].data_ptr(), out.data_ptr(), padded)
        return out[:count]


def ulps(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|got - expected| in units of got's last place at the expected value (float64 or wider); 0 where both are NaN."""
    info = np.finfo(got.dtype)
    exponent = np.frexp(np.abs(expected))[1].astype(np.int64) - 1
    unit = np.ldexp(np.ones_like(expected), np.maximum(exponent, info.minexp) - info.nmant)
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(expected.dtype) - expected) / unit
        rounded = expected.astype(got.dtype)
    alike = (got == rounded) & np.isinf(rounded) | (np.isnan(got) & np.isnan(expected))
    error[alike] = 0.0
    error[np.isnan(error)] = np.inf
    return error


__all__ = ["BINARY", "DTYPES", "Kernels", "host", "literal", "module_text", "symbol", "ulps"]
