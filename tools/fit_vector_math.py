"""Fits the polynomials of the vector math and writes them: python -m tools.fit_vector_math.

Each is mpmath's Chebyshev fit in 60 digits, or a weighted one, to a quotient chosen so that its error is a small
relative error of the function itself; coefficients are rounded to nearest. Needs mpmath, which comes with torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpmath import mp, mpf

TARGET = Path(__file__).parent.parent / "primexec/executors/llvm/vmath/constants.py"
HALF_LN2 = 0.3475  # of an argument reduced to half of ln 2 either way, with the slack of rounding it
QUARTER_PI = 0.7856


def quotient(f: Callable[[Any], Any], at_zero: Any) -> Callable[[Any], Any]:
    """f, whose formula is 0/0 at (or hopeless near) zero, continued there by its limit."""
    return lambda x: at_zero if abs(x) < mpf(10) ** -18 else f(x)


def odd(f: Callable[[Any], Any], third: Any) -> Callable[[Any], Any]:
    """(f(x)/x - 1) / x² as a function of z = x²."""
    return quotient(lambda z: (f(mp.sqrt(z)) / mp.sqrt(z) - 1) / z, third)


def erfcx_mapped(q: Any) -> Any:
    """(1 + 2x) exp(x²) erfc(x) with q = (x - 4) / (x + 4), so that x from 0 to infinity is q from -1 to 1."""
    if q > 1 - mpf(10) ** -12:
        return 2 / mp.sqrt(mp.pi)
    x = 4 * (1 + q) / (1 - q)
    if x > 200:
        inverse = 1 / (2 * x * x)
        series = 1 - inverse + 3 * inverse**2 - 15 * inverse**3 + 105 * inverse**4 - 945 * inverse**5
        return (1 + 2 * x) / (x * mp.sqrt(mp.pi)) * series
    return (1 + 2 * x) * mp.exp(x * x) * mp.erfc(x)


def log_remainder(z: Any) -> Any:
    """(log((1 + s) / (1 - s)) - 2s) / (s z) with z = s²."""
    s = mp.sqrt(z)
    return (2 * mp.atanh(s) / s - 2) / z


def erf_inv_over_t(w: Any) -> Any:
    """erf_inv(t) / t with w = -log(1 - t²), Giles' variable."""
    if w < mpf(10) ** -15:
        return mp.sqrt(mp.pi) / 2
    t = mp.sqrt(-mp.expm1(-w))
    return mp.erfinv(t) / t


# name: (function, low, high, terms for float32, terms for float64, terms for float64 arithmetic whose results are
# rounded to float32, and where there are any those for float32 whose results are rounded to half precision)
FITS: dict[str, tuple[Any, ...]] = {
    "EXP": (quotient(lambda r: (mp.exp(r) - 1 - r) / r**2, mpf(1) / 2), -HALF_LN2, HALF_LN2, 5, 10, 6, 4),
    "EXP2": (lambda f: mp.power(2, f), 0, 1, 0, 0, 0, 5),
    "LOG": (quotient(lambda f: (mp.log1p(f) - f) / f**2, -mpf(1) / 2), -0.2501, 0.5001, 9, 0, 12),
    "LOG_REMAINDER": (quotient(log_remainder, mpf(2) / 3), 0, 0.0295, 0, 8, 0),
    "SIN": (odd(mp.sin, -mpf(1) / 6), 0, QUARTER_PI**2, 3, 7, 4),
    "COS": (
        quotient(lambda z: (mp.cos(mp.sqrt(z)) - 1 + z / 2) / z**2, mpf(1) / 24), 0, QUARTER_PI**2, 3, 7, 3,
    ),
    "ATAN": (odd(mp.atan, -mpf(1) / 3), 0, 0.1718, 0, 13, 0),
    "ATAN_TO_ONE": (odd(mp.atan, -mpf(1) / 3), 0, 1.0001, 9, 0, 0),
    "SINH": (odd(mp.sinh, mpf(1) / 6), 0, 1.0001, 4, 0, 0),
    "ASIN": (odd(mp.asin, mpf(1) / 6), 0, 0.2501, 0, 13, 7),
    "ERF": (
        quotient(lambda z: mp.erf(mp.sqrt(z)) / mp.sqrt(z) - 1, 2 / mp.sqrt(mp.pi) - 1), 0, 1.0001, 0, 13, 0,
    ),
    "ROOT_ERFC": (
        quotient(lambda t: 2 * (1 - mp.sqrt(mp.erfc(t))) / t - 1, 2 / mp.sqrt(mp.pi) - 1), 0, 3.9, 14, 0, 0,
    ),
    "ERF_INV_CENTRE": (lambda u: erf_inv_over_t(u + mpf(2.5)), -2.5, 2.5, 0, 10, 0),
    "ERF_INV_TAIL": (lambda u: erf_inv_over_t((u + mpf(4.15)) ** 2), -1.92, 1.92, 0, 14, 0),
    "ERFCX": (erfcx_mapped, -1, 1, 0, 25, 13),
}  # fmt: skip
ACCURACIES = ("f32", "f64", "rounded", "coarse")
FLOAT32 = ("f32", "coarse")

# The relative error of the function for one unit of the polynomial's, where it is far from uniform.
WEIGHTS: dict[str, Callable[[Any], Any]] = {"ROOT_ERFC": lambda t: t * mp.sqrt(mp.erfc(t)) / mp.erf(t)}
POINTS, ROUNDS = 240, 40


