"""Maximum pools on llvm: ATen's results to the bit, in eager's layouts, whatever layout ATen is given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from primexec import make_traced

ON_LLVM: dict[str, Any] = {"executor": ("llvm", "aten")}


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ties everywhere; windows with one NaN, with several, of nothing but -inf, of zeros with either sign."""
    x = (torch.randn(shape) * 2).round().to(dtype)
    x[0, 0, 1, 2] = x[0, 1, 2, 2] = x[0, 1, 3, 2] = math.nan
    x[0, 2], x[0, 3, ::2], x[0, 3, 1::2] = -math.inf, 0.0, -0.0
    return x


POOLS: dict[str, Callable[[Tensor], Any]] = {
    "both": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "values": lambda x: F.max_pool2d(x, 2),
    "places": lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[1],
    "large": lambda x: F.max_pool2d(x, 5, 2, 2, return_indices=True),
    "large values": lambda x: F.max_pool2d(x, (3, 6)),
    "ceil mode": lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), ceil_mode=True, return_indices=True),
    "dilated": lambda x: F.max_pool2d(x, 2, 2, 1, (3, 2), return_indices=True),
    "written to": lambda x: F.max_pool2d(x.relu(), 3).add_(1),
    "view": lambda x: F.max_pool2d(x, 3)[:, 1:],
    "channels": lambda x: F.max_pool2d(x[:, :3].contiguous(), 3, return_indices=True),
    "last": lambda x: F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, return_indices=True),
    "slice": lambda x: F.max_pool2d(x[:, ::2], 3, return_indices=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str, dtype: torch.dtype) -> None:
    x = image(2, 16, 9, 11, dtype=dtype)
    traced = make_traced(POOLS[name], **ON_LLVM)
    for _ in range(2):
        got, expected = traced(x), POOLS[name](x)
        for g, e in zip(*((v,) if isinstance(v, Tensor) else v for v in (got, expected)), strict=True):
            assert (g.dtype, g.shape, g.stride(), g._is_view()) == (e.dtype, e.shape, e.stride(), e._is_view())
            torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize(("channels", "window", "last"), [(16, 5, True), (3, 5, False), (16, 4, False)])
def test_which_are_laid_out_anew(channels: int, window: int, last: bool) -> None:
    traced = make_traced(lambda x: F.max_pool2d(x, window), **ON_LLVM)
    explanation = traced.explain(torch.randn(1, channels, 8, 8))
    assert ("aten.clone" in str(explanation) or "prims.clone" in str(explanation)) == last


@pytest.mark.parametrize("window", [3, 5])
def test_training(window: int) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(window, 2, 1), nn.Conv2d(16, 4, 3))

    torch.manual_seed(0)
    eager = net()
    model = copy.deepcopy(eager)
    traced = make_traced(model, **ON_LLVM)
    x = torch.randn(2, 3, 16, 16)
    for _ in range(2):
        expected, got = eager(x), traced(x)
        torch.testing.assert_close(got, expected)
        expected.sin().sum().backward()
        got.sin().sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert traced.cache_info().traces == 1
    explanation = str(traced.explain(x))
    saved, eagers = explanation.partition("saved for backward: ")[2].partition(" bytes (eager: ")[::2]
    assert saved == eagers.partition(" ")[0]
