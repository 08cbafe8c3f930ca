"""Exponentials, logarithms, hyperbolic functions, error functions."""

from __future__ import annotations

import math

from primexec.executors.llvm.emit import Value, round_f32
from primexec.executors.llvm.vmath.constants import (
    ERF,
    ERF_PIECES,
    ERFCX,
    LOG,
    ROOT_ERFC,
    SINH,
    TANH_COARSE,
    TANH_PIECES,
)
from primexec.executors.llvm.vmath.core import (
    EXP_RANGE,
    LN2,
    exp,
    exp_reduced,
    expm1,
    format_of,
    horner,
    in_pairs,
    integer,
    log,
    log1p,
    log1p_reduced,
    log_rounded,
    log_specials,
    looked_up,
    narrowed,
    nearest,
    powers,
    reduce_exp,
    scale,
    scaled,
    split,
)

HUGE = 2.0**28


def exp2(x: Value) -> Value:
    low, high = (limit / LN2 for limit in EXP_RANGE[x.element])
    x = x.at_most(math.ceil(high))
    if x.e.target.has_scaling:
        n = x.intrinsic("roundeven")
        return scaled(x.compare("uge", low).select(exp_reduced((x - n) * LN2), 0.0), n)
    x = x.at_least(math.floor(low))
    magic = format_of(x).magic
    shifted = x + magic
    reduced = reduce_exp((x - (shifted - magic)) * LN2)  # below half of ln 2: its own n is 0
    return scale(reduced.mantissa, integer(shifted.bits(), x.element) + reduced.n)


def log2(x: Value) -> Value:
    return _log_to_base(x, 1.0 / LN2, 1.0)


def log10(x: Value) -> Value:
    return _log_to_base(x, 1.0 / math.log(10.0), 0x4D10 / 2.0**16)


def _log_to_base(x: Value, factor: float, step: float) -> Value:
    """log(x) * factor, where factor * log(2) is `step` and little more; its product with any exponent is exact.

    float32 sums the two large terms without loss, so that the logarithm of a power of the base is exact.
    """
    exponent, mantissa = split(x)
    f, rest_of_step = mantissa - 1.0, factor * LN2 - step
    if x.element == "f64":
        low = exponent.muladd(rest_of_step, log1p_reduced(f) * factor)
        return log_specials(x, exponent.muladd(step, low))
    slope = round_f32(factor)
    linear = f * slope
    lost = f.fma(slope, -linear)
    whole = exponent * step
    total = whole + linear
    lost = lost + (linear - (total - whole))
    rest = f.muladd(factor - slope, exponent * rest_of_step if abs(rest_of_step) > 1e-12 else lost.const(0.0))
    curved = (f * f).muladd(horner(f, [c * factor for c in LOG["f32"]]), rest)
    return log_specials(x, total + (curved + lost))


Pieces = tuple[float, float, tuple[tuple[float, ...], ...]]


def in_pieces(x: Value, pieces: Pieces, high: float) -> Value:
    """An odd function, float32: around each multiple of a width a polynomial, whose coefficients are looked up.

    What rounding the slope at zero lost is added to the last coefficient there, which is 0.
    """
    width, lost, columns = pieces
    t = x.abs().at_most(high)
    nearest_piece, number = nearest(t, 1.0 / width)
    u = nearest_piece.fma(-width, t)
    found = looked_up(columns[0], number)
    for column in columns[1:-1]:
        found = found.muladd(u, looked_up(column, number))
    last = looked_up(columns[-1], number)
    if lost:
        last = u.muladd(looked_up((lost, *[0.0] * (len(columns[0]) - 1)), number), last)
    return found.muladd(u, last).copysign(x)


def tanh_coarse(x: Value) -> Value:
    """float32 with a relative error of 2**-18, for what is rounded to half precision; polynomials in |x| itself."""
    if not x.e.target.has_tables:
        return tanh(x, coarse=True)
    width, columns = TANH_COARSE
    t = x.abs().at_most((len(columns[0]) - 0.51) * width)
    _, number = nearest(t, 1.0 / width)
    found = looked_up(columns[0], number)
    for column in columns[1:]:
        found = found.muladd(t, looked_up(column, number))
    return found.copysign(x)


def tanh(x: Value, coarse: bool = False) -> Value:
    """expm1(2|x|) / (expm1(2|x|) + 2): no cancellation anywhere, so one formula serves all arguments."""
    if not coarse and x.element == "f32" and x.e.target.has_tables:
        return in_pieces(x, TANH_PIECES, 9.02)
    t = x.abs()
    m, power = powers((t + t).at_most(18.5 if x.element == "f32" else 40.0), coarse=coarse)
    e = m.muladd(power, power - 1.0)
    return (e / (e + 2.0) if coarse else divide(e, e, 2.0)).copysign(x)


