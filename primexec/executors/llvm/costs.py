"""What the values of a kernel cost to compute, and what of it is the same all along an axis."""

from __future__ import annotations

from primexec.executors.llvm.instructions import BF16, COPIES, DEAR, F16, FLOATS
from primexec.executors.llvm.ir import Const, Expr, Index, Kernel, Load, Op, Place, Within, operands, roots_of, walk
from primexec.executors.llvm.precision import CHOICES

# In additions of a vector.
DEAR_COST = 16
SLOW_COST = 4  # a division or a root
PLACE_COST = 8  # an index that is checked
GATHER_COST = 16
READ_COST = 2  # what is read again from the first cache
ROUNDING_COST = 5  # to half precision
KEPT = 8  # what is computed again rather than kept for later passes costs less
ROOTS = frozenset({"reciprocal", "rsqrt", "sqrt"})


def prim_cost(prim: str) -> int:
    """What one element of a pointwise prim costs."""
    return DEAR_COST if prim in DEAR else SLOW_COST if prim in ROOTS or prim == "div" else int(prim not in COPIES)


def cost(v: Expr) -> int:
    """What one value costs beyond its operands."""
    match v:
        case Op(prim):
            own = prim_cost(prim)
            return own + ROUNDING_COST if v.dtype in (BF16, F16) and prim not in CHOICES else own
        case Place():
            return PLACE_COST
        case Load(access):
            return GATHER_COST if access.indirect else 0
        case Index() | Within():
            return 1
    return 0


def depends(values: list[Expr], axis: int) -> set[int]:
    """The values, by id, that are not the same all along an axis."""
    found: set[int] = set()
    for v in values:
        steps = v.access.strides if isinstance(v, Load) else v.strides if isinstance(v, (Index, Within)) else ()
        if (steps and steps[axis]) or any(id(o) in found for o in operands(v)):
            found.add(id(v))
    return found


def shared(kernel: Kernel, lane: int, rows: int) -> list[Expr]:
    """What each row needs and all rows share, of what differs along the lanes; plain reads apart."""
    values = walk(roots_of(kernel))
    along, across = depends(values, lane), depends(values, rows)
    used = {id(o): o for v in values if id(v) in across for o in operands(v)} | {id(r): r for r in roots_of(kernel)}
    plain = (Const, Load)
    return [
        v for k, v in used.items() if k in along and k not in across and not (isinstance(v, plain) and not operands(v))
    ]


def saved(kernel: Kernel, lane: int, rows: int) -> int:
    """What rows that share values save, at each point, where these are computed once for all of them."""
    values = walk(roots_of(kernel))
    along, across = depends(values, lane), depends(values, rows)
    once = sum(cost(v) for v in values if id(v) in along and id(v) not in across)
    return once - READ_COST * len(shared(kernel, lane, rows))


def kept(values: list[Expr], again: set[int]) -> list[Expr]:
    """Of the values that several passes need (`again`, by id), those that are kept from the first one for the others.

    That is what is dear, and what ends a computation that costs as much.
    """
    ends = {id(o) for v in values if id(v) not in again for o in operands(v)}
    found: list[Expr] = []
    total: dict[int, int] = {}
    for v in values:
        if id(v) in again:
            work = cost(v) + sum(total.get(id(o), 0) for o in operands(v))
            long = id(v) in ends and work >= KEPT
            if isinstance(v, Op) and v.dtype in FLOATS and (v.prim in DEAR or long):
                found.append(v)
                work = 0
            total[id(v)] = work
    return found
