"""Sums of weighted neighbours among the kernels: convolutions of few terms, whose windows overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from primexec.executors.llvm.ir import Expr, Kernel, Load, Op, Reduce, operands, roots_of, walk

MOST_TERMS = 128  # of a sum that stays in registers


@dataclass(frozen=True)
class Stencil:
    """Such a sum.

    Attributes:
        total: the sum.
        factors: what is multiplied at each of its terms.
        weights: what is read for the factors, windows apart.
    """

    total: Reduce
    factors: tuple[Expr, Expr]
    weights: tuple[Load, ...]


def stencil(kernel: Kernel) -> Stencil | None:
    """The sum that a kernel is; None where it is none, or where something else in it moves along the summed axes."""
    totals = [v for v in walk(roots_of(kernel)) if isinstance(v, Reduce)]
    terms = math.prod(n for n, r in zip(kernel.axes, kernel.reduced, strict=True) if r)
    if len(totals) != 1 or kernel.ordered or 0 in kernel.axes or not 1 < terms <= MOST_TERMS:
        return None
    match totals[0]:
        case Reduce("sum", Op("mul", (first, second)), torch.float32 | torch.float64) as total:
            loads = [v for v in walk((first, second)) if isinstance(v, Load)]
        case _:
            return None
    weights = tuple(v for v in loads if not _overlaps(v, kernel))
    if len(weights) == len(loads) or any(_moves(s.access.strides, kernel) for s in kernel.stores):
        return None
    outside = _outside(kernel, total)
    if any(_moves(v.access.strides if isinstance(v, Load) else getattr(v, "strides", ()), kernel) for v in outside):
        return None
    return Stencil(total, (first, second), weights)


def _overlaps(load: Load, kernel: Kernel) -> bool:
    """Whether points read elements in common, some of them at other terms of the sum."""
    steps = [(n, abs(s)) for n, s in zip(kernel.axes, load.access.strides, strict=True) if n > 1 and s]
    span = 1 + sum(s * (n - 1) for n, s in steps)
    return span < math.prod(n for n, _ in steps) and _moves(load.access.strides, kernel)


def _moves(strides: tuple[int, ...], kernel: Kernel) -> bool:
    return any(s for s, r, n in zip(strides, kernel.reduced, kernel.axes, strict=False) if r and n > 1)


def _outside(kernel: Kernel, total: Reduce) -> list[Expr]:
    """What is computed of the sum and beside it."""
    seen: dict[int, Expr] = {}
    waiting = list(roots_of(kernel))
    while waiting:
        v = waiting.pop()
        if v is not total and id(v) not in seen:
            seen[id(v)] = v
            waiting += operands(v)
    return list(seen.values())