def divide(numerator: Value, small: Value, large: float) -> Value:
    """numerator / (small + large) for small below large; float32 corrects what rounding the sum lost."""
    denominator = small + large
    if numerator.element == "f64":
        return numerator / denominator
    lost = small - (denominator - large)
    inverse = 1.0 / denominator
    q = numerator * inverse
    rest = q.fma(-lost, q.fma(-denominator, numerator))
    return rest.fma(inverse, q)


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x)), by exp(-|x|), which cannot overflow."""
    e = exp(-x.abs(), nonpositive=True)
    return divide(x.compare("olt", 0.0).select(e, e.const(1.0)), e, 1.0)


def sinh(x: Value) -> Value:
    t = x.abs()
    if x.element == "f32":
        z = t * t
        near = (t * z).muladd(horner(z, SINH["f32"]), t)
    else:
        m = expm1(t.at_most(2.0))
        near = (m + m / (m + 1.0)) * 0.5
    half = exp(t, halvings=1)
    return t.compare("olt", 1.0).select(near, half - 0.25 / half).copysign(x)


def cosh(x: Value) -> Value:
    half = exp(x.abs(), halvings=1)
    return half + 0.25 / half


def asinh(x: Value) -> Value:
    t = x.abs()
    if x.element == "f32":
        far = narrowed(lambda t: log_rounded(t + t.fma(t, 1.0).intrinsic("sqrt")), t)
        return (t.compare("olt", 2.0**-13) | t.compare("uge", math.inf)).select(t, far).copysign(x)
    square = t * t
    near = log1p(t + square / ((square + 1.0).intrinsic("sqrt") + 1.0))
    return t.compare("ogt", HUGE).select(log(t) + LN2, near).copysign(x)


def acosh(x: Value) -> Value:
    if x.element == "f32":
        value = narrowed(lambda x: log_rounded(x + x.fma(x, -1.0).intrinsic("sqrt")), x)
        value = x.compare("uge", math.inf).select(x, value)
    else:
        t = x - 1.0
        value = log1p(t + (t * (t + 2.0)).intrinsic("sqrt"))
        value = x.compare("ogt", HUGE).select(log(x) + LN2, value)
    return x.compare("olt", 1.0).select(math.nan, value)


def atanh(x: Value) -> Value:
    t = x.abs()
    if x.element == "f64":
        return (log1p(t * 2.0 / (1.0 - t)) * 0.5).copysign(x)
    value = narrowed(lambda t: log_rounded((t + 1.0) / (1.0 - t)) * 0.5, t)
    value = t.compare("olt", 2.0**-14).select(t, value)
    value = t.compare("oeq", 1.0).select(math.inf, value)
    return t.compare("ugt", 1.0).select(math.nan, value).copysign(x)


def erf(x: Value) -> Value:
    """float32: 1 - (1 - f / 2)² with f = t (1 + P(t)), for the root of 1 - erf(t) is smooth; errors of f never grow.

    float64: x + x P(x²) near zero; 1 - erfc beyond, which is small there, so that its errors count little.
    """
    if x.element == "f32" and x.e.target.has_tables:
        return in_pieces(x, ERF_PIECES, 3.93)
    t = x.abs()
    if x.element == "f32":
        t = t.at_most(3.96)
        f = t.muladd(in_pairs(t, ROOT_ERFC["f32"]), t)
        return (f * -0.25).muladd(f, f).signed_as(x)
    return t.compare("ogt", 1.0).select(1.0 - erfc_positive(t), erf_near_zero(t)).copysign(x)


def erf_near_zero(t: Value) -> Value:
    """erf of 0 <= t <= 1, float64."""
    return t.muladd(horner(t * t, ERF["f64"]), t)


def erfc_positive(t: Value, accuracy: str = "f64") -> Value:
    """erfc of t >= 0, float64, or what is rounded to float32.

    exp(-t²) P(q) / (1 + 2t) with q = (t - 4) / (t + 4), after Shepherd and Laframboise (Mathematics of Computation 36,
    1981); what rounding t² lost is put back into the exponential's factor.
    """
    t = t.at_most(27.5)
    square = t * t
    lost = t.fma(t, -square)
    scaled = horner((t - 4.0) / (t + 4.0), ERFCX[accuracy]) / (t * 2.0 + 1.0)
    reduced = reduce_exp(-square, accuracy)
    corrected = scaled.fma(-lost, scaled)
    return scale(reduced.mantissa * corrected, reduced.n)


def erfc(x: Value, accuracy: str = "f64") -> Value:
    """float64, or what is rounded to float32."""
    positive = erfc_positive(x.abs(), accuracy)
    return x.compare("olt", 0.0).select(2.0 - positive, positive)


def rsqrt(x: Value) -> Value:
    return 1.0 / x.intrinsic("sqrt")


def sqrt(x: Value) -> Value:
    return x.intrinsic("sqrt")
