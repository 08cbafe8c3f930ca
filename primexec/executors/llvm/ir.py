"""The loop IR: kernels over an iteration domain, whose operands are reached by affine maps of it.

A kernel runs its statements for every point of its domain. Reduced axes are walked in passes: what a reduction gives
is known after its pass, and what uses it belongs to a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False, slots=True)
class Access:
    """Where an operand's element lies: `offset + Σ strides[a] · i_a` elements from its start, over the axes a.

    What `indirect` holds, factors and indices that are data, is added to that.
    """

    buffer: int
    offset: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    indirect: tuple[tuple[int, Expr], ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Load:
    """The element of a buffer that belongs to the point; where a guard is false there is none, and 0 in its place."""

    access: Access
    dtype: torch.dtype
    guards: tuple[Within, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Index:
    """`offset + Σ strides[a] · i_a` itself, and what `indirect` adds to it, as an int64."""

    offset: int
    strides: tuple[int, ...]
    indirect: tuple[tuple[int, Expr], ...] = ()
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, eq=False, slots=True)
class Within:
    """Whether `low ≤ index < high`, for an index as in Index."""

    offset: int
    strides: tuple[int, ...]
    indirect: tuple[tuple[int, Expr], ...]
    low: int
    high: int
    dtype: torch.dtype = torch.bool


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """An index that is data, as an int64 inside of [0, size); one outside is reported, and 0 taken in its place.

    Attributes:
        wraps: whether negative ones count from the end.
        check: number under which it is reported.
        guards: where one is false nothing is reported.
    """

    arg: Expr
    size: int
    wraps: bool
    check: int
    guards: tuple[Within, ...] = ()
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, eq=False, slots=True)
class Const:
    """A number."""

    value: Any
    dtype: torch.dtype


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """A pointwise prim, by its name, of values at the same point."""

    prim: str
    args: tuple[Expr, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False, slots=True)
class Reduce:
    """`sum`, `prod`, `amax` or `amin` of a value over the reduced axes.

    Attributes:
        rounded: whether a float64 sum is one of narrower numbers, of which nothing shows that is not rounded to such.
    """

    kind: str
    arg: Expr
    dtype: torch.dtype
    rounded: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Scan:
    """`sum`, `prod`, `amax`, `amin` or `logaddexp` of a value at the points of the ordered axis up to this one."""

    kind: str
    arg: Expr
    dtype: torch.dtype


Expr = Scan | Load | Index | Within | Place | Const | Op | Reduce


@dataclass(frozen=True, eq=False, slots=True)
class Store:
    """A write of a value, at every point or, where it does not depend on the reduced axes, once for all of them.

    Attributes:
        how: the pointwise prim that joins the value with what stands there; empty where it takes its place.
    """

    access: Access
    value: Expr
    how: str = ""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A loop nest.

    Attributes:
        name: made of the names of its operators.
        axes: sizes of the domain.
        reduced: which axes the reductions run over.
        stores: what it writes.
        ordered: whether the reduced axes are not reduced but walked point by point, from the first axis to the last.
        sources: the user's lines that it comes from.
        why: how it came to be: what was joined, what is kept in memory.
    """

    name: str
    axes: tuple[int, ...]
    reduced: tuple[bool, ...]
    stores: tuple[Store, ...]
    sources: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    ordered: bool = False

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def operands(e: Expr) -> tuple[Expr, ...]:
    """The values that a value is computed from."""
    match e:
        case Op(_, args):
            return args
        case Reduce(_, arg) | Scan(_, arg):
            return (arg,)
        case Place(arg, guards=guards):
            return (arg, *guards)
        case Load(Access(indirect=indirect), guards=guards):
            return (*(i for _, i in indirect), *guards)
        case Index(indirect=indirect) | Within(indirect=indirect):
            return tuple(i for _, i in indirect)
    return ()


def roots_of(kernel: Kernel) -> tuple[Expr, ...]:
    """All that a kernel's stores are computed from directly: values, and indices that are data."""
    return tuple(e for s in kernel.stores for e in (*(i for _, i in s.access.indirect), s.value))


def walk(roots: tuple[Expr, ...]) -> list[Expr]:
    """All values below the roots, operands before users, each once."""
    seen: set[int] = set()
    order: list[Expr] = []

    def visit(e: Expr) -> None:
        if id(e) in seen:
            return
        seen.add(id(e))
        for operand in operands(e):
            visit(operand)
        order.append(e)

    for root in roots:
        visit(root)
    return order


