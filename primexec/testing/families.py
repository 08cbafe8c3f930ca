"""The table of what is tried: for each prim its arguments and its tolerance. The dtypes are those of the prim's row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primexec.prims import TABLE
from primexec.testing import samples as s
from primexec.testing import samples_whole as w
from primexec.testing.determined import (
    Determined,
    eigen,
    factors,
    hermitian_eigen,
    ldl,
    nothing,
    orthogonal,
    places,
    singular,
)
from primexec.testing.values import ALL, DTYPES, HALVES


@dataclass(frozen=True, slots=True)
class Row:
    """How one prim is tried.

    Attributes:
        samples: makes arguments from a `Draw`.
        tolerance: the name of a row in `tolerance.TOLERANCES`.
        determined: what of the results is determined, computed from the arguments and them; None for all of it.
        scale: what rounding errors are measured by, where the tolerance grows: `terms` for the reference on the
            absolute values of its arguments, `largest` for the largest result, `total` for the sum of all arguments.
        complex_tolerance: the row for complex arguments, where that is another one.
        native: the values depend on the dtype itself, so that they are not computed in float64.
        stand_in: what is the oracle in place of the NumPy reference, on tensors; its docstring says why.
    """

    samples: s.Samples
    tolerance: str
    determined: Determined | None = None
    scale: str = "terms"
    native: bool = False
    complex_tolerance: str = ""
    stand_in: Callable[..., Any] | None = None


def _same_bits(a: Tensor, dtype: torch.dtype) -> Tensor:
    """References hold 16-bit floats as float32, which has other bits."""
    return a.clone().view(dtype)


def _neighbour(a: Tensor, b: Tensor) -> Tensor:
    """References hold 16-bit floats as float32, which has other neighbours."""
    if a.dtype not in HALVES:
        with np.errstate(over="ignore"):  # the largest number's neighbour is infinite
            return torch.from_numpy(np.asarray(np.nextafter(a.numpy(), b.numpy())))
    bits = a.view(torch.int16).to(torch.int32)
    place = torch.where(bits < 0, -32768 - bits, bits)  # the numbers of the dtype in order; both zeros are 0
    place = place + (b > a).int() - (b < a).int()
    made = torch.where(place < 0, -32768 - place, place).to(torch.int16).view(a.dtype)
    made = torch.where((place == 0) & (a < 0), -torch.zeros_like(a), made)
    return torch.where(a == b, b, torch.where(a.isnan() | b.isnan(), a + b, made))


def _ldl_factors(a: Tensor) -> tuple[Tensor, ...]:
    """Which pivots are chosen is LAPACK's affair: eager PyTorch in float64."""
    return tuple(torch.linalg.ldl_factor_ex(a))


def _ldl_solution(factored: Tensor, pivots: Tensor, b: Tensor, *, hermitian: bool) -> Tensor:
    """How pivots are written down is LAPACK's affair: eager PyTorch in float64."""
    solution: Tensor = torch.linalg.ldl_solve(factored, pivots, b, hermitian=hermitian)
    return solution


# Why prims are not compared with a reference.
UNCHECKED = {
    "aten.copy_.default": "it writes to memory of the caller's: executors are never offered it",
    "aten._linalg_check_errors.default": "it exists for its error",
    "aten._assert_async.msg": "it exists for its error",
    **{name: "it talks to other processes" for name, row in TABLE.items() if row.effects == "collective"},
}
# Dtypes that a prim's row names and that are not tried.
UNTRIED = {
    ("aten.view_as_complex.default", torch.float16): "the reference has no arrays of complex32",
    **{("aten.binomial.default", dtype): "PyTorch has kernels for these on GPUs only" for dtype in HALVES},
}

# Where functions have poles or branch points, the values are drawn from between them.
_DOMAIN: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("acos", "asin", "atanh", "erf_inv"), (-0.99, 0.99)),
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), (0.01, 10)),
    "acosh": (1, 10), "log1p": (-0.9, 10), "ndtri": (0.01, 0.99), "digamma": (0.5, 10), "lgamma": (0.5, 10),
}  # fmt: skip


