"""Which values need no rounding to half precision, or a simpler one, and which are rounded to it anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from primexec.executors.llvm.instructions import BF16, COPIES, F32, FLOATS
from primexec.executors.llvm.ir import Const, Expr, Load, Op, Reduce, Store, never_positive, operands

# What returns an operand, its sign apart.
CHOICES = COPIES | {"abs", "fmax", "fmin", "maximum", "minimum", "neg", "where"}

# What keeps relative errors as they are, or nearly.
RELATIVE = CHOICES | {"mul", "div", "reciprocal", "rsqrt", "sqrt"}

LARGE = 2.0**-60  # far above all that is no normal number


def _drowns(v: Expr) -> bool:
    """Whether nothing is seen of operands that are no normal numbers, nor of 2**31 of them together."""
    match v:
        case Op("add", (Const(number), other) | (other, Const(number))):
            return bool(abs(number) >= LARGE) and not _below_one(other)
        case Reduce("sum", arg):
            return _below_one(arg)  # and 1 once
    return False


def _below_one(v: Expr) -> bool:
    """Whether a value is a power of at most 1."""
    return isinstance(v, Op) and v.prim == "exp" and never_positive(v.args[0])


class Precision:
    """What is known of the values of a kernel: all of them, operands before their uses, and what it stores."""

    def __init__(self, values: Sequence[Expr], stores: Sequence[Store]) -> None:
        self._short: dict[int, bool] = {}
        self._exact: dict[tuple[int, torch.dtype], bool] = {}
        self._positive: set[int] = set()
        for v in values:
            if self._has_no_sign(v):
                self._positive.add(id(v))
        self._seen = {id(s.value) for s in stores if s.value.dtype is F32}  # whose relative errors are seen
        self._tiny = {id(s.value) for s in stores}  # of which it is seen how small they are
        for v in values:
            if not _drowns(v):
                self._tiny.update(id(o) for o in operands(v))
        for v in reversed(values):
            if not self._hides(v):
                self._seen.update(id(o) for o in operands(v))

    def coarse(self, v: Expr) -> bool:
        """Whether a relative error is seen only in what is rounded to half precision, and about as large there."""
        return v.dtype.itemsize < F32.itemsize or id(v) not in self._seen

    def added(self, v: Expr) -> bool:
        """Whether a value is only added to what is far larger than any that has no normal number."""
        return id(v) not in self._tiny

    def not_below_one(self, v: Expr) -> bool:
        """Whether a value is known to be 1 or more, rounding apart, and so to have a reciprocal, or to be NaN."""
        match v:
            case Const(number):
                return bool(number >= 1)
            case Op("add", args):
                return id(v) in self._positive and any(self.not_below_one(a) for a in args)
            case Reduce("sum", arg):
                return _below_one(arg)  # and 1 once
        return False

    def _hides(self, v: Expr) -> bool:
        """Whether relative errors of operands become no larger, and are not seen or are lost in a rounding."""
        rounds = v.dtype in FLOATS and v.dtype.itemsize < F32.itemsize
        match v:
            case Op("convert_element_type"):
                return rounds
            case Op("add" | "log1p") | Reduce("sum"):
                kept = all(id(o) in self._positive for o in operands(v))
            case Op(prim):
                kept = prim in RELATIVE
            case _:
                kept = False
        return kept and (rounds or id(v) not in self._seen)

    def _has_no_sign(self, v: Expr) -> bool:
        """Whether a value is known to have none, NaN apart."""
        match v:
            case Const(number):
                return bool(number >= 0)
            case Op("abs" | "exp" | "exp2" | "sigmoid"):
                return True
            case Op("add" | "mul" | "div") | Reduce("sum"):
                return all(id(o) in self._positive for o in operands(v))
        return False

    def short(self, v: Expr) -> bool:
        """Whether a NaN has no bits beyond half precision: it comes from there, or from an instruction."""
        if id(v) not in self._short:
            own = v.dtype.itemsize < F32.itemsize or v.dtype not in FLOATS
            deeper = not isinstance(v, Load) and all(self.short(o) for o in operands(v))
            self._short[id(v)] = own or deeper
        return self._short[id(v)]

    def exact(self, v: Expr, dtype: torch.dtype) -> bool:
        """Whether a dtype of half precision holds a value as it is."""
        key = id(v), dtype
        if key not in self._exact:
            self._exact[key] = v.dtype == dtype or self._computed_exactly(v, dtype)
        return self._exact[key]

    def _computed_exactly(self, v: Expr, dtype: torch.dtype) -> bool:
        match v:
            case Const(number) if v.dtype in FLOATS:
                return float(torch.tensor(float(number), dtype=dtype)) == float(number)
            case Op("convert_element_type", (arg,)) if v.dtype is F32 and arg.dtype in FLOATS:
                return self.exact(arg, dtype)
            case Op("where", (_, yes, other)):
                return self.exact(yes, dtype) and self.exact(other, dtype)
            case Op(prim, args) if prim in CHOICES and v.dtype in FLOATS:
                return all(self.exact(a, dtype) for a in args)
            case Op("mul", (arg, Const(number))) if dtype is BF16 and v.dtype is F32:  # float32 overflows with it
                return abs(math.frexp(float(number))[0]) == 0.5 and abs(number) >= 1 and self.exact(arg, dtype)
        return False