def stages(kernel: Kernel) -> dict[int, int]:
    """For each value, by id, the pass over the reduced axes in which it is first known; a reduction's is the next."""
    found: dict[int, int] = {}
    for e in walk(roots_of(kernel)):
        below = max((found[id(o)] for o in operands(e)), default=0)
        found[id(e)] = below + 1 if isinstance(e, Reduce) else below
    return found


def _affine(
    offset: int, strides: tuple[int, ...], indirect: tuple[tuple[int, Expr], ...], names: dict[int, str]
) -> str:
    terms = [f"i{a}" if s == 1 else f"{s}*i{a}" for a, s in enumerate(strides) if s]
    terms += [names[id(i)] if f == 1 else f"{f}*{names[id(i)]}" for f, i in indirect]
    return " + ".join([*terms, *([str(offset)] if offset or not terms else [])])


def _lines(kernel: Kernel) -> Iterator[str]:
    """The kernel as loops: `b3[...]` is the third buffer, `v7` a value."""
    yield f"kernel {kernel.name}"
    for line in (*kernel.sources, *kernel.why):
        yield f"  # {line}"
    depth = 1
    for axis, size in enumerate(kernel.axes):
        if not kernel.reduced[axis]:
            yield "  " * depth + f"for i{axis} in {size}:"
            depth += 1
    stage, names = stages(kernel), dict[int, str]()
    values = walk(roots_of(kernel))
    reduced = [a for a, r in enumerate(kernel.reduced) if r]
    if kernel.ordered:
        for a in reduced:
            yield "  " * depth + f"for i{a} in {kernel.axes[a]}, in order:"
            depth += 1
        reduced = []
    inner = "".join(f"for i{a} in {kernel.axes[a]}: " for a in reduced)
    for e in values:
        names[id(e)] = f"v{len(names)}"
        uses = ", ".join(names[id(o)] for o in operands(e))
        dtype = str(e.dtype).removeprefix("torch.")
        match e:
            case Load(access):
                text = f"b{access.buffer}[{_affine(access.offset, access.strides, access.indirect, names)}]"
                text += "".join(f" if {names[id(g)]}" for g in e.guards)
            case Index(offset, strides, indirect):
                text = _affine(offset, strides, indirect, names)
            case Within(offset, strides, indirect, low, high):
                text = f"{low} <= {_affine(offset, strides, indirect, names)} < {high}"
            case Place(_, size, wraps):
                text = f"place({uses}) in {size}" + (", negative from the end" if wraps else "")
            case Const(value):
                text = repr(value)
            case Op(prim):
                text = f"{prim}({uses})"
            case Scan(kind):
                text = f"{kind} of {uses} so far"
            case Reduce(kind):
                text = f"{kind}({inner}{uses})"
        yield "  " * depth + f"{names[id(e)]}: {dtype} = {text}" + (f"  # pass {stage[id(e)]}" if reduced else "")
    for s in kernel.stores:
        place = f"b{s.access.buffer}[{_affine(s.access.offset, s.access.strides, s.access.indirect, names)}]"
        found = names[id(s.value)]
        yield "  " * depth + f"{place} = {f'{s.how}({place}, {found})' if s.how else found}"


def never_positive(v: Expr) -> bool:
    """Whether a value is a difference to the largest of its kind, and so never positive."""
    if not isinstance(v, Op) or v.prim != "sub":
        return False
    value, maximum = v.args
    return isinstance(maximum, Reduce) and maximum.kind == "amax" and maximum.arg is value


def is_share(v: Expr) -> bool:
    """Whether a value is a quotient of numbers of at most 1 and a sum of such of which one is 1, or NaN."""
    match v:
        case Op("div", (Op("exp", (power,)), Reduce("sum", Op("exp", (other,))))):
            return never_positive(power) and never_positive(other)
    return False


def never_negative(v: Expr) -> bool:
    """Whether a value is an exponential or a square: without a sign, NaN apart, with a rounding error of its own."""
    return isinstance(v, Op) and (v.prim in ("exp", "exp2") or (v.prim == "mul" and v.args[0] is v.args[1]))