def _unary(names: str, tolerance: str, *, special: bool = True) -> dict[str, Row]:
    rows = {}
    for name in names.split():
        low, high = _DOMAIN.get(name, (-4, 4))
        rows[f"prims.{name}.default"] = Row(
            s.pointwise(1, low=low, high=high, special=special, large=special), tolerance
        )
    return rows


def _binary(names: str, tolerance: str, samples: s.Samples) -> dict[str, Row]:
    return {f"prims.{name}.default": Row(samples, tolerance) for name in names.split()}


_ELEMENTARY = "acos acosh asin asinh atan atanh cos cosh exp expm1 log log10 log1p log2 sin sinh tan tanh"
_BESSEL = "bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 spherical_bessel_j0"

_POINTWISE: dict[str, Row] = {
    **_unary(f"{_ELEMENTARY} erf erfc exp2 rsqrt sqrt", "pointwise"),
    **_unary("reciprocal", "rounded"),
    **_unary(f"erf_inv erfcx ndtri digamma lgamma {_BESSEL}", "special", special=False),
    "prims.abs.default": Row(s.pointwise(1), "exact", complex_tolerance="pointwise"),
    **_unary("neg sign signbit ceil floor round trunc isfinite bitwise_not conj_physical", "exact"),
    "prims.frexp.default": Row(s.pointwise(1, special=False), "exact"),
    **_binary("add sub mul", "rounded", s.pointwise(2, number=2.5)),
    "prims.div.default": Row(s.pointwise(2, number=2.5, divides=True), "rounded"),
    **_binary("fmod remainder", "rounded", s.pointwise(2, nonzero=True, special=False, divides=True)),
    **_binary("maximum minimum fmax fmin", "selected", s.pointwise(2)),
    **_binary("eq ne lt le gt ge", "exact", s.pointwise(2, number=2)),
    **_binary("atan2 hypot", "pointwise", s.pointwise(2)),
    "prims.pow.default": Row(s.pointwise(2), "pointwise", complex_tolerance="power"),
    **_binary("igamma igammac", "special", s.pointwise(2, low=0.1, high=10, special=False, large=False)),
    **_binary("zeta", "special", s.pointwise(2, low=1.5, high=10, special=False, large=False)),
    "prims.nextafter.default": Row(s.pointwise(2), "exact", native=True, stand_in=_neighbour),
    **_binary("gcd", "exact", s.pointwise(2, low=-60, high=60, special=False)),
    **_binary("bitwise_and bitwise_or bitwise_xor", "exact", s.pointwise(2)),
    **_binary("shift_left shift_right_arithmetic", "exact", s.pointwise(2, low=0, high=6, special=False)),
    "prims.where.default": Row(s.selection, "exact"),
    "prims.convert_element_type.default": Row(s.conversion(ALL), "rounded"),
}

_BROADCASTS = (
    ((), ((2, 3), ())), ((3,), ((3, 3), (0,))), ((3,), ((3, 3), (1,))), ((3, 1), ((3, 5), (0, 1))),
    ((2, 4), ((2, 3, 4), (0, 2))), ((1,), ((0,), (0,))), ((513,), ((127, 513), (1,))),
)  # fmt: skip
_PLAIN = (((), ()), ((0,), ()), ((3, 5), ()), ((127, 513), ()))

