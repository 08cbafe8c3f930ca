"""Half precision beside integers, which are rounded where eager rounds them, and beside parameters of float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec

BINARY: list[Callable[[Tensor, Tensor], Any]] = [
    torch.add, torch.sub, torch.mul, torch.div, torch.floor_divide, torch.remainder, torch.atan2, torch.maximum,
    torch.hypot, torch.rsub, torch.eq, torch.lt, torch.ge,
]  # fmt: skip
EXACT = [f for f in BINARY if f not in (torch.atan2, torch.hypot)]


@pytest.mark.parametrize("shape", [(64,), ()], ids=["many", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fn", BINARY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("executor", [("llvm", "aten"), "numpy"], ids=["llvm", "numpy"])
def test_integers(executor: Any, fn: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    halves = (torch.arange(1, 65) * (4 if dtype is torch.bfloat16 else 32) + 1).to(dtype)
    whole = torch.full(shape, 257 if dtype is torch.bfloat16 else 2049)
    traced = primexec.make_traced(fn, executor=executor)
    for args in ((halves, whole), (whole, halves)):
        tolerance = {"rtol": 0.0, "atol": 0.0} if fn in EXACT else {"rtol": 0.01, "atol": 0.0}
        torch.testing.assert_close(traced(*args), fn(*args), **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(12), torch.nn.GroupNorm(3, 12), torch.nn.BatchNorm1d(12)], ids=str)
@pytest.mark.parametrize("executor", [("llvm", "aten"), "aten"], ids=["llvm", "aten"])
def test_statistics_of_norms_that_autocast_gives_half_precision(executor: Any, norm: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12), copy.deepcopy(norm))
    x, weights = torch.randn(8, 16), torch.randn(8, 12)

    def gradients(run: Any, model: torch.nn.Module, x: Tensor, enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=enabled):
            result = run(x)
        assert result.dtype is (dtype if enabled else torch.float64)
        (result.to(x.dtype) * weights).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    others = [copy.deepcopy(model) for _ in range(2)]
    eager = gradients(model, model, x, True)
    ours = gradients(primexec.make_traced(others[0], executor=executor), others[0], x, True)
    exact = gradients(others[1].double(), others[1], x.double(), False)
    for mine, own, right in zip(ours, eager, exact, strict=True):
        assert mine.dtype is own.dtype is torch.float32
        error = (own - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (mine - right).abs().max() <= 2 * error
