"""The pieces that the functions are made of: Horner's rule, exponential, logarithm and the scaling between.

Argument reductions after Cody and Waite (Software Manual for the Elementary Functions, 1980), with fused multiply-adds
after Markstein (IA-64 and Elementary Functions, 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from primexec.executors.llvm import sleef
from primexec.executors.llvm.emit import Value, joined, literal, picked, type_of
from primexec.executors.llvm.target import ELEMENT_BYTES
from primexec.executors.llvm.vmath.constants import EXP, EXP2, LOG, LOG_REMAINDER

LN2 = math.log(2.0)
INFINITY = math.inf


@dataclass(frozen=True, slots=True)
class Format:
    """What the algorithms need to know of a floating-point format."""

    mantissa: int  # stored bits
    bias: int
    magic: float  # 1.5 times the power of two whose last place is one: adding it rounds to an integer
    magic_bits: int
    smallest: float  # the smallest normal number
    ln2_high: float  # few enough bits that its product with any exponent is exact
    ln2_low: float


FORMATS = {
    "f32": Format(23, 127, 12582912.0, 0x4B400000, 2.0**-126, 0.693145751953125, 1.428606765330187e-06),
    "f64": Format(
        52,
        1023,
        6755399441055744.0,
        0x4338000000000000,
        2.0**-1022,
        6.93147180369123816490e-01,
        1.90821492927058770002e-10,
    ),
}


def format_of(x: Value) -> Format:
    return FORMATS[x.element]


def horner(x: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial in x, highest power first."""
    result = x.const(coefficients[0])
    for c in coefficients[1:]:
        result = result.muladd(x, c)
    return result


def in_pairs(x: Value, coefficients: Sequence[float]) -> Value:
    """The same for long polynomials in steps of two powers, so that half as many operations wait for each other."""
    square, odd = x * x, len(coefficients) % 2
    result = x.const(coefficients[0]) if odd else x.muladd(coefficients[0], coefficients[1])
    for high, low in zip(coefficients[2 - odd :: 2], coefficients[3 - odd :: 2], strict=True):
        result = result.muladd(square, x.muladd(high, low))
    return result


def nearest(x: Value, factor: float) -> tuple[Value, Value]:
    """The integer nearest to x * factor, as a float and (in the low bits, modulo 2**bits) as an integer.

    |x * factor| must stay below 2**21 (float32) or 2**50 (float64).
    """
    fmt = format_of(x)
    shifted = x.muladd(factor, fmt.magic)
    return shifted - fmt.magic, shifted.bits()


def power_of_two(exponent: Value, element: str) -> Value:
    """2**exponent of integers whose result is a normal number."""
    fmt = FORMATS[element]
    return ((exponent + fmt.bias) << fmt.mantissa).as_float()


def scale(x: Value, exponent: Value) -> Value:
    """x * 2**exponent, right also where the result is denormal or infinite; NaN stays NaN."""
    half = exponent >> 1
    return x * power_of_two(half, x.element) * power_of_two(exponent - half, x.element)


def integer(shifted: Value, element: str) -> Value:
    """The integer that `nearest` left in the low bits."""
    return shifted - FORMATS[element].magic_bits


@dataclass(frozen=True, slots=True)
class Reduced:
    """exp of an argument as (1 + r + r² p) * 2**n."""

    r: Value
    p: Value
    n: Value

    @property
    def mantissa(self) -> Value:
        return (self.r * self.r).muladd(self.p, self.r) + 1.0


def reduce_exp(x: Value, accuracy: str = "") -> Reduced:
    """For arguments of moderate size: 2**15 at most, or NaN."""
    fmt = format_of(x)
    n, shifted = nearest(x, 1.0 / LN2)
    r = n.fma(-fmt.ln2_low, n.fma(-fmt.ln2_high, x))
    return Reduced(r, horner(r, EXP[accuracy or x.element]), integer(shifted, x.element))


