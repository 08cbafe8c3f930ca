"""Products that are kernels, as sums of products: small ones, and those of a matrix and a vector.

A call of a library takes as long as some thousand multiplications. Vectors meet each element of a matrix once: nothing
can be reused, and kernels read weights that lie outside of the caches two to four times as fast as MKL and oneDNN did
(512 x 2048 in one thread: 113 µs, 465 and 204), within them 0.8 times as fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.llvm.instructions import COPIES
from primexec.executors.llvm.maps import VIEWS
from primexec.executors.llvm.schedule import prim, value

LARGEST = 1 << 13  # multiplications; a kernel of twice as many takes as long as torch.mm, and ends a region less


def product(a: Tensor, b: Tensor) -> Any:
    """The operators `mm` and `bmm`."""
    if a.dtype not in (torch.float32, torch.float64):
        return f"a product of {a.dtype} is the library's"
    if a.numel() * b.shape[-1] > LARGEST and 1 not in (a.shape[-2], b.shape[-1]):
        return f"it takes more than {LARGEST} multiplications"
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
    return source.dtype if source.dtype in (torch.bfloat16, torch.float16) else None


def why_not(node: fx.Node) -> str:
    """Why the operands of a product are not for a kernel; empty where they may be."""
    widened = any(map(widened_from, node.all_input_nodes))
    return "a product of 16-bit numbers is the library's" if widened else ""
