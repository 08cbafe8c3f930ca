"""How far a result may be from the reference: one table, by family of operators.

A result `r` of dtype `d` passes if, with the float64 reference `x` of the same inputs,

    |r - x|  <=  ulps * ulp_d(x)  +  growth(n) * eps_w * scale

where `ulp_d(x)` is the distance of neighbouring numbers of dtype `d` at `x`, `n` the number of terms that
make one element of the result, `eps_w` the epsilon of the dtype in which terms are to be added (float32 for
float16 and bfloat16, else `d`), and `scale` the sum of the terms' magnitudes: the reference of the same
operator on the inputs' absolute values. That is the usual forward bound (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, sections 3.1 and 4.2), with growth log2(n) for blocked and pairwise sums. NaN and
infinities must stand where the reference has them, except that next to the largest number either will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The bound of one family.

    Attributes:
        ulps: for float32 and float64 results.
        half_ulps: for float16 and bfloat16 results, which are to be computed in float32 and rounded once.
        complex_ulps: for complex results, relative to their absolute value.
        growth: how the bound grows with the number of terms; None where nothing is added up.
        floor: errors are measured at values no smaller than this, for functions that are hard near their zeros.
        signs: whether a zero must have the reference's sign.
    """

    ulps: float
    half_ulps: float
    complex_ulps: float
    growth: Callable[[int], float] | None = None
    floor: float = 0.0
    signs: bool = True


def _linear(n: int) -> float:
    return float(n)


def _pairwise(n: int) -> float:
    """A pairwise sum of blocks of up to 128 terms, each block added up in at least four accumulators."""
    return 2 * math.log2(n + 2) + min(n, 128) / 4


TOLERANCES: dict[str, Tolerance] = {
    "exact": Tolerance(0, 0, 0),
    "selected": Tolerance(0, 0, 0, signs=False),  # which of 0.0 and -0.0 is the larger is left open
    # + - * / and conversions: IEEE 754 requires the nearest; complex quotients are four roundings away.
    "rounded": Tolerance(0.5, 0.5, 4),
    "pointwise": Tolerance(4, 2, 16),
    "power": Tolerance(4, 2, 64),  # exp(b log a): the error of the logarithm is multiplied
    "special": Tolerance(64, 2, 64, floor=1.0, signs=False),  # gamma, Bessel, zeta: their zeros are not at numbers
    "sum": Tolerance(2, 1, 4, _pairwise, signs=False),
    "scan": Tolerance(2, 1, 4, _linear, signs=False),
    "product": Tolerance(4, 1, 4, _linear, signs=False),
    "matmul": Tolerance(2, 1, 4, _linear, signs=False),
    "fft": Tolerance(8, 2, 8, _pairwise, signs=False),
    "training": Tolerance(64, 16, 64, lambda n: 64.0, signs=False),  # results of many operators, against their largest
    "linalg": Tolerance(4, 1, 16, lambda n: 16.0 * n, signs=False),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """What `differ` found.

    Attributes:
        ulps: the largest error, in units in the last place of the reference; infinite where a NaN or an
            infinity is wrong.
        problem: empty where the result is within the bound.
    """

    ulps: float
    problem: str


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a floating dtype at x (float64, same shape).

    >>> ulp(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64), torch.float32).tolist()
    [1.1920928955078125e-07, 2.384185791015625e-07, 1.401298464324817e-45]
    """
    info = torch.finfo(dtype)
    least = float(info.smallest_normal)
    magnitude = x.abs().clamp(least, float(info.max))
    exponent = torch.frexp(magnitude).exponent.to(torch.float64) - 1
    return torch.ldexp(torch.full_like(magnitude, float(info.eps)), exponent)


def differ(
    got: Tensor,
    want: Tensor,
    tolerance: Tolerance,
    *,
    terms: int = 1,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Difference:
    """Compare a result with the reference.

    Args:
        got: the result.
        want: the reference: float64 (complex128) of the same shape where the result is floating (complex),
            else of the result's dtype.
        tolerance: the family's row.
        terms: how many terms make one element.
        scale: the sum of the terms' magnitudes, of the reference's shape.
        dtype: the dtype that the result was computed in, where `got` is wider.
    """
    if got.shape != want.shape:
        return Difference(math.inf, f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if got.dtype.is_complex:
        parts = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want.resolve_conj())
        # A component is as good as the whole number is long.
        length = want.abs().unsqueeze(-1).expand(parts[1].shape)
        wide = None if scale is None else scale.abs().expand(want.shape).unsqueeze(-1).expand(parts[1].shape)
        return _differ(
            *parts, replace(tolerance, ulps=tolerance.complex_ulps), terms, wide, length, (dtype or got.dtype).to_real()
        )
    if not got.dtype.is_floating_point:
        wrong = got.ne(want)
        return Difference(math.inf, _where(wrong, got, want, "")) if bool(wrong.any()) else Difference(0.0, "")
    want = want.to(torch.float64)
    return _differ(got, want, tolerance, terms, scale, want, (dtype or got.dtype).to_real())


def _differ(
    got: Tensor,
    want: Tensor,
    tolerance: Tolerance,
    terms: int,
    scale: Tensor | None,
    at: Tensor,
    dtype: torch.dtype,
) -> Difference:
    if not got.numel():
        return Difference(0.0, "")
    info = torch.finfo(dtype)
    wide = got.to(torch.float64)
    rounded = want.to(dtype)
    unit = ulp(at, dtype)
    # Near the largest number, rounding alone decides between it and infinity.
    edge = want.isfinite() & (want.abs() >= float(info.max) * (1 - 8 * float(info.eps))) & got.isinf()
    edge &= wide.sign() == want.sign()
    finite = rounded.isfinite() & got.isfinite()
    same = (rounded == got) | (rounded.isnan() & got.isnan()) | edge
    wrong = ~same & ~finite
    if bool(wrong.any()):
        return Difference(math.inf, _where(wrong, got, want, "a NaN or an infinity is wrong: "))
    if tolerance.signs:
        wrong = (want == 0) & (got == 0) & (want.signbit() != got.signbit())
        if bool(wrong.any()):
            return Difference(math.inf, _where(wrong, got, want, "the sign of a zero is wrong: "))
    error = torch.where(same & ~finite, 0.0, (wide - want).abs())
    half = dtype in (torch.float16, torch.bfloat16)
    measure = ulp(at.abs().clamp(min=tolerance.floor), dtype) if tolerance.floor else unit
    bound = (tolerance.half_ulps if half else tolerance.ulps) * measure
    if tolerance.growth is not None and scale is not None:
        eps = torch.finfo(torch.float32).eps if half else info.eps
        bound = bound + tolerance.growth(terms) * float(eps) * scale.abs()
    ulps = torch.where(error == 0, 0.0, error / unit)
    wrong = (error > bound) & (rounded != got)
    problem = _where(wrong, got, want, f"{float(ulps[wrong].max()):.3g} ulp: ") if bool(wrong.any()) else ""
    return Difference(float(ulps.max()), problem)


def _where(wrong: Tensor, got: Tensor, want: Tensor, what: str) -> str:
    first = tuple(wrong.nonzero()[0].tolist())
    count = int(wrong.sum())
    values = f"{got[first].item()!r}, not {want[first].item()!r}"
    return f"{what}{count} of {wrong.numel()} elements differ, first at {first}: {values}"
