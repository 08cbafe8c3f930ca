"""Integers among numbers of half precision are rounded where eager rounds them."""

from __future__ import annotations

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
