"""Functions of two arguments, and what needs no more than an instruction or two."""

from __future__ import annotations

import math

from primexec.executors.llvm.emit import Value, unlikely
from primexec.executors.llvm.vmath.constants import EXP
from primexec.executors.llvm.vmath.core import FORMATS, LN2, horner, library, log1p_rounded, split

LARGEST_QUOTIENT = {"f32": 2.0**23, "f64": 2.0**52}


def power(x: Value, y: Value) -> Value:
    """float32: 2**(y log2|x|) in float64, rounded once, with C's answers for the special cases."""
    if x.element == "f64":
        return library("pow", x, y)
    t = x.abs()
    exponent, mantissa = split(t)
    exponent = t.compare("oeq", math.inf).select(math.inf, exponent)
    exponent = t.compare("oeq", 0.0).select(-math.inf, exponent)
    f = (mantissa - 1.0).cast("fpext", "f64")
    logarithm = log1p_rounded(f).muladd(1.0 / LN2, exponent.cast("fpext", "f64"))
    product = (y.cast("fpext", "f64") * logarithm).at_most(200.0).at_least(-200.0)
    zero = FORMATS["f64"].magic + FORMATS["f64"].bias  # so that a shift makes the power
    shifted = product + zero
    r = (product - (shifted - zero)) * LN2
    m = (r * r).muladd(horner(r, EXP["rounded"]), r) + 1.0
    value = (m * (shifted.bits() << FORMATS["f64"].mantissa).as_float()).cast("fptrunc", "f32")
    value = t.compare("oeq", 1.0).select(1.0, value)
    whole = y.intrinsic("floor").compare("oeq", y)
    half = y * 0.5
    odd = whole & half.intrinsic("floor").compare("one", half)
    value = (x.bits().compare("slt", 0) & odd).select(-value, value)
    value = (x.compare("olt", 0.0) & x.compare("une", -math.inf) & ~whole).select(math.nan, value)
    value = x.is_nan().select(x, y.is_nan().select(y, value))
    return (y.compare("oeq", 0.0) | x.compare("oeq", 1.0)).select(1.0, value)


def fmod(x: Value, y: Value) -> Value:
    """Exact: rounding can only make the quotient's integer part one too large, and what is left is representable."""
    a, b = x.abs(), y.abs()
    quotient = a / b
    q = quotient.intrinsic("trunc")
    r = (-q).fma(b, a)
    r = r.compare("olt", 0.0).select(r + b, r).copysign(x)
    hard = quotient.compare("uge", LARGEST_QUOTIENT[x.element]) | b.compare("oeq", math.inf)
    return unlikely(hard, r, lambda: Value(x.e, x.element, x.lanes, x.e.emit(f"frem {x.type} {x.name}, {y.name}")))


def remainder(x: Value, y: Value) -> Value:
    """Python's: with the divisor's sign."""
    r = fmod(x, y)
    differs = r.compare("olt", 0.0) ^ y.compare("olt", 0.0)
    return (r.compare("une", 0.0) & differs).select(r + y, r)


def hypot_f32(x: Value, y: Value) -> Value:
    """float32 operands widened to float64, whose squares cannot overflow."""
    root = (x * x + y * y).intrinsic("sqrt")
    infinite = x.abs().compare("oeq", math.inf) | y.abs().compare("oeq", math.inf)
    return infinite.select(math.inf, root)


def hypot_f64(x: Value, y: Value) -> Value:
    """float64, scaled by a power of two where the squares would leave the range."""
    a, b = x.abs(), y.abs()
    larger = maximum(a, b)
    huge, tiny = larger.compare("ogt", 2.0**500), larger.compare("olt", 2.0**-400)
    factor = huge.select(larger.const(2.0**-600), tiny.select(larger.const(2.0**600), 1.0))
    inverse = huge.select(larger.const(2.0**600), tiny.select(larger.const(2.0**-600), 1.0))
    a, b = a * factor, b * factor
    root = a.fma(a, b * b).intrinsic("sqrt") * inverse
    infinite = x.abs().compare("oeq", math.inf) | y.abs().compare("oeq", math.inf)
    return infinite.select(math.inf, root)


def nextafter(x: Value, y: Value) -> Value:
    bits = x.bits()
    away = (x.compare("olt", y)) ^ (x.compare("olt", 0.0))  # from zero: towards y's side
    stepped = (bits + away.select(bits.const(1), -1)).as_float()
    tiny = bits.const(1).as_float().copysign(y)
    value = x.compare("oeq", 0.0).select(tiny, stepped)
    value = x.compare("oeq", y).select(y, value)
    return x.is_nan().select(x, y.is_nan().select(y, value))


def maximum(x: Value, y: Value) -> Value:
    """NaN where either is."""
    larger = x.compare("ogt", y).select(x, y)
    return x.is_nan().select(x, larger)


def minimum(x: Value, y: Value) -> Value:
    smaller = x.compare("olt", y).select(x, y)
    return x.is_nan().select(x, smaller)


def fmax(x: Value, y: Value) -> Value:
    """The other where one is NaN."""
    larger = x.compare("oge", y).select(x, y)
    return y.is_nan().select(x, larger)


def fmin(x: Value, y: Value) -> Value:
    smaller = x.compare("ole", y).select(x, y)
    return y.is_nan().select(x, smaller)


def sign(x: Value) -> Value:
    """-1, 0 or 1; 0 for NaN and both zeros, as eager has it."""
    one = x.const(1.0)
    return x.compare("ogt", 0.0).select(one, x.compare("olt", 0.0).select(-1.0, one.const(0.0)))


def reciprocal(x: Value) -> Value:
    return 1.0 / x
