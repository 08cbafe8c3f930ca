"""Views that stand between pointwise operators of `llvm`: one kernel where the shapes allow it, and eager's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401


def _normalised(x: Tensor) -> Tensor:
    """Over the last two of four dimensions."""
    centered = x - x.mean((2, 3), keepdim=True)
    return centered / (centered.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


CASES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "merged": (lambda x, y, z: torch.exp(_normalised(x).flatten(1, 2)), 1),
    "merged, with another one": (lambda x, y, z: _normalised(x).flatten(1, 2) + y, 1),
    "merged, with a transposed one": (lambda x, y, z: _normalised(x).flatten(1, 2) * y.mT.contiguous().mT, 1),
    "merged, with a broadcast one": (lambda x, y, z: _normalised(x).flatten(1, 2) * z, 1),
    "merged, under a mask": (lambda x, y, z: torch.where(_normalised(x).flatten(1, 2) > 0, y, 2.0), 1),
    "merged twice": (lambda x, y, z: (_normalised(x).flatten(1, 2) + y).flatten().sigmoid(), 1),
    "split and merged": (lambda x, y, z: torch.relu(_normalised(x).reshape(2, 2, 3, 28)), 1),
    "split and merged, with another one": (lambda x, y, z: _normalised(x).reshape(28, 12) + y.reshape(28, 12), 2),
    "merged after a copy": (lambda x, y, z: F.pixel_shuffle(x.reshape(2, 12, 2, 7), 2) * 0.5, 1),
    "unshuffled": (lambda x, y, z: F.pixel_unshuffle(y.reshape(2, 2, 6, 14) * 0.5, 2), 1),
    "rolled into windows": (lambda x, y, z: x.roll(3, 2).view(2, 3, 2, 4, 7).transpose(2, 3).reshape(6, 8, 7) + 1, 1),
    "merged for two": (lambda x, y, z: (v := _normalised(x).flatten(1, 2)).exp() + v.sum(1, keepdim=True), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_views(name: str, dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    fn, count = CASES[name]
    x, y, z = data(2, 3, 8, 7, dtype=dtype), data(2, 24, 7, dtype=dtype, seed=1), data(24, 1, dtype=dtype, seed=2)
    got, exact = run(fn, x, y, z), fn(*(t.double() for t in (x, y, z)))
    assert got.dtype == fn(x, y, z).dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    assert kernels(compiled) == [count]
