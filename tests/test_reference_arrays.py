"""References of whole-array prims against PyTorch in float64."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference_checks import check, run


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, NANS, INTS = randn(4, 5, 6), randn(4, 7), torch.arange(24).reshape(4, 6) * 7 % 11
NANS[1, 3] = NANS[1, 5] = NANS[2] = float("nan")
INDEX = torch.tensor([[0, 2, 1], [3, 3, 0]])
C = randn(4, 6, dtype=torch.complex128)
CASES: list[tuple[Any, ...]] = [
    ("prims.sum.default", X, [0, 2]), ("prims.prod.default", X, [1]), ("prims.amax.default", NANS, [1]),
    ("prims.amin.default", INTS, [0]), ("aten.argmax.default", NANS, 1, True), ("aten.argmin.default", NANS),
    ("aten.max.dim", NANS, 1), ("aten.min.dim", INTS, 0, True), ("aten.cumsum.default", INTS, 1),
    ("aten.cumprod.default", X, 2), ("aten.cummax.default", NANS, 1), ("aten.cummin.default", INTS, 1),
    ("aten.logcumsumexp.default", X, 0), ("aten.logcumsumexp.default", C, 1),
    ("aten.gather.default", X[:, :, 0], 0, INDEX), ("aten.index.Tensor", X, [None, INDEX, INDEX]),
    ("aten.index.Tensor", X, [INDEX, None, INDEX]), ("aten.index.Tensor", NANS, [NANS > 0]),
    ("aten.index_put.default", X[:, 0], [INDEX[0]], randn(3, 6), True),
    ("aten.scatter.src", NANS, 1, INDEX[:, :2], randn(2, 3)), ("aten.scatter.value", NANS, 0, INDEX, 2.5),
    ("aten.scatter_add.default", NANS, 0, INDEX, randn(2, 3)), ("aten.nonzero.default", INTS),
    ("aten.slice.Tensor", X, 1, -4, 99, 2), ("aten.slice_scatter.default", INTS, INTS[:, :2] + 9, 1, 1, 6, 3),
    ("aten.as_strided.default", X, [3, 4], [2, 7], 5), ("prims.cat.default", [X, X[:1]], 0),
    ("prims.rev.default", X, [0, 2]), ("prims.transpose.default", X, [2, 0, 1]), ("aten.mm.default", INTS, INTS.t()),
    ("aten.view_as_real.default", C), ("prims.view_of_dtype.default", X, torch.int64),
    ("prims.broadcast_in_dim.default", X[:, 0], [3, 4, 2, 6], [1, 3]),
    ("aten._fft_c2c.default", C, [0, 1], 1, False), ("aten._fft_r2c.default", X, [0, 2], 2, True),
    ("aten._fft_r2c.default", X, [1], 0, False), ("aten._fft_c2r.default", C, [1], 2, 11),
    ("aten.topk.default", X, 3, 1), ("aten.kthvalue.default", X, 2, 1), ("aten.median.dim", NANS[:2], 1),
    ("aten.avg_pool2d.default", X, [3, 2], [2, 2], [1, 1], True, False),
    ("aten.avg_pool2d.default", X, [3, 2], [2, 1], [1, 0], True, True),
    ("aten.avg_pool2d_backward.default", randn(4, 2, 3), X, [3, 2], [2, 2], [0, 0], False, True, None),
    ("aten.max_pool2d_with_indices.default", X, [3, 2], [2, 2], [1, 1], [1, 2], True),
    ("aten.max_pool3d_with_indices.default", X[None], [2, 2, 3]), ("aten.adaptive_max_pool2d.default", X, [3, 4]),
    ("aten.fractional_max_pool2d.default", X[None], [2, 2], [3, 4], torch.rand(1, 4, 2).double()),
    ("aten.linalg_cholesky_ex.default", X[0] @ X[0].T + torch.eye(5)), ("aten.linalg_lu_factor_ex.default", X),
    ("aten.linalg_inv_ex.default", X[:, :, :5]), ("aten.linalg_matrix_exp.default", X[:, :, :5]),
    ("aten._linalg_solve_ex.default", X[:, :, :5], X), ("aten.geqrf.default", X[0]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_case(case: tuple[Any, ...]) -> None:
    exact = {"rtol": 0.0, "atol": 0.0} if case[0].startswith(("aten.index.", "aten.gather")) else {}
    check(case[0], *case[1:], **(exact or {"rtol": 1e-12, "atol": 1e-12}))


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_scatter_reduce(reduce: str, include: bool) -> None:
    check("aten.scatter_reduce.two", X[0], 0, INDEX, randn(2, 3), reduce, include_self=include, rtol=1e-13)


@pytest.mark.parametrize("descending", [True, False])
def test_sort(descending: bool) -> None:
    for a in (NANS, INTS):
        check("aten.sort.stable", a, stable=True, dim=1, descending=descending)


@pytest.mark.parametrize(("rank", "transposed", "groups"), list(itertools.product([1, 2, 3], [False, True], [1, 2])))
def test_convolution(rank: int, transposed: bool, groups: int) -> None:
    a, spatial = randn(2, 4, *[7] * rank), [3] * rank
    w = randn(4, 6 // groups if transposed else 4 // groups, *spatial, seed=1)
    settings = ([2] * rank, [1] * rank, [2] * rank, transposed, [1 if transposed else 0] * rank, groups)
    bias = randn(6 if transposed else 4)
    check("aten.convolution.default", a, w, bias, *settings, rtol=1e-11, atol=1e-11)
    out, _ = run("aten.convolution.default", a, w, bias, *settings)
    grad = randn(*out[0].shape, seed=2)
    mask = [True, True, True]
    check("aten.convolution_backward.default", grad, a, w, [len(bias)], *settings, mask, rtol=1e-11, atol=1e-11)


def test_factors_that_are_unique_up_to_sign() -> None:
    (_, s, _), (u, values, vh) = run("aten._linalg_svd.default", X)
    np.testing.assert_allclose(values, s.numpy(), rtol=1e-12)
    np.testing.assert_allclose(u * values[..., None, :] @ vh, X.numpy(), atol=1e-12)
