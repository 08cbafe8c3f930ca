"""Half precision: roundings to the bit, and functions that are computed for them, at every number there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from primexec import make_traced
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm import vmath
from primexec.executors.llvm.target import NAMED, X86_64, Target, host

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
MINE = host().triple.split("-")[0]
TARGETS = {"host": host(), **{k: t for k, t in NAMED.items() if MINE in t.triple and t.features <= host().features}}
Function = Callable[[torch.Tensor], torch.Tensor]


def same(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where the bits are, NaN apart."""
    return (got.view(torch.int16) == expected.view(torch.int16)) | (got.isnan() & expected.isnan())


def errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """In units of the last place of half precision, against float64; none where infinities and NaN are alike."""
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(expected)[1].clamp(min=round(np.log2(info.smallest_normal)) + 1)
    error = (got.double() - expected).abs() / torch.ldexp(torch.full_like(expected, info.eps), exponent - 1)
    alike = same(got, expected.to(got.dtype)) & ~got.isfinite()
    return torch.where(alike, 0.0, error).nan_to_num(torch.inf)


@pytest.mark.parametrize("count", [1 << 17, 37, 5])
@DTYPES
def test_roundings(dtype: torch.dtype, count: int) -> None:
    """Everything half-way between two bfloat16, its neighbours among float32, and other numbers."""
    ties = (torch.arange(1 << 16) << 16) + 0x8000
    others = torch.arange(0, 1 << 32, 165521)
    x = torch.cat([ties, ties + 1, ties - 1, others]).to(torch.int32).view(torch.float32)[-count:]
    cast = make_traced(lambda x: (x.to(dtype), (x * 1.0).to(dtype)))
    for got in cast(x, executor=("llvm", "aten")):
        assert same(got, x.to(dtype)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 33, 64, 130, 1111])
def test_places_of_bfloat16(size: int) -> None:
    """Whatever lies along vectors: bfloat16 alone, which is unpacked in pairs, or other dtypes, strides and indices."""
    generator = torch.Generator().manual_seed(size)
    x, y = (torch.randn(6, size, generator=generator).bfloat16() for _ in range(2))
    row, column, wide, mask = y[0], y[:, :1], y.float(), y > 0

    def fn(x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, column: torch.Tensor, *others: torch.Tensor) -> Any:
        wide, mask = others
        alone = x * y, x * row + column, x[:, size // 3 :] - y[:, size // 3 :], column.expand_as(x) * 3
        mixed = x.float() * y, wide.bfloat16() + x, torch.where(mask, x, y), x * torch.arange(size)
        moved = x.t() * y.t(), x[:, ::2] * 3, x.flip(1) + y, torch.cat((x, y), 1) * 2, x[:, row.float().argsort()] * y
        return alone, mixed, moved, x.amax(1) + y[:, 0], x + x.amax(0), x.float().cumsum(1).bfloat16()

    a = x, y, row, column, wide, mask
    for got, eager in zip(*map(tree_leaves, (make_traced(fn)(*a, executor=("llvm", "aten")), fn(*a))), strict=True):
        assert torch.equal(got, eager)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.tanh], ids=lambda f: f.__name__)
@DTYPES
def test_every_number(function: Function, dtype: torch.dtype, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype is torch.float16 and target is X86_64:
        pytest.skip("no conversions of float16")
    monkeypatch.setattr(llvm, "host", lambda: target)
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    got = make_traced(function)(x, executor=("llvm", "aten"))
    eager = function(x)
    error = errors(got, function(x.double()))
    error[same(got, eager)] = 0  # whose sigmoid is 0 from where exp overflows
    assert float(error.max()) <= 0.51, (x[error.argmax()], got[error.argmax()])
    assert (got.signbit() == eager.signbit())[~eager.isnan()].all()
    assert float((~same(got, eager)).double().mean()) < 0.005


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@DTYPES
def test_softmax(dtype: torch.dtype, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which divides once a row; infinite maxima and rows without numbers give NaN."""
    if dtype is torch.float16 and target is X86_64:
        pytest.skip("no conversions of float16")
    monkeypatch.setattr(llvm, "host", lambda: target)
    x = (torch.randn(64, 333, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 3, 64)[:, None]).to(
        dtype
    )
    x[0, 5], x[1], x[2, ::2], x[3, 7] = torch.inf, -torch.inf, -torch.inf, torch.nan
    for rows in (x, x[:, :1], x[:, :19]):
        got = make_traced(lambda x: torch.softmax(x, -1))(rows, executor=("llvm", "aten"))
        assert float(errors(got, torch.softmax(rows.double(), -1)).max()) <= 0.515


def test_what_is_computed_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what nothing else sees: sums of two signs, float32 results and other functions may."""
    seen = []
    emit = vmath.COARSE["exp"]
    monkeypatch.setitem(vmath.COARSE, "exp", lambda x, **how: seen.append(x) or emit(x, **how))

    def coarse(fn: Function, dtype: torch.dtype = torch.bfloat16) -> bool:
        seen.clear()
        x = torch.randn(9, 70).to(dtype)
        torch.testing.assert_close(make_traced(fn)(x, executor=("llvm", "aten")), fn(x))
        return bool(seen)

    assert coarse(torch.exp)
    assert coarse(F.silu)
    assert coarse(F.softplus)
    assert coarse(lambda x: F.silu(x.float()).to(x.dtype))
    assert coarse(lambda x: (x.float().exp() / (x.float().exp() + 2).sum(1, keepdim=True)).to(x.dtype))
    assert not coarse(torch.exp, torch.float32)
    assert not coarse(lambda x: x.float().exp())
    assert not coarse(lambda x: (x.float().exp() - 1).to(x.dtype))
    assert not coarse(lambda x: (x.float().exp() + x).to(x.dtype))
    assert not coarse(lambda x: (x.float().exp().sum(1)).log().to(x.dtype))
    assert not coarse(lambda x: ((x.float().exp() * 2).sin()).to(x.dtype))
    assert not coarse(lambda x: torch.where(x.float().exp() > 1, x, 0))
