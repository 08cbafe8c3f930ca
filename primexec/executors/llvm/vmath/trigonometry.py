"""Trigonometric functions and their inverses."""

from __future__ import annotations

import math

from primexec.executors.llvm.emit import Value, round_f32, unlikely
from primexec.executors.llvm.vmath.constants import ASIN, ATAN, ATAN_TO_ONE, COS, SIN
from primexec.executors.llvm.vmath.core import horner, nearest

# pi/2 in three parts, and the largest arguments that these reduce with full accuracy. Beyond, the C library serves.
_P1 = round_f32(math.pi / 2)
_P2 = round_f32(math.pi / 2 - _P1)
PARTS = {
    "f32": (_P1, _P2, math.pi / 2 - _P1 - _P2 + 6.123233995736766e-17),
    "f64": (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33),
}
LARGEST = {"f32": 30000.0, "f64": 1e6}
PI_LOW = 1.2246467991473532e-16
HALF_PI = {"f32": (_P1, math.pi / 2 - _P1), "f64": (math.pi / 2, PI_LOW / 2)}
SCALES = {"f32": (2.0**100, 2.0**-60, 2.0**-60, 2.0**90), "f64": (2.0**1000, 2.0**-900, 2.0**-60, 2.0**100)}


def _reduced(x: Value) -> tuple[Value, Value]:
    """x less a multiple of pi/2, and that multiple (in the low bits)."""
    n, shifted = nearest(x, 2.0 / math.pi)
    r = x
    for part in PARTS[x.element]:
        r = n.fma(-part, r)
    return r, shifted


def _circular(x: Value, quadrant: int, library: str) -> Value:
    """sin(x + quadrant * pi/2) by one polynomial a lane: the sine's or the cosine's, by the quadrant."""
    r, shifted = _reduced(x)
    multiple = shifted + quadrant
    z = r * r
    odd = (multiple & 1).compare("ne", 0)
    negative = (multiple << {"f32": 30, "f64": 62}[x.element]) & {"f32": -(2**31), "f64": -(2**63)}[x.element]
    first, *rest = (
        odd.select(r.const(c), s) for c, s in zip((*COS[x.element], -0.5), (0.0, *SIN[x.element]), strict=True)
    )
    polynomial = first
    for coefficient in rest:
        polynomial = polynomial.muladd(z, coefficient)
    base = odd.select(r.const(1.0), r)
    value = (z * base).muladd(polynomial, base)
    value = (value.bits() ^ negative).as_float()
    return unlikely(x.abs().compare("ugt", LARGEST[x.element]), value, lambda: x.intrinsic(library))


def sin(x: Value) -> Value:
    value = _circular(x, 0, "sin")
    return x.compare("oeq", 0.0).select(x, value)


def cos(x: Value) -> Value:
    return _circular(x, 1, "cos")


def tan(x: Value, accuracy: str = "f64") -> Value:
    """float64, or what is rounded to float32."""
    r, shifted = _reduced(x)
    z = r * r
    s = (r * z).muladd(horner(z, SIN[accuracy]), r)
    c = z.muladd(z.muladd(horner(z, COS[accuracy]), -0.5), 1.0)
    odd = (shifted & 1).compare("ne", 0)
    value = odd.select(-c, s) / odd.select(s, c)
    value = unlikely(x.abs().compare("ugt", LARGEST[x.element]), value, lambda: x.lanewise("tan"))
    return x.compare("oeq", 0.0).select(x, value)


def _atan_of_ratio(small: Value, large: Value) -> tuple[Value, Value]:
    """atan(small / large) as a sum of two, for 0 <= small <= large of moderate size; the second is below the first.

    float32: a polynomial up to 1, with what rounding the quotient lost. float64: after Cephes' atan.c, around pi/4
    where the quotient is above tan(pi/8).
    """
    if small.element == "f32":
        inverse = 1.0 / large
        q = small * inverse
        lost = (-q).fma(large, small) * inverse
        z = q * q
        return q, (q * z).muladd(horner(z, ATAN_TO_ONE["f32"]), lost * z.muladd(-0.5, 1.0))
    middle = small.compare("ogt", large * math.tan(math.pi / 8))
    q = middle.select(small - large, small) / middle.select(small + large, large)
    z = q * q
    rest = (q * z).muladd(horner(z, ATAN["f64"]), q)
    return middle.select(q.const(math.pi / 4), 0.0), rest


def _from(starts: list[Value], backwards: Value, parts: tuple[Value, Value]) -> Value:
    """The sum of the starts plus that of the parts, or less it, rounded about once; the first start is 0 or largest."""
    start, low = starts
    sign = backwards.select(start.const(-1.0), 1.0)
    first, second = parts[0] * sign, parts[1] * sign
    total = start + first
    return total + (first - (total - start) + (second + low))


def atan(x: Value) -> Value:
    t = x.abs().at_most(2.0**60)
    beyond = t.compare("ogt", 1.0)
    one = t.const(1.0)
    parts = _atan_of_ratio(beyond.select(one, t), beyond.select(t, one))
    return _from([beyond.select(t.const(k), 0.0) for k in HALF_PI[x.element]], beyond, parts).copysign(x)


def atan2(y: Value, x: Value) -> Value:
    """With C's answers for zeros and infinities."""
    a, b = y.abs(), x.abs()
    steep = a.compare("ogt", b)
    small, large = steep.select(b, a), steep.select(a, b)
    infinite = large.compare("oeq", math.inf)
    both = small.compare("oeq", math.inf)
    small = infinite.select(both.select(small.const(1.0), 0.0), small)
    large = infinite.select(large.const(1.0), large)
    # The sum of the two must not overflow, nor their quotient be formed from denormals.
    most, least, down, up = SCALES[x.element]
    factor = large.compare("ogt", most).select(
        large.const(down), large.compare("olt", least).select(large.const(up), 1.0)
    )
    small, large = small * factor, large * factor
    parts = _atan_of_ratio(small, large.compare("oeq", 0.0).select(large.const(1.0), large))
    left = x.bits().compare("slt", 0)
    starts = [steep.select(x.const(k), left.select(x.const(2.0 * k), 0.0)) for k in HALF_PI[x.element]]
    value = _from(starts, steep ^ left, parts)
    return (y.is_nan().select(y, x.is_nan().select(x, value))).copysign(y)


def _asin_parts(x: Value, accuracy: str) -> tuple[Value, Value, Value]:
    """|x|, whether it is above 1/2, and asin of |x| there below, of sqrt((1 - |x|) / 2) above."""
    t = x.abs()
    beyond = t.compare("ogt", 0.5)
    z = beyond.select((1.0 - t) * 0.5, t * t)
    root = beyond.select(z.intrinsic("sqrt"), t)
    return t, beyond, (root * z).muladd(horner(z, ASIN[accuracy]), root)


def asin(x: Value, accuracy: str = "f64") -> Value:
    """float64, or what is rounded to float32: asin x = pi/2 - 2 asin sqrt((1 - x) / 2) for x above 1/2."""
    _, beyond, part = _asin_parts(x, accuracy)
    return beyond.select(math.pi / 2 - (part * 2.0 - PI_LOW / 2), part).copysign(x)


def acos(x: Value, accuracy: str = "f64") -> Value:
    """float64, or what is rounded to float32."""
    _, beyond, part = _asin_parts(x, accuracy)
    negative = x.compare("olt", 0.0)
    far = negative.select(math.pi - (part * 2.0 - PI_LOW), part * 2.0)
    near = math.pi / 2 - (part.copysign(x) - PI_LOW / 2)
    return beyond.select(far, near)
