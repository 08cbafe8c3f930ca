"""Products that are kernels, as sums of products: small ones, those of a matrix and a vector, and what is faster so.

A call of a library takes as long as some thousand multiplications. Vectors meet each element of a matrix once: nothing
can be reused, and kernels read weights that lie outside of the caches two to four times as fast as MKL and oneDNN did
(512 x 2048 in one thread: 113 µs, 465 and 204), within them 0.8 times as fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.llvm.contraction import HALVES, LARGEST
from primexec.executors.llvm.instructions import COPIES
from primexec.executors.llvm.maps import VIEWS
from primexec.executors.llvm.measured import Shape, fastest, widened
from primexec.executors.llvm.schedule import prim, value

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


def product(a: Tensor, b: Tensor) -> Any:
    """The operators `mm` and `bmm`."""
    if a.dtype in HALVES:  # rounded once
        return (torch.bmm if a.dim() == 3 else torch.mm)(a.float(), b.float()).to(a.dtype)
    if a.dtype not in (torch.float32, torch.float64):
        return f"a product of {a.dtype} is the library's"
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def widened_from(operand: Any) -> torch.dtype | None:
    """The 16-bit dtype that an operand, or what it is a view or copy of, was made float32 of; before lowering, too."""
    while prim(operand) in VIEWS or prim(operand) in COPIES:
        operand = operand.args[0]
    if operand.op != "call_function" or len(operand.all_input_nodes) != 1:
        return None
    t, source = value(operand), value(operand.all_input_nodes[0])
    if not isinstance(t, Tensor) or not isinstance(source, Tensor) or t.dtype is not torch.float32:
        return None
    return source.dtype if source.dtype in HALVES else None


def _operands(node: fx.Node) -> list[Tensor]:
    arguments: Any = node.args
    return [value(n) for n in arguments]


def is_large(node: fx.Node) -> bool:
    """Whether a node is a product of matrices that is no plain sum of products."""
    if node.target not in _PRODUCTS:
        return False
    a, b = _operands(node)
    return a.numel() * b.shape[-1] > LARGEST and 1 not in (a.shape[-2], b.shape[-1])


def why_not(node: fx.Node) -> str:
    """Why the operands of a product are not for a kernel; empty where they may be."""
    a, b = _operands(node)
    is_short, sources = a.dtype in HALVES, {widened_from(n) for n in node.all_input_nodes} - {None}
    if (sources | ({a.dtype} if is_short else set())) - widened():
        return "a product of 16-bit numbers is the library's"
    if is_short or not is_large(node):
        return ""
    if any(s == 0 for t in (a, b) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        return "a factor repeats itself"
    if sources:
        return ""
    found = fastest(Shape.of(a, b))
    return "" if found == "kernel" else f"{found} was measured to be faster than a kernel"
