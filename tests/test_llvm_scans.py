"""The executor `llvm`: cumulative scans over any dimension, bit for bit as eager, and what fuses with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_extremes import DTYPES, same, values

# Exact, and each is one kernel.
SCANS: dict[str, Callable[[Tensor], Any]] = {
    "sums of rows": lambda a: a.cumsum(1),
    "sums of columns": lambda a: a.cumsum(0),
    "products": lambda a: (a[:, :9] + 0).cumprod(1),
    "largest so far": lambda a: tuple(a.cummax(1)),
    "smallest so far": lambda a: tuple(a.cummin(0)),
    "values alone": lambda a: a.cummax(0)[0],
    "places alone": lambda a: a.cummin(1)[1],
    "transposed": lambda a: a.t().cumsum(0),
    "in between": lambda a: a[:36].reshape(4, 9, 53).cumsum(1),
    "fused before": lambda a: (a + a).cumsum(1),
    "fused after": lambda a: a.cumsum(1) - a,
    "in float64": lambda a: a.cumsum(1, dtype=torch.float64),
    "backwards": lambda a: a.flip(1).cumsum(1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scans(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a = values(dtype)
    for name, fn in SCANS.items():
        if dtype is torch.float32 or name in ("sums of rows", "sums of columns", "products", "largest so far"):
            same(run(fn, a), fn(a))
            assert kernels(compiled) == [1], name
            compiled.clear()


@pytest.mark.parametrize("rows", [3, 4, 5, 11])
def test_rows_side_by_side(rows: int) -> None:
    a = values(torch.float32)[:rows]
    for fn in (lambda a: a.cumsum(1), lambda a: tuple(a.cummax(1)), lambda a: (a * 2).cumsum(1) / 3 + a):
        same(run(fn, a), fn(a))
        same(run(fn, a[:, ::2]), fn(a[:, ::2]))
    b = data(rows, 2, 3, 7)
    same(run(lambda b: b.transpose(1, 3).cumprod(2), b), b.transpose(1, 3).cumprod(2))


@pytest.mark.parametrize("size", [31, 32, 33, 64, 1000, 70001])
def test_rows_along_lanes(size: int, compiled: list[Compiled]) -> None:  # noqa: F811
    """A single row too; what comes before is computed in vectors, and what cancels is not lost."""
    a = values(torch.float32).flatten().repeat(size // 37 + 1)[:size]
    counted, large = torch.arange(size) % 7 - 3, torch.cat([data(1, size // 2) * 1e30, data(1, size - size // 2)], 1)
    for fn, given in (
        (lambda a: a.exp().cumsum(0), torch.stack([data(size), -data(size)]).T.contiguous().T),
        (lambda a: (a.cumsum(0) - a, a.cummin(0)), a),
        (lambda a: (a[::2].cumprod(0), a.flip(0).cummax(0)), a),
        (lambda a: (a.cumsum(0), (a > 0).cumsum(0), (a + 4).cumprod(0)), counted),
        (lambda a: a.cumsum(1), large),
    ):
        torch.testing.assert_close(run(fn, given), fn(given), equal_nan=True, rtol=1e-6, atol=0)
    assert kernels(compiled)[-1] == 1
    if size >= 64:
        assert compiled[-1].llvm.count("shufflevector") >= 3


def test_scans_of_bool() -> None:
    a = data(37, 53) > 0
    for fn in (lambda a: a.cumsum(1), lambda a: a.cumprod(0), lambda a: tuple(a.cummax(1))):
        same(run(fn, a), fn(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logcumsumexp(dtype: torch.dtype) -> None:
    for a in (values(dtype), data(37, 53, dtype=dtype) * 50):
        for dim in (0, 1):
            got, expected = run(lambda a, dim=dim: a.logcumsumexp(dim), a), a.logcumsumexp(dim)
            torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_not_cut(dtype: torch.dtype) -> None:
    a = data(37, 53, dtype=dtype)
    for fn in (lambda a: a.cumsum(1), lambda a: a.cumsum(0), lambda a: (a / 4 + 1).cumprod(1), lambda a: -a.cumsum(1)):
        same(run(fn, a), fn(a))
    low = torch.full((2,), -9984.0, dtype=dtype)
    same(run(lambda a: a.logcumsumexp(0), low), low.logcumsumexp(0))


@pytest.mark.parametrize("shape", [(1,), (0, 3), (7, 1), (1, 31), (2, 3, 5), (3, 130), (130, 33)], ids=str)
def test_sizes(shape: tuple[int, ...]) -> None:
    a = (data(*shape) * 3).round()
    for dim in range(len(shape)):
        same(run(lambda a, dim=dim: (a.cumsum(dim), *a.cummax(dim)), a), (a.cumsum(dim), *a.cummax(dim)))


def test_loops_print_in_order(compiled: list[Compiled]) -> None:  # noqa: F811
    run(lambda a: a.cumsum(1), data(5, 9))
    assert "for i1 in 9, in order:" in str(compiled[0].schedule)
    assert "sum of v0 so far" in str(compiled[0].schedule)


def test_what_is_refused() -> None:
    with pytest.raises(primexec.ExecutorError, match="a scan of a number"):
        run(lambda a: a.sum().cumsum(0), data(5, 9))
