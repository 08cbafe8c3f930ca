"""The closed table of primitive operations that programs are lowered to, and that executors implement.

Members are PyTorch's own prims and the ATen overloads that decompose no further.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from primexec import _torch
from primexec.prims import (
    contraction,
    creation,
    effects,
    fft,
    indexing,
    linalg,
    pointwise,
    random,
    reduction,
    scan,
    shape,
)
from primexec.prims.base import Prim

__all__ = ["TABLE", "Prim", "is_prim", "lookup"]

FAMILIES = (pointwise, shape, reduction, indexing, contraction, scan, random, fft, linalg, creation, effects)
TABLE: dict[str, Prim] = {row.op: row for family in FAMILIES for row in family.ROWS}


@cache
def lookup(op: Any) -> Prim | None:
    """The row of an operator overload, or None where it is no prim.

    >>> import torch
    >>> lookup(torch.ops.aten.mm.default).shapes
    '(m, k), (k, n) → (m, n)'
    >>> lookup(torch.ops.aten.addmm.default)
    """
    return TABLE.get(str(op)) if isinstance(op, _torch.OpOverload) else None


def is_prim(op: Any) -> bool:
    """Whether an operator overload stands in the table."""
    return lookup(op) is not None
