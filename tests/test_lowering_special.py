"""Expansions of special functions: against values in 30 digits, and no less precise than eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from primexec import make_traced, prims
from tests.prims_oracle import run_graph

mpmath.mp.dps = 30

BESSEL: dict[str, Callable[[Any], Any]] = {
    "special_modified_bessel_k0": lambda x: mpmath.besselk(0, x),
    "special_modified_bessel_k1": lambda x: mpmath.besselk(1, x),
    "special_scaled_modified_bessel_k0": lambda x: mpmath.exp(x) * mpmath.besselk(0, x),
    "special_scaled_modified_bessel_k1": lambda x: mpmath.exp(x) * mpmath.besselk(1, x),
    "special_bessel_y0": lambda x: mpmath.bessely(0, x),
    "special_bessel_y1": lambda x: mpmath.bessely(1, x),
    "special_airy_ai": mpmath.airyai,
}
FIRST: dict[str, Callable[[Any], Any]] = {  # of degree 1; all are 1 in degree 0
    "t": lambda x: x,
    "u": lambda x: 2 * x,
    "v": lambda x: 2 * x - 1,
    "w": lambda x: 2 * x + 1,
}


def chebyshev(kind: str, n: int, x: Any) -> float:
    before, value = mpmath.mpf(1), FIRST[kind](x)
    for _ in range(n):
        before, value = value, 2 * x * value - before
    return float(before)


def as_prims(op: Any, *inputs: Tensor) -> Tensor:
    lowered = make_traced(op).trace(*inputs).lower()
    assert all(prims.is_prim(n.target) for n in lowered.nodes)
    return run_graph(lowered.graph_module.graph, list(inputs))[0]  # type: ignore[no-any-return]


def errors(got: Tensor, exact: Tensor) -> float:
    """The largest error in units of eps, of the value or, near zeros, of one."""
    scale = exact.abs().clamp(min=1)
    return ((got.double() - exact).abs() / scale).max().item() / torch.finfo(got.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BESSEL)
def test_bessel_functions(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.aten, name).default
    x = torch.cat([torch.logspace(-5, 1.6, 60), torch.linspace(0.01, 60, 60)]).to(dtype)
    x = torch.cat([x, -x[:100]]) if "airy" in name else x
    exact = torch.tensor([float(BESSEL[name](mpmath.mpf(v))) for v in x.double().tolist()], dtype=torch.float64)
    mine, eager = errors(as_prims(op, x), exact), errors(op(x), exact)
    assert mine < 64
    assert mine <= 2 * eager + 2
    ends = torch.tensor([0.0, -0.0, -1.0, math.inf, math.nan, 1e-300, 1e300], dtype=dtype)
    torch.testing.assert_close(as_prims(op, ends), op(ends), equal_nan=True)
    torch.testing.assert_close(as_prims(op, torch.arange(1, 5)), op(torch.arange(1, 5)))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", FIRST)
def test_chebyshev_polynomials(kind: str, shifted: bool) -> None:
    op = getattr(torch.ops.aten, f"special_{'shifted_' * shifted}chebyshev_polynomial_{kind}").default
    x = torch.tensor([-3, -1.5, -1.001, -1, -0.99, -0.5, 0, 0.3, 0.999, 1, 1.0001, 2, 7], dtype=torch.float64)
    x = (x + 1) / 2 if shifted else x
    n = torch.arange(24, dtype=torch.float64).unsqueeze(1)
    given = [mpmath.mpf(v) * (2 if shifted else 1) - shifted for v in x.tolist()]
    exact = torch.tensor([[chebyshev(kind, int(k), v) for v in given] for k in n], dtype=torch.float64)
    mine, eager = errors(as_prims(op, x, n), exact), errors(op(x, n), exact)
    assert mine <= 2 * eager + 64  # beyond degree 16, y units for sinh y
    odd = torch.tensor([math.inf, -math.inf, 0.5, 2.0], dtype=torch.float64)
    degrees = torch.tensor(
        [[-1.0], [0.0], [1.9], [3.0]], dtype=torch.float64
    )  # negative ones give 0, fractions are cut
    torch.testing.assert_close(as_prims(op, odd, degrees), op(odd, degrees), equal_nan=True)
    assert as_prims(op, torch.tensor([math.nan]), torch.tensor([3.0])).isnan()  # eager: whatever stood in memory