_SHAPES: dict[str, Row] = {
    name: Row(samples, "exact")
    for name, samples in {
        "prims.broadcast_in_dim.default": s.static(*_BROADCASTS),
        "prims.squeeze.default": s.static(((1, 3, 1), ([0, 2],)), ((1, 3, 1), ([2],)), ((1,), ([0],))),
        "prims.transpose.default": s.static(
            ((), ([],)), ((3, 5), ([1, 0],)), ((2, 3, 4), ([2, 0, 1],)), ((2, 0, 3), ([1, 2, 0],)),
            ((127, 513), ([1, 0],)),
        ),
        "aten.view.default": s.static(
            ((), ([1],)), ((12,), ([3, -1],)), ((3, 5), ([5, 3],)), ((0, 3), ([3, 0],)), ((2, 3, 4), ([6, 4],)),
            layouts=False,
        ),
        "aten.slice.Tensor": s.static(
            ((7,), (0, 1, 6)), ((7,), (0, 0, 7, 3)), ((3, 5), (1, -3, -1)), ((3, 5), (0, 2, 2)),
            ((5,), (0, 0, 2**63 - 1)),
        ),
        "aten.as_strided.default": s.static(
            ((12,), ((3, 2), (4, 1), 0)), ((7,), ((3, 3), (1, 2), 0)), ((5,), ((2,), (2,), 1)), layouts=False
        ),
        "prims.view_of.default": s.static(*_PLAIN),
        "prims.conj.default": s.static(*_PLAIN),
        "prims.real.default": s.static(*_PLAIN),
        "prims.imag.default": s.static(*_PLAIN),
        "aten.view_as_real.default": s.static(*_PLAIN),
        "aten.view_as_complex.default": s.static(((2,), ()), ((3, 5, 2), ()), ((0, 2), ()), layouts=False),
        "prims.rev.default": s.static(((7,), ([0],)), ((3, 5), ([1],)), ((2, 3, 4), ([0, 2],)), ((0, 3), ([0],))),
        "prims.cat.default": s.concatenation,
        "prims.clone.default": s.static(*_PLAIN),
        "aten.slice_scatter.default": s.slices_written,
        "prims.as_strided_scatter.default": s.rewriting,
        "prims.device_put.default": s.static(*((shape, (s.CPU,)) for shape, _ in _PLAIN)),
        "prims.full.default": s.factory(((), 1), ((0,), 1), ((3, 5), 1), ((127, 513), 1)),
        "aten.gather.default": w.gathering,
        "aten.index.Tensor": w.indexing,
        "aten.nonzero.default": w.nonzero,
        "aten.scatter.src": w.scattering(True),
        "aten.scatter.value": w.scattering(False),
    }.items()
}  # fmt: skip
_SHAPES |= {
    "prims.view_of_dtype.default": Row(s.reinterpretation, "exact", native=True, stand_in=_same_bits),
    "prims.iota.default": Row(s.iota, "exact"),
    "prims.empty_strided.default": Row(s.factory(((), ()), ((3, 5), (5, 1)), ((3, 5), (1, 3))), "exact", nothing),
}

_REDUCTIONS: dict[str, Row] = {
    "prims.sum.default": Row(s.reduction(), "sum"),
    "prims.prod.default": Row(s.reduction(low=0.5, high=1.5, large=False), "product"),
    "prims.amax.default": Row(s.reduction(empty=False), "selected"),
    "prims.amin.default": Row(s.reduction(empty=False), "selected"),
    **{f"aten.{n}": Row(w.ordered(), "selected") for n in ("argmax.default", "argmin.default", "max.dim", "min.dim")},
    # PyTorch's own kernels take the wrong element of an expanded tensor.
    **{f"aten.{n}": Row(w.ordered(layouts=False), "exact", places) for n in ("median.dim", "nanmedian.dim")},
    "aten.mode.default": Row(w.ordered(special=False), "exact", places),
    "aten.kthvalue.default": Row(w.kth, "exact", places),
    "aten.cumsum.default": Row(s.along(), "scan"),
    "aten.cumprod.default": Row(s.along(low=0.5, high=1.5), "product"),
    "aten.cummax.default": Row(s.along(), "exact"),
    "aten.cummin.default": Row(s.along(), "exact"),
    "aten.logcumsumexp.default": Row(s.along(), "scan"),
    "aten.sort.stable": Row(w.sorting, "exact"),
    "aten.topk.default": Row(w.selecting, "exact", places),
    "aten.searchsorted.Tensor": Row(w.searching, "exact"),
    "aten.scatter_add.default": Row(w.scattering(True, repeats=True), "scan"),
    "aten.scatter_reduce.two": Row(w.scatter_reducing, "product"),
    "aten.index_put.default": Row(w.index_writing, "scan"),
}