def powers(x: Value, offset: Value | int = 0, coarse: bool = False, short: bool = False) -> tuple[Value, Value]:
    """(m, p) with exp(x) = (1 + m) p / 2**offset, for x of moderate size; p is 2**(n + offset), a normal number.

    `coarse` as in `exp`; `short`: r in one step, whose error is 2e-9 for each halving of p. The exponent's bias rides
    on the constant that rounds to an integer, so that a shift makes p; a NaN is kept by m.
    """
    fmt = format_of(x)
    magic = offset if isinstance(offset, Value) else x.const(fmt.magic + fmt.bias + offset)
    shifted = x.muladd(1.0 / LN2, magic)
    n = shifted - magic
    r = n.muladd(-LN2, x) if coarse or short else n.fma(-fmt.ln2_low, n.fma(-fmt.ln2_high, x))
    m = (r * r).muladd(horner(r, EXP["coarse" if coarse else x.element]), r)
    return m, (shifted.bits() << fmt.mantissa).as_float()


Registers = tuple[int, ...]  # lanes of the vectors that an instruction or a function takes, widest first
_SCALED: dict[str, Registers] = {"f32": (16, 8, 4), "f64": (8, 4, 2)}


def in_registers(function: Callable[..., Value], widths: Registers, *operands: Value) -> Value:
    """A function of vectors of these widths, for vectors of any power of two; missing lanes are 0."""
    lanes, least = operands[0].lanes, widths[-1]
    if lanes < least:
        wide = [Value(v.e, v.element, least, "zeroinitializer").inserted(v) for v in operands]
        return picked(function(*wide), range(lanes))
    width = next(n for n in widths if lanes % n == 0)
    if lanes == width:
        return function(*operands)
    return joined([function(*(picked(v, range(k, k + width)) for v in operands)) for k in range(0, lanes, width)])


def narrowed(function: Callable[..., Value], *operands: Value) -> Value:
    """A float64 function; float32 operands are widened, and the result is rounded once."""
    if operands[0].element == "f64":
        return function(*operands)
    return function(*(v.cast("fpext", "f64") for v in operands)).cast("fptrunc", "f32")


def library(function: str, *operands: Value) -> Value:
    """A function of the C library, or SLEEF's of the same name."""
    first = operands[0]
    e, element = first.e, first.element
    if not e.target.has_sleef:
        return first.lanewise(function + ("f" if element == "f32" else ""), *operands[1:])

    def call(*vectors: Value) -> Value:
        vector = vectors[0]
        name = sleef.name_of(function, element, vector.lanes)
        return Value(e, element, vector.lanes, e.call(vector.type, name, [(v.type, v.name) for v in vectors]))

    return in_registers(call, (e.target.lanes(element),), *operands)


def scaled(x: Value, exponent: Value) -> Value:
    """x * 2**exponent, rounded once whatever the result, by the instruction of AVX-512; exponents are floats."""
    return in_registers(_scaled_register, _SCALED[x.element], x, exponent)


def _scaled_register(x: Value, exponent: Value) -> Value:
    bits = x.lanes * ELEMENT_BYTES[x.element] * 8
    mask = f"i{max(x.lanes, 8)}"
    operands = [(x.type, x.name), (x.type, exponent.name), (x.type, "poison"), (mask, "-1")]
    rounding = [("i32", "4")] if bits == 512 else []
    name = f"llvm.x86.avx512.mask.scalef.{'ps' if x.element == 'f32' else 'pd'}.{bits}"
    return Value(x.e, x.element, x.lanes, x.e.call(x.type, name, [*operands, *rounding]))


def exp_reduced(r: Value) -> Value:
    """exp of half of ln 2 at most, either way."""
    return r.muladd(r.muladd(horner(r, EXP[r.element]), 1.0), 1.0)


EXP_RANGE = {"f32": (-104.5, 89.0), "f64": (-746.0, 710.0)}
# Added to exponents, so that results below the normal numbers are rounded once, by the last product: as little as lets
# the exponent of the smallest number that is not rounded to 0 be a normal one's.
LIFT = {"f32": 25, "f64": 54}


