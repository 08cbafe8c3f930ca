"""Half precision: roundings to the bit."""

from __future__ import annotations

import pytest
import torch

from primexec import make_traced


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit, NaN apart."""
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("count", [1 << 18, 37, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings(dtype: torch.dtype, count: int) -> None:
    """Everything half-way between two bfloat16, its neighbours among float32, and other numbers."""
    ties = (torch.arange(1 << 16) << 16) + 0x8000
    others = torch.arange(0, 1 << 32, 65521)
    x = torch.cat([ties, ties + 1, ties - 1, others]).to(torch.int32).view(torch.float32)[-count:]
    cast = make_traced(lambda x: (x.to(dtype), (x * 1.0).to(dtype)))
    for got in cast(x, executor=("llvm", "aten")):
        assert same(got, x.to(dtype))
