"""Special functions against 40 digits: PyTorch's own are too coarse to be their oracle."""

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from primexec import reference

mpmath.mp.dps = 40
SMALL = [1e-12, 1e-5, 0.01, 0.3, 0.9, 1.0, 1.7, 2.3, 3.99, 4.01, 7.5]
SIGNED = [*SMALL, *(-x for x in SMALL)]
LARGE = [12.0, 25.5, 29.9, 30.1, 39.9, 40.1, 77.0, 140.0]
UNIT = [1e-300, 1e-17, 1e-5, 0.02, 0.1, 0.2499, 0.2501, 0.4, 0.499, 0.6, 0.9, 0.999, 1 - 1e-9]

# name: (function, arguments, relative error)
ONE: dict[str, tuple[Callable[..., Any], list[float], float]] = {
    "erf": (mpmath.erf, [*SIGNED, *LARGE], 1e-15),
    "erfc": (mpmath.erfc, [*SIGNED, 12.0, 20.0, 25.5], 1e-14),
    "erfcx": (lambda x: mpmath.exp(x * x) * mpmath.erfc(x), [*SIGNED, *LARGE, -12.0, -20.0, -25.5], 2e-14),
    "erf_inv": (mpmath.erfinv, [*UNIT, *(-x for x in UNIT)], 1e-14),
    "ndtri": (lambda p: -mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * p), UNIT[1:], 2e-14),
    "lgamma": (lambda x: mpmath.re(mpmath.loggamma(x)), [*SMALL[:5], *SMALL[6:], *LARGE, -0.3, -1.7], 1e-14),
    "digamma": (mpmath.digamma, [*SMALL, *LARGE, -0.3, -0.7, -1.4, -7.6], 1e-13),
    "bessel_i0": (lambda x: mpmath.besseli(0, x), [*SIGNED, *LARGE], 1e-14),
    "bessel_i1": (lambda x: mpmath.besseli(1, x), [*SIGNED, *LARGE], 1e-14),
    "bessel_i0e": (lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(0, x), [*SIGNED, *LARGE], 1e-14),
    "bessel_i1e": (lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(1, x), [*SIGNED, *LARGE], 1e-14),
    "bessel_j0": (lambda x: mpmath.besselj(0, x), [*SIGNED, *LARGE], 1e-13),
    "bessel_j1": (lambda x: mpmath.besselj(1, x), [*SIGNED, *LARGE], 1e-13),
    "spherical_bessel_j0": (lambda x: mpmath.sin(x) / x, [*SIGNED, *LARGE], 1e-14),
}
TWO: dict[str, tuple[Callable[..., Any], list[tuple[float, float]], float]] = {
    "zeta": (
        lambda s, q: mpmath.zeta(s, q),
        [(s, q) for s in (1.001, 1.5, 2.0, 7.3, 27.3, 88.0) for q in (1e-3, 0.4, 1.0, 5.5, 10.0, 24.7)],
        1e-13,
    ),
    "igamma": (
        lambda a, x: mpmath.gammainc(a, 0, x, regularized=True),
        [(a, x) for a in (1e-8, 0.2, 0.9, 3.0, 27.3, 88.0) for x in (1e-8, 0.4, 1.2, 5.5, 27.3, 88.0)],
        2e-13,
    ),
    "igammac": (
        lambda a, x: mpmath.gammainc(a, x, mpmath.inf, regularized=True),
        [(a, x) for a in (1e-30, 1e-8, 0.2, 0.9, 3.0, 27.3, 88.0) for x in (1e-8, 0.4, 1.2, 5.5, 27.3, 88.0)],
        2e-13,
    ),
}


@pytest.mark.parametrize("name", ["igamma", "igammac"])
def test_elements_that_converge_early_do_not_drift(name: str) -> None:
    """Points at which the factors flicker around one, among many others."""
    points = np.array([(8.421949346149166, 9.924128206316519), (0.7938296066729178, 2.3211513329338302),
                       (1.6106203195368858, 4.472843501883664), (8.004497910347801, 9.257786171721607)])  # fmt: skip
    grid = np.random.default_rng(0).uniform(0.1, 10, (4000, 2))
    got = reference.lookup(f"prims.{name}.default")(*np.concatenate([points, grid]).T)[: len(points)]
    exact = [float(TWO[name][0](*map(mpmath.mpf, point))) for point in points]
    np.testing.assert_allclose(got, exact, rtol=2e-14)


@pytest.mark.parametrize("name", ONE)
def test_one_argument(name: str) -> None:
    function, points, rtol = ONE[name]
    expected = [float(function(mpmath.mpf(x))) for x in points]
    np.testing.assert_allclose(reference.lookup(f"prims.{name}.default")(np.array(points)), expected, rtol=rtol)


@pytest.mark.parametrize("name", TWO)
def test_two_arguments(name: str) -> None:
    function, points, rtol = TWO[name]
    expected = [float(function(*map(mpmath.mpf, p))) for p in points]
    actual = reference.lookup(f"prims.{name}.default")(*np.array(points).T)
    np.testing.assert_allclose(actual, expected, rtol=rtol)