def weighted(function: Callable[[Any], Any], weight: Callable[[Any], Any], high: Any, count: int) -> tuple[Any, Any]:
    """Lawson's algorithm on [0, high]: least squares whose weights grow where the error is large."""
    points = [high / 2 * (1 - mp.cos(mp.pi * (k + mpf(1) / 2) / POINTS)) for k in range(POINTS)]
    values, scales = [function(t) for t in points], [weight(t) for t in points]
    lawson = [mpf(1)] * POINTS
    for _ in range(ROUNDS):
        mine = [w * s * s for w, s in zip(lawson, scales, strict=True)]
        moments = [sum(w * t**k for w, t in zip(mine, points, strict=True)) for k in range(2 * count - 1)]
        right = [sum(w * v * t**k for w, v, t in zip(mine, values, points, strict=True)) for k in range(count)]
        solution = mp.lu_solve(mp.matrix([[moments[i + j] for j in range(count)] for i in range(count)]), right)
        fit = list(solution)[::-1]
        errors = [abs(mp.polyval(fit, t) - v) * s for t, v, s in zip(points, values, scales, strict=True)]
        lawson = [w * e for w, e in zip(lawson, errors, strict=True)]
        total = sum(lawson)
        lawson = [w / total for w in lawson]
    return fit, max(errors)


# Odd functions in pieces, up to where they are 1 in float32: the function, the width of a piece, and the terms.
# Multiples of the width are exact; the function's values at them are close to float32 numbers: their loss counts most.
PIECES: dict[str, tuple[Callable[[Any], Any], float, int]] = {
    "ERF_PIECES": (mp.erf, 0.2554931640625, 7),
    "TANH_PIECES": (mp.tanh, 0.5821533203125, 8),
}
# Those for results that are rounded to half precision: one, or nearly, is where they end.
COARSE_PIECES: dict[str, tuple[Callable[[Any], Any], float, int]] = {"TANH_COARSE": (mp.tanh, 0.439453125, 5)}
COUNT = 16


def pieces(function: Callable[[Any], Any], width: float, terms: int) -> tuple[float, list[list[float]]]:
    """What rounding the slope at zero loses, and for each power the coefficients of the pieces around k * width.

    The last piece is tilted so that it ends at 1: there, what is beyond stays.
    """
    half = mpf(width) / 2
    at_zero = quotient(lambda u: function(u) / u, mp.diff(function, 0))
    odd_part, _ = mp.chebyfit(at_zero, [-half, half], terms - 1, error=True)
    lost = odd_part[-1] - rounded(odd_part[-1], "f32")
    rows = [[*odd_part, 0]]
    for k in range(1, COUNT):
        fit = mp.chebyfit(lambda u, k=k: function(k * mpf(width) + u), [-half, half], terms)
        rows.append(list(fit))
    end = mp.polyval([rounded(c, "f32") for c in rows[-1]], half)
    rows[-1][-2] += (1 - end) / half
    return rounded(lost, "f32"), [[rounded(row[i], "f32") for row in rows] for i in range(terms)]


def coarse_pieces(function: Callable[[Any], Any], width: float, terms: int) -> list[list[float]]:
    """For each power of x itself, the coefficients of the pieces around k * width; the first has no constant."""
    half = mpf(width) / 2
    first, _ = mp.chebyfit(quotient(lambda x: function(x) / x, mp.diff(function, 0)), [0, half], terms - 1, error=True)
    rows = [[*first, mpf(0)]]
    rows += [
        list(mp.chebyfit(function, [(k - half), (k + half)], terms)) for k in (mpf(width) * n for n in range(1, COUNT))
    ]
    return [[rounded(row[i], "f32") for row in rows] for i in range(terms)]


def rounded(value: Any, dtype: str) -> float:
    number = float(value)
    return float(struct.unpack("<f", struct.pack("<f", number))[0]) if dtype in FLOAT32 else number


def table(name: str, numbers: tuple[float, ...], columns: list[list[float]]) -> list[str]:
    """Lines that assign numbers and what is looked up."""
    lines = [f"{name} = (", *(f"    {n!r}," for n in numbers)]
    lines.append("    (  # for each power, the coefficients of the pieces")
    for column in columns:
        rows = [", ".join(map(repr, column[i : i + 4])) for i in range(0, COUNT, 4)]
        lines.append("        (" + ",\n         ".join(rows) + "),")
    return [*lines, "    ),", ")  # fmt: skip", ""]


def main() -> None:
    mp.dps = 60
    lines = [
        '"""Polynomials, highest power first. Written by tools/fit_vector_math.py, which tells what they fit."""',
        "",
    ]
    for name, (function, low, high, *terms) in FITS.items():
        lines.append(f"{name}: dict[str, tuple[float, ...]] = {{")
        for dtype, count in zip(ACCURACIES, terms, strict=False):
            if count == 0:
                continue
            if name in WEIGHTS:
                fit, error = weighted(function, WEIGHTS[name], mpf(high), count)
            else:
                fit, error = mp.chebyfit(function, [mpf(low), mpf(high)], count, error=True)
            print(f"{name:14} {dtype} {count:3} terms, error 2^{float(mp.log(error, 2)):.1f}", flush=True)
            lines.append(f'    "{dtype}": (')
            lines += [f"        {rounded(c, dtype)!r}," for c in fit]
            lines.append("    ),")
        lines += ["}", ""]
    for name, (function, width, terms) in PIECES.items():
        lost, columns = pieces(function, width, terms)
        lines += table(name, (width, lost), columns)
    for name, (function, width, terms) in COARSE_PIECES.items():
        lines += table(name, (width,), coarse_pieces(function, width, terms))
    TARGET.write_text("\n".join(lines[:-1]) + "\n")


if __name__ == "__main__":
    main()