def fraction(x: Value) -> Value:
    """What float32 are above the next integer below them; 0 for infinities."""

    def reduce(part: Value) -> Value:
        bits = 32 * part.lanes
        operands = [(part.type, part.name), ("i32", "1"), (part.type, "poison"), (f"i{max(part.lanes, 8)}", "-1")]
        rounding = [("i32", "4")] if bits == 512 else []
        name = part.e.call(part.type, f"llvm.x86.avx512.mask.reduce.ps.{bits}", [*operands, *rounding])
        return Value(part.e, part.element, part.lanes, name)

    return in_registers(reduce, _SCALED[x.element], x)


def exp(x: Value, halvings: int = 0, nonpositive: bool = False, coarse: bool = False, added: bool = False) -> Value:
    """exp(x) / 2**halvings, without an overflow on the way; `nonpositive` promises that no x is larger than 0.

    `added`: to what is so much larger that any number below the smallest normal one is as good as another; where no x
    is larger than 0, to a sum of at least 1, in which errors count the less the smaller the power is.
    Far below the smallest number it is 0 that is scaled: what underflows is slow (16 times, on processors of Intel).
    `coarse`: float32, with a relative error of 2**-16, as what is rounded to half precision allows.
    """
    fmt, (low, high) = format_of(x), EXP_RANGE[x.element]
    if x.e.target.has_scaling:
        some = x.compare("uge", low)
        if coarse:
            y = x * (1.0 / LN2)
            return scaled(some.select(horner(fraction(y), EXP2["coarse"]), 0.0), y)  # by 2 to the integer below y
        if added:
            x = x.at_least(1.0 - fmt.bias * LN2)
        if not nonpositive:
            x = x.at_most(high + halvings)
        n, _ = nearest(x, 1.0 / LN2)
        r = n.fma(-fmt.ln2_low, n.fma(-fmt.ln2_high, x))
        power = exp_reduced(r)
        return scaled(power if added else some.select(power, 0.0), n - float(halvings) if halvings else n)
    if added:
        x = x.at_least(1.0 - fmt.bias * LN2)
        if nonpositive:
            m, power = powers(x, coarse=coarse, short=x.element == "f32")
            return m.muladd(power, power)
        m, power = powers(x.at_most(high), -1, coarse)
        half = m.muladd(power, power)
        return half + half
    lift = LIFT[x.element]
    x = x.at_least(-(fmt.bias + lift) * LN2)
    offset: Value | int = lift
    factor = x.const(2.0 ** -(lift + halvings))
    if not nonpositive:
        x = x.at_most(high + halvings)
        below = x.bits().compare("slt", 0)
        zero = fmt.magic + fmt.bias
        offset = below.select(x.const(zero + lift), zero - 2 - halvings)
        factor = below.select(factor, 4.0)
    m, power = powers(x, offset, coarse)
    return m.muladd(power, power) * factor


def quotient(x: Value, y: Value, inverse: Value) -> Value:
    """x / y by the inverse of y, neither of them near the ends of their range; the remainder mends the last place."""
    found = x * inverse
    return (-found).fma(y, x).fma(inverse, found)


def looked_up(numbers: Sequence[float], index: Value) -> Value:
    """Of sixteen float32, those with these numbers, whose low four bits count; one instruction of AVX-512."""
    lanes = len(numbers)
    table = "<" + ", ".join(f"float {literal('f32', n)}" for n in numbers) + ">"

    def look_up(part: Value) -> Value:
        operands = [(type_of("f32", lanes), table), (part.type, part.name)]
        return Value(
            part.e, "f32", lanes, part.e.call(type_of("f32", lanes), "llvm.x86.avx512.permvar.sf.512", operands)
        )

    return in_registers(look_up, (lanes,), index)


