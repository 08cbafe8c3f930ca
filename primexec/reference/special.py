"""Special functions of float64 arrays, from published series; relative error around 1e-14 away from their zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)


def _each(function: Callable[[float], float]) -> Callable[[Array], Array]:
    by_element = np.frompyfunc(function, 1, 1)
    return lambda x: np.asarray(by_element(x), np.float64)


erf = _each(math.erf)
erfc = _each(math.erfc)


def _lgamma_of(x: float) -> float:
    try:
        return math.lgamma(x)
    except (ValueError, OverflowError):  # a pole, or beyond the largest number
        return math.inf


lgamma = _each(_lgamma_of)


def _exp_of_square(x: Array) -> Array:
    """exp(x²), with the rounding error of x² made good (Dekker's product, 1971)."""
    high = x * x
    big = x * 134217729.0
    head = big - (big - x)
    tail = x - head
    low = ((head * head - high) + 2 * head * tail) + tail * tail
    return np.exp(high) * np.where(np.isfinite(low), 1 + low, 1)


def erfcx(x: Array) -> Array:
    """exp(x²) erfc(x): the product below 4, Laplace's continued fraction above (DLMF 7.9.1)."""
    fraction = np.maximum(x, 4.0)
    denominator = fraction
    for k in range(90, 0, -1):
        denominator = fraction + k / 2 / denominator
    large = 1 / (denominator * math.sqrt(math.pi))
    return np.where(x < 4, _exp_of_square(np.minimum(x, 4.0)) * erfc(x), np.where(np.isnan(x), x, large))


def _erfc_inverse(q: Array) -> Array:
    """x >= 0 with erfc(x) = q for 0 < q <= 1: an asymptotic start, then Halley's steps."""
    q = np.where((q > 0) & (q <= 1), q, 1.0)
    log = -np.log(q * math.sqrt(math.pi))
    x = np.where(q < 0.3, np.sqrt(np.maximum(log - 0.5 * np.log(np.maximum(log, 1)), 0.2)), (1 - q) * 0.9)
    for _ in range(8):
        step = (erfc(x) - q) * np.exp(x * x) * (math.sqrt(math.pi) / 2)
        x = x + step / (1 + x * step)
    return x


def erf_inv(y: Array) -> Array:
    """The x with erf(x) = y; infinite at -1 and 1, NaN beyond."""
    magnitude = np.abs(y)
    small = np.where(magnitude < 0.5, y, 0.0)
    x = small * (math.sqrt(math.pi) / 2)
    for _ in range(8):
        step = (erf(x) - small) * np.exp(x * x) * (math.sqrt(math.pi) / 2)
        x = x - step / (1 + x * step)
    x = np.where(small == 0, small, x)
    tail = np.copysign(_erfc_inverse(1 - magnitude), y)
    outside = np.where(magnitude == 1, np.copysign(np.inf, y), np.nan)
    return np.where(magnitude < 0.5, x, np.where(magnitude < 1, tail, outside))


def ndtri(p: Array) -> Array:
    """The quantile of the standard normal distribution; infinite at 0 and 1, NaN beyond."""
    lower = np.where(p < 0.5, p, 1 - p)
    near = -erf_inv(1 - 2 * lower)  # where 2p is near 1 the error function is the better conditioned
    x = math.sqrt(2) * np.where(lower > 0.25, near, -_erfc_inverse(2 * lower))
    x = np.where(p < 0.5, x, -x)
    ends = np.where(p == 0, -np.inf, np.where(p == 1, np.inf, np.nan))
    return np.where((p > 0) & (p < 1), x, ends)


def digamma(x: Array) -> Array:
    """The derivative of lgamma: recurrence, then the asymptotic series (DLMF 5.11.2), reflection below 0."""
    reflected = np.where(x < 0, 1 - x, x)
    y = reflected
    total = np.zeros_like(x)
    for _ in range(10):
        low = y < 10
        total = total - np.where(low, 1 / y, 0.0)
        y = np.where(low, y + 1, y)
    series = np.zeros_like(x)
    for k in range(len(_BERNOULLI), 0, -1):
        series = (series + _BERNOULLI[k - 1] / (2 * k)) / (y * y)
    value = np.log(y) - 0.5 / y - np.where(np.isinf(y), 0.0, series) + total
    fraction = x - np.trunc(x)
    value = np.where(x < 0, value - math.pi / np.tan(math.pi * fraction), value)
    value = np.where((x < 0) & (fraction == 0), np.nan, value)
    return np.where(x == 0, np.copysign(np.inf, -x), np.where(x == -np.inf, np.nan, value))


def _modified_bessel(order: int, x: Array, *, scaled: bool) -> Array:
    """I_n: its power series up to 40 (DLMF 10.25.2), Hankel's expansion above (DLMF 10.40.1)."""
    magnitude = np.abs(x)
    small = np.minimum(magnitude, 40.0)
    term = np.ones_like(x) if order == 0 else small / 2
    series = term
    for k in range(1, 110):
        term = term * (small * small / 4) / (k * (k + order))
        series = series + term
    if scaled:
        series = series * np.exp(-small)
    large = np.maximum(magnitude, 40.0)
    term = np.ones_like(x)
    expansion = term
    for k in range(1, 40):
        term = term * ((2 * k - 1) ** 2 - 4 * order**2) / (8 * k * large)
        expansion = expansion + term
    root = expansion / np.sqrt(2 * math.pi * large)
    half = np.exp(large / 2)
    value = np.where(magnitude <= 40, series, root if scaled else root * half * half)
    # PyTorch has NaN at infinity, as inf / inf, except where the function is scaled.
    value = np.where(np.isnan(x) | (np.isinf(x) & (not scaled)), np.nan, value)
    return value if order == 0 else np.copysign(value, x)


def bessel_i0(x: Array) -> Array:
    """The modified Bessel function I_0."""
    return _modified_bessel(0, x, scaled=False)


def bessel_i0e(x: Array) -> Array:
    """exp(-|x|) I_0(x)."""
    return _modified_bessel(0, x, scaled=True)


def bessel_i1(x: Array) -> Array:
    """The modified Bessel function I_1."""
    return _modified_bessel(1, x, scaled=False)


def bessel_i1e(x: Array) -> Array:
    """exp(-|x|) I_1(x)."""
    return _modified_bessel(1, x, scaled=True)


def _bessel(order: int, x: Array) -> Array:
    """J_n: Bessel's integral by the trapezoidal rule up to 30, Hankel's expansion above (DLMF 10.17.3).

    The rule converges geometrically for periodic functions (Trefethen and Weideman, SIAM Review 2014).
    """
    magnitude = np.abs(x)
    small = np.minimum(magnitude, 30.0)
    total = np.zeros_like(x)
    points = 128
    for k in range(points):
        angle = 2 * math.pi * k / points
        total = total + np.cos(order * angle - small * math.sin(angle))
    integral = total / points
    large = np.maximum(magnitude, 30.0)
    term = np.ones_like(x)
    p, q = term, np.zeros_like(x)
    for k in range(1, 31):
        term = term * (4 * order**2 - (2 * k - 1) ** 2) / (8 * k * large)
        sign = (-1) ** (k // 2)
        if k % 2:
            q = q + sign * term
        else:
            p = p + sign * term
    sin, cos = np.sin(large), np.cos(large)
    # cos and sin of x - π/4 - nπ/2, without rounding that difference.
    cosine, sine = ((cos + sin), (sin - cos)) if order == 0 else ((sin - cos), -(cos + sin))
    expansion = (p * cosine - q * sine) / np.sqrt(math.pi * large)
    value = np.where(magnitude <= 30, integral, expansion)
    tiny = np.minimum(magnitude, 2.0)  # the power series, for relative accuracy near 0 (DLMF 10.2.2)
    term = np.ones_like(x) if order == 0 else tiny / 2
    series = term
    for k in range(1, 20):
        term = term * (-tiny * tiny / 4) / (k * (k + order))
        series = series + term
    value = np.where(magnitude < 2, series, value)
    value = np.where(np.isfinite(x), value, np.nan)  # PyTorch has NaN at infinity
    return value if order == 0 else np.where(x < 0, -value, value)


def bessel_j0(x: Array) -> Array:
    """The Bessel function J_0."""
    return _bessel(0, x)


def bessel_j1(x: Array) -> Array:
    """The Bessel function J_1."""
    return _bessel(1, x)


def spherical_bessel_j0(x: Array) -> Array:
    """sin(x) / x, and 1 at 0."""
    nonzero = np.where((x == 0) | np.isinf(x), 1.0, x)
    return np.where(x == 0, 1.0, np.where(np.isinf(x), 0.0, np.sin(nonzero) / nonzero))


def zeta(s: Array, q: Array) -> Array:
    """Hurwitz's zeta function, the sum of (k + q)^-s over k >= 0, by Euler and Maclaurin (DLMF 25.11.5)."""
    s, q = np.broadcast_arrays(s, q)
    defined = (s > 1) & ((q > 0) | ((q != np.floor(q)) & (s == np.floor(s))))
    exponent = np.where(defined, s, 2.0)
    a = np.where(defined, q, 1.0)
    total = np.zeros(a.shape)
    # The series converges where a is not small beside s; 200 terms of the sum are enough for any s.
    for _ in range(int(max(0.0, -a.min(initial=0.0))) + 200):
        below = a < 12 + exponent
        if not below.any():
            break
        total = total + np.where(below, np.power(a, -exponent), 0.0)
        a = np.where(below, a + 1, a)
    power = np.power(a, -exponent)
    total = total + power * a / (exponent - 1) + power / 2
    factor = exponent * power / a
    for k, bernoulli in enumerate(_BERNOULLI, start=1):
        total = total + np.where(np.isfinite(factor), factor, 0.0) * bernoulli / math.factorial(2 * k)
        factor = factor * (exponent + 2 * k - 1) * (exponent + 2 * k) / (a * a)
    pole = (s == 1) | ((s > 1) & (q <= 0) & (q == np.floor(q)))
    return np.where(defined, total, np.where(pole, np.inf, np.nan))


def _lgamma_of_one_plus(a: Array) -> Array:
    """lgamma(1 + a), by its Taylor series (DLMF 5.7.3) where 1 + a would round."""
    near = np.minimum(a, 0.2)
    total = np.zeros_like(a)
    for k in range(28, 1, -1):
        total = total * -near + zeta(np.array(float(k)), np.array(1.0)) / k
    return np.where(a < 0.2, near * (total * near - 0.5772156649015329), lgamma(1 + a))


def _upper_near_zero(a: Array, x: Array) -> Array:
    """Q for a below 1 and x below 2, where 1 - P would cancel (DLMF 8.7.3)."""
    a, x = np.minimum(a, 1.0), np.minimum(x, 2.0)
    term, total = np.ones_like(a), np.zeros_like(a)
    for n in range(1, 40):
        term = term * -x / n
        total = total + term / (a + n)
    exponent = a * np.log(x) - _lgamma_of_one_plus(a)
    return -np.expm1(exponent) - a * np.exp(exponent) * total


def _incomplete_gamma(a: Array, x: Array) -> tuple[Array, Array]:
    """P and Q, the regularised incomplete gamma functions.

    The series below a + 1 (DLMF 8.11.4), Legendre's continued fraction above (DLMF 8.9.2) by Lentz's method.
    """
    a, x = np.broadcast_arrays(a, x)
    regular = (a > 0) & (x > 0) & np.isfinite(a) & np.isfinite(x)
    shape, at = np.where(regular, a, 1.0), np.where(regular, x, 1.0)
    factor = np.exp(shape * np.log(at) - at - lgamma(shape))
    term = 1 / shape
    series, k = term, 0
    while k < 5000 and bool(np.any((np.abs(term) > series * 1e-17) & (at < shape + 1))):
        k += 1
        term = term * np.where(at < shape + 1, at, 0.0) / (shape + k)
        series = series + term
    b = np.maximum(at, shape + 1) + 1 - shape
    c = np.full(a.shape, 1e300)
    d = 1 / b
    fraction = d
    below = at < shape + 1
    moving, i = ~below, 0  # what has converged would drift by the rounding of every further factor
    while i < 5000 and bool(moving.any()):
        i += 1
        coefficient = -i * (i - shape)
        b = b + 2
        d = 1 / (coefficient * d + b)
        c = b + coefficient / c
        fraction = np.where(moving, fraction * (c * d), fraction)
        moving = moving & (np.abs(c * d - 1) > np.finfo(np.float64).eps)
    p = np.where(below, factor * series, 1 - factor * fraction)
    q = np.where(below, np.where(shape < 1, _upper_near_zero(shape, at), 1 - factor * series), factor * fraction)
    # At the ends of the domain the two are 0 and 1.
    nothing = (a > 0) & ((x == 0) | (np.isinf(a) & (x > 0) & np.isfinite(x)))
    everything = (a == 0) & (x > 0) | np.isinf(x) & (a >= 0) & np.isfinite(a)
    p = np.where(regular, p, np.where(nothing, 0.0, np.where(everything & (x > 0), 1.0, np.nan)))
    q = np.where(regular, q, np.where(nothing, 1.0, np.where(everything & (x > 0), 0.0, np.nan)))
    return p, q


def igamma(a: Array, x: Array) -> Array:
    """The regularised lower incomplete gamma function."""
    return _incomplete_gamma(a, x)[0]


def igammac(a: Array, x: Array) -> Array:
    """The regularised upper incomplete gamma function."""
    return _incomplete_gamma(a, x)[1]
