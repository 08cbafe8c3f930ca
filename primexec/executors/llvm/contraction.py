"""Products of matrices among the kernels: which kernels are such, and the blocks in which they are computed.

A product is a sum, over one axis, of products of two elements in memory: one moves along the rows of the result, the
other along its columns, both perhaps along further axes. What is made of the sum at the same point belongs to the same
kernel. Blocks after Goto and Van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): a panel of columns
stays in the first cache, a block of rows in the second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from primexec.executors.llvm.ir import Expr, Kernel, Load, Op, Reduce, roots_of, walk
from primexec.executors.llvm.maps import VIEWS
from primexec.executors.llvm.schedule import prim, reduced_axes, value
from primexec.executors.llvm.target import Target

HALVES = frozenset({torch.bfloat16, torch.float16})
LARGEST = 1 << 13  # multiplications of a product that is computed as a plain sum
NARROW = 8  # rows and columns that are worth a tile
PANEL_BYTES = 3 << 13  # of the columns that stay in the first cache
DEPTH = 192  # elements that are added up in a row
ROWS = 192  # of a block, whose left operand stays in the second cache with its sums
SUMS = 1 << 15  # in a block
UNITS = 8  # for each processor, if there are enough columns
PANELS = 4  # of a unit at least, if that leaves a unit for each processor
PROCESSORS = os.cpu_count() or 1


@dataclass(frozen=True)
class Contraction:
    """A product.

    Attributes:
        total: the sum.
        left, right: its factors.
        batch: axes along which both factors move, and the result.
        rows, columns, inner: axis along which the left one moves, the right one, and the one that is summed over.
    """

    total: Reduce
    left: Load
    right: Load
    batch: tuple[int, ...]
    rows: int
    columns: int
    inner: int


def contraction(kernel: Kernel) -> Contraction | None:
    """The product that a kernel is."""
    totals = [v for v in walk(roots_of(kernel)) if isinstance(v, Reduce)]
    if len(totals) != 1 or kernel.ordered or math.prod(kernel.axes) <= LARGEST:
        return None
    match totals[0]:
        case Reduce("sum", Op("mul", (first, second)), torch.float32) as total:
            left, right = _loaded(first), _loaded(second)
        case _:
            return None
    if left is None or right is None:
        return None
    found = sides(kernel.axes, kernel.reduced, left.access.strides, right.access.strides)
    if found is None:
        return None
    batch, rows, columns, inner = found
    if kernel.stores[0].access.strides[rows] == 1:  # what lies along the lanes is written
        left, right, rows, columns = right, left, columns, rows
    return Contraction(total, left, right, batch, rows, columns, inner)


def _loaded(factor: Expr) -> Load | None:
    """What a factor is read as: float32, or what is widened to it."""
    match factor:
        case Op("convert_element_type", (Load(dtype=dtype) as load,)) if dtype in HALVES:
            pass
        case Load(dtype=torch.float32) as load:
            pass
        case _:
            return None
    return None if load.guards or load.access.indirect else load


def sides(
    axes: Sequence[int], reduced: Sequence[bool], left: Sequence[int], right: Sequence[int]
) -> tuple[tuple[int, ...], int, int, int] | None:
    """The axes of a product whose factors move by these strides: of its batch, rows, columns, and the inner one."""
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    for a, n in enumerate(axes):
        if n > 1:
            kinds.setdefault((reduced[a], bool(left[a]), bool(right[a])), []).append(a)
    batch = kinds.pop((False, True, True), [])
    match [kinds.pop(kind, []) for kind in ((False, True, False), (False, False, True), (True, True, True))]:
        case [[rows], [columns], [inner]] if not kinds and min(axes[rows], axes[columns]) >= NARROW:
            return tuple(batch), rows, columns, inner
    return None


def factors(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a sum that is computed as a product of matrices reads: its factors, views apart. Empty for others."""
    if prim(node) != "sum" or value(node).dtype is not torch.float32:
        return ()
    made: Any = node.args[0]
    operands: tuple[Any, ...] = made.args
    if prim(made) != "mul" or len(made.users) > 1 or not all(isinstance(n, fx.Node) for n in operands):
        return ()
    shape, axes = tuple(value(made).shape), reduced_axes(node)
    alike = all(value(n).shape == shape and value(n).dtype is torch.float32 for n in operands)
    if not alike or value(made).numel() <= LARGEST:
        return ()
    left, right = (value(n).stride() for n in operands)
    if sides(shape, [a in axes for a in range(len(shape))], left, right) is None:
        return ()
    return tuple(map(_base, operands))


def widens(node: Any) -> bool:
    """Whether a node makes wider numbers of 16-bit ones, each of its own."""
    if prim(node) != "convert_element_type":
        return False
    t = value(node.args[0])
    return t.dtype in HALVES and all(s or n == 1 for s, n in zip(t.stride(), t.shape, strict=True))


def _base(node: Any) -> fx.Node:
    """What memory a factor is read from; it may be widened as it is read."""
    while prim(node) in VIEWS or (value(node).dtype is torch.float32 and widens(node)):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of a product.

    Attributes:
        depth: elements that are added up in one go.
        rows, columns: of a unit.
        units: how many units there are.
    """

    depth: int
    rows: int
    columns: int
    units: int


def tile(target: Target) -> tuple[int, int]:
    """Rows and columns of the tile that is kept in registers; two vectors of columns, which a panel holds."""
    lanes = target.lanes("f32")
    many = lanes > 8 or target.triple.startswith("aarch64")
    return 8 if many else 6, 2 * lanes


def blocks(target: Target, batch: Sequence[int], rows: int, columns: int, inner: int) -> Blocks:
    """For a target, and sizes of a product."""
    height, width = tile(target)
    block = _even(rows, ROWS, height)
    others = math.prod(batch) * -(-rows // block)
    panels = -(-columns // width)
    most = max(1, SUMS // (block * width))
    least = min(PANELS, max(1, panels * others // PROCESSORS))
    per = _even(panels, min(most, max(least, panels * others // (UNITS * PROCESSORS))), 1)
    depth = _even(inner, min(DEPTH, PANEL_BYTES // (4 * width)), 8)
    return Blocks(depth, block, per * width, others * -(-panels // per))


def _even(size: int, most: int, step: int) -> int:
    """Of how many, a multiple of `step`, each part is, where parts of at most so many are about even."""
    parts = -(-size // max(most, step))
    return -(-size // (parts * step)) * step