_PRODUCTS: dict[str, Row] = {
    "aten.mm.default": Row(w.products(batched=False), "matmul"),
    "aten.bmm.default": Row(w.products(batched=True), "matmul"),
    "aten.convolution.default": Row(w.convolutions, "matmul"),
    "aten.convolution_backward.default": Row(w.convolutions_backward, "matmul"),
    **{f"aten.avg_pool{n}d.default": Row(w.pooling(n), "scan") for n in (2, 3)},
    **{
        f"aten.avg_pool{n}d_backward.default": Row(w.pooling(n, False, True, None, backward=True), "scan")
        for n in (2, 3)
    },
    **{f"aten.max_pool{n}d_with_indices.default": Row(w.pooling(n), "exact") for n in (2, 3)},
    **{f"aten.adaptive_max_pool{n}d.default": Row(w.adaptive_pooling(n), "exact") for n in (2, 3)},
    **{f"aten.fractional_max_pool{n}d.default": Row(w.fractional_pooling(n), "exact") for n in (2, 3)},
    **{f"aten._fft_{kind}.default": Row(w.transforms(kind), "fft", scale="total") for kind in ("c2c", "r2c", "c2r")},
}


def _linalg(samples: s.Samples, determined: Determined | None = None) -> Row:
    return Row(samples, "linalg", determined, "largest")


_LINALG: dict[str, Row] = {
    f"aten.{name}.default": row
    for name, row in {
        "_linalg_svd": _linalg(w.matrices((), (True,), (False, False), square=False), singular),
        "_linalg_eigh": _linalg(w.matrices((), ("U",), ("L", False), hermitian=True), hermitian_eigen),
        "linalg_eig": _linalg(w.matrices(), eigen),
        "linalg_qr": _linalg(w.matrices((), ("complete",), ("r",), square=False), factors),
        "linalg_cholesky_ex": _linalg(w.matrices(hermitian=True)),
        "linalg_lu_factor_ex": _linalg(w.matrices(square=False, turned=True)),
        "lu_unpack": _linalg(w.factored),
        "linalg_lu_solve": _linalg(w.systems("lu")),
        "linalg_solve_triangular": _linalg(w.systems("triangle")),
        "linalg_inv_ex": _linalg(w.matrices(turned=True)),
        "_linalg_solve_ex": _linalg(w.systems("solve")),
        "linalg_ldl_factor_ex": Row(w.matrices(hermitian=True), "linalg", ldl, "largest", stand_in=_ldl_factors),
        "linalg_ldl_solve": Row(w.systems("ldl"), "linalg", scale="largest", stand_in=_ldl_solution),
        "linalg_householder_product": _linalg(w.reflectors(product=False)),
        "geqrf": _linalg(w.matrices(square=False), orthogonal),
        "ormqr": _linalg(w.reflectors(product=True)),
        "linalg_matrix_exp": Row(w.matrices(), "linalg"),
    }.items()
}

ROWS: dict[str, Row] = {**_POINTWISE, **_SHAPES, **_REDUCTIONS, **_PRODUCTS, **_LINALG}

# Random draws are compared with eager's under the same seed.
DRAWS: dict[str, s.Samples] = {
    "aten.rand.default": w.sized(),
    "aten.randn.default": w.sized(),
    "aten.randint.low": w.sized(1, 9),
    "aten.randperm.default": w.permuted,
    "aten.uniform.default": w.shaped(-1.0, 2.0),
    "aten.normal_functional.default": w.shaped(1.0, 2.0),
    "aten.bernoulli.default": w.shaped(low=0, high=1),
    "aten.bernoulli.p": w.shaped(0.25),
    "aten.exponential.default": w.shaped(2.0),
    "aten.geometric.default": w.shaped(0.25),
    "aten.cauchy.default": w.shaped(1.0, 2.0),
    "aten.log_normal.default": w.shaped(0.5, 0.5),
    "aten.random.from": w.shaped(1, 9),
    "aten.multinomial.default": w.weights,
    "aten.poisson.default": w.shaped(low=0, high=9),
    "aten.binomial.default": w.trials,
}

NAMES = (*ROWS, *DRAWS)


def dtypes_of(name: str) -> list[torch.dtype]:
    """The dtypes that a prim is tried at.

    >>> dtypes_of("aten._fft_r2c.default")
    [torch.float32, torch.float64]
    """
    named = [DTYPES[d] for d in TABLE[name].dtypes.split()]
    return [d for d in named if (name, d) not in UNTRIED]
