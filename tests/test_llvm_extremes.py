"""The executor `llvm`: extremes and their places, with eager's rules for ties and NaN; any and all; norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def values(dtype: torch.dtype) -> Tensor:
    """Ties in every row and column; rows of one value, with one NaN, with several, of infinities."""
    a = (data(37, 53) * 2).round().to(dtype)
    a[3] = 1
    if dtype.is_floating_point:
        a[5, 7] = a[6, 50] = a[6, 2] = math.nan
        a[7], a[8] = -math.inf, math.inf
        a[9, ::2], a[9, 1::2] = 0.0, -0.0
    return a


# Each is one kernel.
PLACES: dict[str, Callable[[Tensor], Any]] = {
    "argmax of rows": lambda a: a.argmax(1),
    "argmin of columns": lambda a: a.argmin(0),
    "argmax of all": lambda a: a.argmax(),
    "argmin of all, kept": lambda a: a.argmin(keepdim=True),
    "kept": lambda a: a.argmax(-1, keepdim=True),
    "transposed": lambda a: a.t().argmax(),
    "max of rows": lambda a: tuple(a.max(1)),
    "min of columns, kept": lambda a: tuple(a.min(0, keepdim=True)),
    "values alone": lambda a: a.max(0).values,
    "places alone": lambda a: a.min(1).indices,
    "fused": lambda a: (a + a).argmax(1) * 2 + 1,
    "middle": lambda a: a[:36].reshape(4, 9, 53).max(1)[1],
    "one column": lambda a: tuple(a[:, :1].max(1)),
    "a number": lambda a: tuple(a[0, 0].max(0)),
}


def same(got: Any, expected: Any) -> None:
    for g, e in zip(*((v,) if isinstance(v, Tensor) else v for v in (got, expected)), strict=True):
        assert (g.dtype, g.shape, g.stride()) == (e.dtype, e.shape, e.stride())
        assert torch.equal(g.double().nan_to_num(7.5), e.double().nan_to_num(7.5))
        if g.is_floating_point():
            assert torch.equal(g.isnan(), e.isnan())
            assert torch.equal(g.signbit() & ~g.isnan(), e.signbit() & ~e.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a = values(dtype)
    for name, fn in PLACES.items():
        if dtype is torch.float32 or name in ("max of rows", "min of columns, kept", "argmax of all"):
            same(run(fn, a), fn(a))
            assert kernels(compiled) == [1], name
            compiled.clear()


def test_extremes_of_bool() -> None:
    a = data(37, 53) > 1
    for dim in (0, 1):
        same(run(lambda a, dim=dim: (*a.max(dim), *a.min(dim)), a), (*a.max(dim), *a.min(dim)))


@pytest.mark.parametrize("shape", [(1,), (7, 1), (1, 31), (2, 3, 5), (3, 1030), (1030, 3), (70000,)], ids=str)
def test_sizes(shape: tuple[int, ...]) -> None:
    a = (data(*shape) * 3).round()
    for dim in range(len(shape)):
        same(run(lambda a, dim=dim: (a.argmin(dim), *a.max(dim)), a), (a.argmin(dim), *a.max(dim)))
    same(run(lambda a: a.argmax(), a), a.argmax())


TESTS: dict[str, Callable[[Tensor], Any]] = {
    "any": lambda a: (a > 2).any(1),
    "all": lambda a: (a > -2).all(0),
    "any of all": lambda a: (a > 99).any(),
    "all of numbers": lambda a: a.all(1, keepdim=True),
    "any of nothing": lambda a: (a[:0] > 0).any(0),
    "norm": lambda a: torch.linalg.vector_norm(a.double(), 2, 1),
    "norm, infinite": lambda a: torch.linalg.vector_norm(a.double(), math.inf, 1),
    "norm, 3": lambda a: torch.linalg.vector_norm(a.double(), 3, 1),
    "variance and mean": lambda a: torch.var_mean(a.double(), 1),
    "aminmax": lambda a: tuple(torch.aminmax(a, dim=1)),
}


@pytest.mark.parametrize("name", TESTS)
def test_other_reductions(name: str, compiled: list[Compiled]) -> None:  # noqa: F811
    fn, a = TESTS[name], data(37, 53)
    torch.testing.assert_close(run(fn, a), fn(a))
    assert kernels(compiled) == [1]


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.is_floating_point], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33, 64, 130])
def test_one_nan_anywhere(size: int, dtype: torch.dtype) -> None:
    a = data(size + 2, size).to(dtype)
    a.fill_diagonal_(math.nan)
    a[size] = -math.inf

    def fn(a: Tensor) -> tuple[Tensor, ...]:
        return a.amax(1), a.amin(1), a.amax(), a[size:].amin(), a.t().amax(0), a.float().logsumexp(1).isnan()

    for got, eager in zip(run(fn, a), fn(a), strict=True):
        assert torch.equal(got.nan_to_num(7.0), eager.nan_to_num(7.0))
