"""Gamma functions, the inverse of the error function and the cube root, in float64."""

from __future__ import annotations

import math

from primexec.executors.llvm.emit import Value
from primexec.executors.llvm.vmath.core import exp, horner, log
from primexec.executors.llvm.vmath.elementary import erf, erfc_positive
from primexec.executors.llvm.vmath.trigonometry import tan

# B(2k) / (2k), k = 7 to 1: digamma's asymptotic series in 1/x² (Abramowitz and Stegun 6.3.18).
DIGAMMA_SERIES = (
    8.33333333333333333333e-2, -2.10927960927960927961e-2, 7.57575757575757575758e-3, -4.16666666666666666667e-3,
    3.96825396825396825397e-3, -8.33333333333333333333e-3, 8.33333333333333333333e-2,
)  # fmt: skip

# Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011): float32 polynomials, here a first guess.
ERF_INV_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
ERF_INV_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
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


def erf_inv(x: Value) -> Value:
    """A first guess, then two Newton steps on whichever of erf and erfc is small."""
    t = x.abs()
    rest = 1.0 - t
    w = -log(rest * (t + 1.0))
    centre = horner(w - 2.5, ERF_INV_CENTRE)
    tail = horner(w.intrinsic("sqrt") - 3.0, ERF_INV_TAIL)
    y = w.compare("olt", 5.0).select(centre, tail) * t
    for _ in range(2):
        miss = t.compare("olt", 0.5).select(erf(y) - t, rest - erfc_positive(y))
        y = y - miss * (exp(y * y) * (math.sqrt(math.pi) / 2))
    y = rest.compare("oeq", 0.0).select(math.inf, y)
    return t.compare("ogt", 1.0).select(math.nan, y).copysign(x)


def lgamma(x: Value) -> Value:
    return x.lanewise("lgamma")


def cbrt(x: Value) -> Value:
    return x.lanewise("cbrt")