def split(x: Value) -> tuple[Value, Value]:
    """(exponent as a float, mantissa around 1) of positive x; denormals too."""
    fmt = format_of(x)
    small = x.compare("olt", fmt.smallest)
    shift = float(fmt.mantissa)
    bits = small.select(x * 2.0**fmt.mantissa, x).bits()
    exponent = _exponent(bits, x.element)
    mantissa = (bits - (exponent << fmt.mantissa)).as_float()
    return exponent.cast("sitofp", x.element) + small.select(x.const(-shift), 0.0), mantissa


# Mantissas lie in [0.75, 1.5) for the float32 polynomial, in [sqrt(1/2), sqrt(2)) for the float64 one.
_LOWEST_MANTISSA = {"f32": 0x3F400000, "f64": 0x3FE6A09E667F3BCD}


def _exponent(bits: Value, element: str) -> Value:
    return (bits - _LOWEST_MANTISSA[element]) >> FORMATS[element].mantissa


def log1p_reduced(f: Value) -> Value:
    """log(1 + f) for a mantissa less one.

    float64 after fdlibm's e_log.c: s = f / (2 + f), log(1 + f) = f - (f²/2 - s (f²/2 + R(s²))).
    """
    if f.element == "f32":
        return (f * f).muladd(horner(f, LOG["f32"]), f)
    s = f / (f + 2.0)
    z = s * s
    half_square = f * f * 0.5
    return f - (half_square - s * (half_square + z * horner(z, LOG_REMAINDER["f64"])))


def log1p_rounded(f: Value) -> Value:
    """log(1 + f) for a float64 mantissa in [0.75, 1.5) less one, for results that are rounded to float32."""
    return (f * f).muladd(horner(f, LOG["rounded"]), f)


def log_rounded(x: Value) -> Value:
    """log of positive, finite and normal float64 numbers, for results that are rounded to float32."""
    bits, mantissa_bits = x.bits(), FORMATS["f64"].mantissa
    exponent = (bits - 0x3FE8000000000000) >> mantissa_bits
    f = (bits - (exponent << mantissa_bits)).as_float() - 1.0
    return exponent.cast("sitofp", "f64").muladd(LN2, log1p_rounded(f))


def add_exponent(exponent: Value, logarithm: Value) -> Value:
    """logarithm + exponent * ln 2."""
    if logarithm.element == "f32":
        return exponent.fma(LN2, logarithm)
    fmt = format_of(logarithm)
    return exponent.fma(fmt.ln2_high, exponent.fma(fmt.ln2_low, logarithm))


def log_specials(x: Value, result: Value) -> Value:
    """The result where x is positive and finite; -inf at zero, NaN below, x itself at infinity and NaN."""
    result = x.compare("ult", INFINITY).select(result, x)
    result = x.is_nan().select(x, result)
    result = x.compare("oeq", 0.0).select(-INFINITY, result)
    return x.compare("olt", 0.0).select(math.nan, result)


def log(x: Value) -> Value:
    exponent, mantissa = split(x)
    return log_specials(x, add_exponent(exponent, log1p_reduced(mantissa - 1.0)))


def log1p(x: Value) -> Value:
    """1 + x = 2**k (1 + f), with f formed from x itself so that nothing of a small x is lost."""
    fmt = format_of(x)
    u = x + 1.0
    k = _exponent(u.bits(), x.element)
    k_bits = k << fmt.mantissa
    inverse = (x.const(4.0).bits() - k_bits).as_float() * 0.25  # 2**-k, in two steps, for k may exceed the bias
    f = (x.bits() - k_bits).as_float() + (inverse - 1.0)  # where k is not 0, x is of moderate size
    result = add_exponent(k.cast("sitofp", x.element), log1p_reduced(f))
    result = log_specials(u, result)
    return x.compare("oeq", 0.0).select(x, result)


def expm1(x: Value) -> Value:
    low = -17.5 if x.element == "f32" else -38.0
    m, half = powers(x.at_most(EXP_RANGE[x.element][1]).at_least(low), -1)  # 2**n itself may overflow
    result = m.muladd(half, half - 0.5) * 2.0
    return result.copysign(x)
