"""Which values need no rounding to half precision, or a simpler one."""

from __future__ import annotations

import math

import torch

from primexec.executors.llvm.instructions import BF16, COPIES, F32, FLOATS
from primexec.executors.llvm.ir import Const, Expr, Load, Op, operands

# What returns an operand, its sign apart.
CHOICES = COPIES | {"abs", "fmax", "fmin", "maximum", "minimum", "neg", "where"}


class Precision:
    """What is known of the values of a kernel."""

    def __init__(self) -> None:
        self._short: dict[int, bool] = {}
        self._exact: dict[tuple[int, torch.dtype], bool] = {}

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
