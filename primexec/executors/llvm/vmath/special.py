"""Gamma functions, the inverse of the error function and the cube root, in float64."""

from __future__ import annotations

import math

from primexec.executors.llvm.emit import Value, unlikely
from primexec.executors.llvm.vmath.constants import ERF_INV_CENTRE, ERF_INV_TAIL
from primexec.executors.llvm.vmath.core import exp, horner, library, log, log_rounded, narrowed
from primexec.executors.llvm.vmath.elementary import erf_near_zero, erfc_positive
from primexec.executors.llvm.vmath.trigonometry import tan

# B(2k) / (2k), k = 7 to 1: digamma's asymptotic series in 1/x² (Abramowitz and Stegun 6.3.18).
DIGAMMA_SERIES = (
    8.33333333333333333333e-2, -2.10927960927960927961e-2, 7.57575757575757575758e-3, -4.16666666666666666667e-3,
    3.96825396825396825397e-3, -8.33333333333333333333e-3, 8.33333333333333333333e-2,
)  # fmt: skip


def digamma(x: Value) -> Value:
    """By reflection for negative x, upward recurrence to 10 and the asymptotic series there."""
    negative = x.compare("olt", 0.0)
    fraction = x - x.intrinsic("trunc")
    reflected = -math.pi / tan(fraction * math.pi)
    y = negative.select(1.0 - x, x)
    correction = y.const(0.0)
    for _ in range(10):
        low = y.compare("olt", 10.0)
        correction = low.select(correction - 1.0 / y, correction)
        y = low.select(y + 1.0, y)
    inverse = 1.0 / y
    z = inverse * inverse
    value = correction + (log(y) - inverse * 0.5 - z * horner(z, DIGAMMA_SERIES))
    value = y.compare("oeq", 10.0).select(correction + 2.25175258906672110764, value)
    value = negative.select(value + reflected, value)
    pole = negative.select(fraction.compare("oeq", 0.0).select(x.const(math.nan), value), value)
    return x.compare("oeq", 0.0).select(x.const(-math.inf).copysign(-x), pole)


def erf_inv_f32(x: Value) -> Value:
    """float32 operands widened to float64: polynomials in w = -log(1 - x²), or its root where x is near one.

    After Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011).
    """
    t = x.abs()
    rest = 1.0 - t
    w = -log_rounded(rest * (t + 1.0))
    centre = horner(w - 2.5, ERF_INV_CENTRE["f64"])
    y = t * unlikely(w.compare("oge", 5.0), centre, lambda: horner(w.intrinsic("sqrt") - 4.15, ERF_INV_TAIL["f64"]))
    y = rest.compare("oeq", 0.0).select(math.inf, y)
    return t.compare("ogt", 1.0).select(math.nan, y).copysign(x)


def erf_inv(x: Value) -> Value:
    """The float32 algorithm and one step of Halley's, on whichever of erf and erfc is small."""
    t = x.abs()
    y = erf_inv_f32(t)
    miss = t.compare("olt", 0.5).select(erf_near_zero(y) - t, (1.0 - t) - erfc_positive(y))
    newton = miss * (exp(y * y) * (math.sqrt(math.pi) / 2))
    refined = y - newton / y.muladd(newton, 1.0)
    return y.compare("olt", math.inf).select(refined, y).copysign(x)


# Beyond these, SLEEF's lgamma overflows early; at negative numbers it is less exact near its roots.
LARGE_GAMMA = {"f32": 4e36, "f64": 2e305}


def lgamma(x: Value) -> Value:
    def exact() -> Value:
        return narrowed(lambda wide: wide.lanewise("lgamma"), x)

    if not x.e.target.has_sleef:
        return exact()
    return unlikely(x.compare("ule", 0.0) | x.compare("ogt", LARGE_GAMMA[x.element]), library("lgamma", x), exact)


def cbrt(x: Value) -> Value:
    return library("cbrt", x)
