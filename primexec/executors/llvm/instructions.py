"""From prims to instructions: which prims there are for which dtypes, and how each is emitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from primexec.executors.llvm.emit import Value, joined, literal, picked, type_of
from primexec.executors.llvm.vmath import FUNCTIONS
from primexec.executors.llvm.vmath.core import in_registers

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOATS = frozenset({F32, F64, BF16, F16})
SIGNED = {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
UNSIGNED = {torch.uint8: "i8"}
INTEGERS = {**SIGNED, **UNSIGNED}
DTYPES = FLOATS | set(INTEGERS) | {torch.bool}
# How values are held in registers and in memory. Half precision is computed in float32 and rounded after every prim.
REGISTER = {**INTEGERS, F32: "f32", F64: "f64", BF16: "f32", F16: "f32", torch.bool: "i1"}
MEMORY = {**INTEGERS, F32: "f32", F64: "f64", BF16: "i16", F16: "f16", torch.bool: "i8"}
LIMITS = {"i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}

INTEGER_DIVISIONS = ("div", "fmod", "remainder")

Emit = Callable[..., Value]


def bits(dtype: torch.dtype) -> int:
    """Width of an integer dtype."""
    return torch.iinfo(dtype).bits


def constant(like: Value, dtype: torch.dtype, value: Any) -> Value:
    """A number as a scalar of the dtype's register type; `like` gives the place only."""
    element = REGISTER[dtype]
    if dtype in FLOATS:
        number = float(value)
        number = float(torch.tensor(number, dtype=torch.float64).to(dtype)) if dtype in (BF16, F16) else number
    elif dtype is torch.bool:
        number = bool(value)
    else:
        width = bits(dtype)
        number = (int(value) + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
    return Value(like.e, element, 1, literal(element, number))


def splat(v: Value, lanes: int) -> Value:
    """A scalar in every lane."""
    if v.lanes == lanes:
        return v
    if not v.name.startswith("%"):
        scalar = Value(v.e, v.element, 1, v.name).type
        return Value(v.e, v.element, lanes, f"splat ({scalar} {v.name})")
    vector = Value(v.e, v.element, lanes, "poison").type
    one = v.e.emit(f"insertelement {vector} poison, {v.type} {v.name}, i32 0")
    name = v.e.emit(f"shufflevector {vector} {one}, {vector} poison, <{lanes} x i32> zeroinitializer")
    return Value(v.e, v.element, lanes, name)


# Memory -------------------------------------------------------------------------------------------------


def _regrouped(v: Value, element: str, lanes: int) -> Value:
    """The same bits as elements of another size."""
    return Value(v.e, element, lanes, v.e.emit(f"bitcast {v.type} {v.name} to {type_of(element, lanes)}"))


def from_memory(v: Value, dtype: torch.dtype, apart: bool = False) -> Value:
    """What was loaded, as it is held in registers; `apart`: bfloat16 at even places, then those at odd ones."""
    if dtype is BF16 and apart and v.lanes > 2:
        pairs = _regrouped(v, "i32", v.lanes // 2)
        return joined([(pairs << 16).as_float(), (pairs & -65536).as_float()])
    if dtype is BF16:
        return (v.cast("zext", "i32") << 16).as_float()
    if dtype is F16:
        return v.cast("fpext", "f32")
    return v.compare("ne", 0) if dtype is torch.bool else v


def to_memory(v: Value, dtype: torch.dtype, apart: bool = False) -> Value:
    """A register value as it is stored; half precision values are exact in their dtype already; `apart` as above."""
    if dtype is BF16 and apart and v.lanes > 2:
        even, odd = (picked(v.bits(), range(k, k + v.lanes // 2)) for k in (0, v.lanes // 2))
        return _regrouped(even._op("lshr", 16) | (odd & -65536), "i16", v.lanes)
    if dtype is BF16:
        return v.bits()._op("lshr", 16).cast("trunc", "i16")
    if dtype is F16:
        return v.cast("fptrunc", "f16")
    return v.cast("zext", "i8") if dtype is torch.bool else v


def _half(b: Value) -> Value:
    """Half a bfloat16's last place for float32 bits, and less than that by one bit of float32 where that place is 0."""
    if b.e.target.has_word_sums and b.lanes >= 16:
        return in_registers(_sum_of_words, (16,), (b & 0x10000) | 0x7FFF)
    return ((b >> 16) & 1) + 0x7FFF


def _sum_of_words(b: Value) -> Value:
    """Both 16-bit halves of each number added; where that is added to another number, one instruction with AVX-512."""
    words = _regrouped(b, "i16", 2 * b.lanes)
    operands = [(words.type, words.name), (words.type, words.const(1).name)]
    return Value(b.e, b.element, b.lanes, b.e.call(b.type, "llvm.x86.avx512.pmaddw.d.512", operands))


def rounded(v: Value, dtype: torch.dtype, short: bool = False) -> Value:
    """A float32 value rounded to half precision, to nearest even, and held as float32 again.

    `short` promises that a NaN has no bits beyond half precision, so that rounding cannot make it a number.
    """
    if dtype is F16:
        return v.cast("fptrunc", "f16").cast("fpext", "f32")
    if dtype is BF16:
        b = v.bits()
        up = (b + _half(b)) & -65536
        return up.as_float() if short else v.is_nan().select(b.const(0x7FC00000), up).as_float()
    return v


# Conversion ---------------------------------------------------------------------------------------------


def convert(v: Value, source: torch.dtype, target: torch.dtype, short: bool = False) -> Value:
    """`convert_element_type`, as eager does it on x86: out of range floats become the smallest integer.

    `short` as in `rounded`.
    """
    if source == target:
        return v
    if target is torch.bool:
        return v.compare("une" if v.is_float else "ne", 0)
    wanted = REGISTER[target]
    if source in FLOATS:
        if target in FLOATS:
            if v.element != wanted:
                v = v.cast("fpext" if wanted == "f64" else "fptrunc", wanted)
            return rounded(v, target, short)
        return _float_to_integer(v, wanted)
    unsigned = source in UNSIGNED or source is torch.bool
    if target in FLOATS:
        return rounded(v.cast("uitofp" if unsigned else "sitofp", wanted), target)
    have, want = 1 if source is torch.bool else bits(source), bits(target)
    if have == want:
        return v
    return v.cast("trunc" if want < have else "zext" if unsigned else "sext", wanted)


def _float_to_integer(v: Value, wanted: str) -> Value:
    wide = "i64" if wanted == "i64" else "i32"
    low, high = LIMITS[wide]
    edge = float(high) + (1.0 if wide == "i32" else 0.0)  # 2**31 or 2**63, exact in both formats
    inside = v.compare("oge", float(low)) & v.compare("olt", edge)
    whole = inside.select(v, 0.0).cast("fptosi", wide)
    found = inside.select(whole, low)
    return found if wide == wanted else found.cast("trunc", wanted)


# Pointwise prims ----------------------------------------------------------------------------------------


def _compare(floats: str, signed: str, unsigned: str) -> Callable[[torch.dtype], Emit]:
    def chosen(dtype: torch.dtype) -> Emit:
        how = floats if dtype in FLOATS else signed if dtype in SIGNED else unsigned
        return lambda a, b: a.compare(how, b)

    return chosen


COMPARISONS = {
    "eq": _compare("oeq", "eq", "eq"),
    "ne": _compare("une", "ne", "ne"),
    "lt": _compare("olt", "slt", "ult"),
    "le": _compare("ole", "sle", "ule"),
    "gt": _compare("ogt", "sgt", "ugt"),
    "ge": _compare("oge", "sge", "uge"),
}


def _larger(how: str) -> Callable[[torch.dtype], Emit]:
    def chosen(dtype: torch.dtype) -> Emit:
        predicate = ("s" if dtype in SIGNED else "u") + how
        return lambda a, b: a.compare(predicate, b).select(a, b)

    return chosen


def _shift(name: str) -> Callable[[torch.dtype], Emit]:
    """Shifts by a negative number or by the width and more: 0 to the left, the sign to the right."""

    def chosen(dtype: torch.dtype) -> Emit:
        width = bits(dtype)
        instruction = {"shift_left": "shl"}.get(name, "ashr" if dtype in SIGNED else "lshr")
        beyond = width - 1 if instruction == "ashr" else 0

        def emit(a: Value, b: Value) -> Value:
            outside = b.compare("uge", width)
            by = outside.select(b.const(beyond), b)
            moved = a._op(instruction, by)
            return moved if instruction == "ashr" else outside.select(moved.const(0), moved)

        return emit

    return chosen


def _divide(name: str) -> Callable[[torch.dtype], Emit]:
    """Division by a number that is not 0; by -1 no instruction divides, for the smallest integer would trap."""

    def chosen(dtype: torch.dtype) -> Emit:
        sign = "s" if dtype in SIGNED else "u"

        def emit(a: Value, b: Value) -> Value:
            minus_one = b.compare("eq", -1)
            by = minus_one.select(b.const(1), b) if dtype in SIGNED else b
            if name == "div":
                quotient = a._op(f"{sign}div", by)
                return minus_one.select(-a, quotient) if dtype in SIGNED else quotient
            rest = a._op(f"{sign}rem", by)
            if name == "fmod" or dtype not in SIGNED:
                return rest
            behind = rest.compare("ne", 0) & (rest ^ by).compare("slt", 0)
            return behind.select(rest + by, rest)

        return emit

    return chosen


def _sign(dtype: torch.dtype) -> Emit:
    if dtype in UNSIGNED or dtype is torch.bool:
        return lambda a: a.compare("ne", 0).select(a.const(1), a.const(0))
    return lambda a: a.compare("sgt", 0).select(a.const(1), a.compare("slt", 0).select(a.const(-1), a.const(0)))


def _same(emit: Emit) -> Callable[[torch.dtype], Emit]:
    return lambda dtype: emit


_INTEGER: dict[str, Callable[[torch.dtype], Emit]] = {
    "add": _same(lambda a, b: a + b),
    "sub": _same(lambda a, b: a - b),
    "mul": _same(lambda a, b: a * b),
    "neg": _same(lambda a: -a),
    "abs": lambda dtype: (lambda a: a.abs()) if dtype in SIGNED else (lambda a: a),
    "bitwise_and": _same(lambda a, b: a & b),
    "bitwise_or": _same(lambda a, b: a | b),
    "bitwise_xor": _same(lambda a, b: a ^ b),
    "bitwise_not": _same(lambda a: ~a),
    "shift_left": _shift("shift_left"),
    "shift_right_arithmetic": _shift("shift_right_arithmetic"),
    **{name: _divide(name) for name in INTEGER_DIVISIONS},
    "maximum": _larger("gt"),
    "minimum": _larger("lt"),
    "fmax": _larger("gt"),
    "fmin": _larger("lt"),
    "sign": _sign,
    "signbit": lambda dtype: lambda a: a.compare("slt" if dtype in SIGNED else "ult", 0),
    **dict.fromkeys(("ceil", "floor", "round", "trunc"), _same(lambda a: a)),
    "isfinite": _same(lambda a: a.compare("eq", a)),
    **COMPARISONS,
}
_BOOL: dict[str, Callable[[torch.dtype], Emit]] = {
    **dict.fromkeys(("add", "bitwise_or", "maximum", "fmax"), _same(lambda a, b: a | b)),
    **dict.fromkeys(("mul", "bitwise_and", "minimum", "fmin"), _same(lambda a, b: a & b)),
    "bitwise_xor": _same(lambda a, b: a ^ b),
    "bitwise_not": _same(lambda a: a ^ 1),
    "isfinite": _same(lambda a: a.compare("eq", a)),
    **COMPARISONS,
}
_FLOAT: dict[str, Callable[[torch.dtype], Emit]] = {
    "add": _same(lambda a, b: a + b),
    "sub": _same(lambda a, b: a - b),
    "mul": _same(lambda a, b: a * b),
    "div": _same(lambda a, b: a / b),
    "isfinite": _same(lambda a: a.abs().compare("olt", math.inf)),
    "signbit": _same(lambda a: a.bits().compare("slt", 0)),
    **COMPARISONS,
}
COPIES = frozenset({"clone", "device_put"})
NEIGHBOURS = frozenset({"nextafter"})  # half precision is held as float32, whose neighbours are others
REDUCTIONS = frozenset({"sum", "prod", "amax", "amin"})
# What costs an order of magnitude more than an addition.
DEAR = frozenset(n for n, _ in FUNCTIONS) - {
    "abs", "ceil", "floor", "fmax", "fmin", "maximum", "minimum", "neg", "round", "sign", "trunc", "sqrt", "reciprocal",
}  # fmt: skip


def pointwise(prim: str, dtype: torch.dtype) -> Emit | None:
    """How a prim with operands of this dtype is emitted; None where it is not."""
    if prim in NEIGHBOURS and dtype in (BF16, F16):
        return None
    if dtype is torch.bool:
        made = _BOOL.get(prim)
    elif dtype in INTEGERS:
        made = _INTEGER.get(prim)
    else:
        made = _FLOAT.get(prim)
        function = FUNCTIONS.get((prim, REGISTER[dtype]))
        if made is None and function is not None:
            return function
    return made(dtype) if made is not None else None
