"""Attention whose queries come in groups that share keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from tests.test_llvm import data

_Repeat = Callable[[Tensor, int], Tensor]


def _expanded(t: Tensor, groups: int) -> Tensor:
    """As transformers do it."""
    batch, heads, length, size = t.shape
    return t[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)


def _interleaved(t: Tensor, groups: int) -> Tensor:
    return t.repeat_interleave(groups, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, repeat: _Repeat = _expanded, **kw: Any) -> Any:
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat(k, groups), repeat(v, groups), mask, **kw)


def _case(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [data(2, heads, n, 16, dtype=dtype, seed=heads) for heads, n in ((6, rows), (2, 40), (2, 40))]


def _exact(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return fn(*(a.double() if a.is_floating_point() else a for a in args))


@pytest.mark.parametrize("repeat", [_expanded, _interleaved])
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_keys_are_not_repeated(rows: int, repeat: _Repeat) -> None:
    args, attend = _case(rows), partial(_attend, repeat=repeat)
    traced = primexec.make_traced(attend, executor="llvm")
    torch.testing.assert_close(traced(*args), _exact(attend, *args).float(), rtol=1e-5, atol=1e-6)
    assert "clone" not in str(traced.explain(*args))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("heads", [1, 6], ids=["one mask", "a mask a head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_masks(dtype: torch.dtype, heads: int, rows: int) -> None:
    args = [*_case(rows, dtype), data(2, heads, rows, 40) > -0.5]
    got = primexec.make_traced(_attend, executor="llvm")(*args)
    exact, eager = _exact(_attend, *args), _attend(*args)
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + torch.finfo(dtype).eps


@torch.no_grad()
def test_causal() -> None:
    args, attend = _case(40), partial(_attend, is_causal=True)
    got = primexec.make_traced(attend, executor="llvm")(*args)
    torch.testing.assert_close(got, _exact(attend, *args).float(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_keys_written_after_they_were_repeated() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeated = _expanded(k, 3)
        k.zero_()
        return F.scaled_dot_product_attention(q, repeated, _expanded(v, 3))

    q, k, v = _case(5)
    expected = attend(q, k.clone(), v)
    torch.testing.assert_close(primexec.make_traced(attend, executor="llvm")(q, k, v), expected)
    assert not k.any()


@torch.no_grad()
def test_repeated_keys_that_are_returned() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeated = _expanded(k, 3)
        return F.scaled_dot_product_attention(q, repeated, _expanded(v, 3)), repeated

    args = _case(5)
    torch.testing.assert_close(primexec.make_traced(attend, executor="llvm")(*args), attend(*args))


@torch.no_grad()
def test_keys_and_values_repeated_in_other_numbers() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, _expanded(k, 3), _expanded(v, 6))

    q, k, v = _case(5)
    args = q, k, v[:, :1].contiguous()
    torch.testing.assert_close(primexec.make_traced(attend, executor="llvm")(*args), attend(*args))


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients(rows: int) -> None:
    args = [t.requires_grad_() for t in _case(rows)]
    traced = primexec.make_traced(_attend, executor="llvm")
    weights = data(2, 6, rows, 16, seed=9)
    got = torch.autograd.grad((traced(*args) * weights).sum(), args)
    expected = torch.autograd.grad((_attend(*args) * weights).sum(), args)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("executor", ["aten", "llvm"])
@pytest.mark.parametrize("mask", [(3, 16), (0, 16), (5, 1, 1, 16), (1, 1, 2, 1, 16)], ids=str)
def test_a_mask_larger_than_the_scores_is_refused_as_by_eager(mask: tuple[int, ...], executor: str) -> None:
    args = [data(1, 2, 1, 4), data(1, 2, 16, 4), data(1, 2, 16, 4), torch.zeros(mask)]
    for fn in (F.scaled_dot_product_attention, primexec.make_traced(F.scaled_dot_product_attention, executor=executor)):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            fn(*args)


@pytest.mark.parametrize("rows", [None, 3, 1], ids=["vector", "matrix", "row"])
@pytest.mark.parametrize("batch", [(), (2,), (5, 2)], ids=str)
def test_masks_of_scores_whose_batches_are_broadcast(batch: tuple[int, ...], rows: int | None) -> None:
    """A key of a larger batch than the query's makes the scores as large."""
    mask = data(16) if rows is None else data(*batch, rows, 16)
    args = [data(2, 3, 4), data(*batch, 16, 4), data(*batch, 16, 4), mask]
    got = primexec.make_traced(F.scaled_dot_product_attention)(*args)
    torch.testing.assert_close(got, _exact(F.scaled_dot_product_attention, *args).float())
