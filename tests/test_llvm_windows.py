"""The executor `llvm`: the largest elements of windows and their places, with eager's rules for ties and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.executors.llvm import layout
from primexec.executors.llvm.executor import Compiled
from primexec.testing import check_executor
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_extremes import same

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a,
    "channels-last": lambda a: a.to(memory_format=torch.channels_last),
    "transposed": lambda a: a.mT.contiguous().mT,
    "part": lambda a: torch.cat([a, a], 3)[:, :, :, 1 : a.shape[3] + 1],
    "no batch": lambda a: a[0],
}
POOLS: dict[str, dict[str, Any]] = {
    "two": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "every place": {"kernel_size": 3, "stride": 1, "padding": 1},
    "uneven": {"kernel_size": (1, 4), "stride": (3, 2), "padding": (0, 2)},
    "dilated": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": (3, 2)},
    "beyond the end": {"kernel_size": (2, 3), "stride": 3, "padding": 1, "ceil_mode": True},
    "no window beyond": {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
}


def image(dtype: torch.dtype) -> Tensor:
    """Ties everywhere; planes with NaN, of -inf, with zeros of both signs."""
    a = (data(2, 5, 11, 13) * 2).round().to(dtype)
    a[0, 0] = 1
    if dtype.is_floating_point:
        a[0, 1, 3:6, 4:8] = math.nan
        a[0, 2, :9] = a[1, 2] = -math.inf
        a[0, 3, ::2], a[0, 3, 1::2] = 0.0, -0.0
    return a


def places(a: Tensor, *names: str) -> Any:
    return [t for name in names for t in F.max_pool2d(a, **POOLS[name], return_indices=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    a, names = image(dtype), ("two", "dilated", "beyond the end")
    same(run(lambda a: places(a, *names), a), places(a, *names))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    a = LAYOUTS[layout](image(torch.float32))
    same(run(lambda a: places(a, *POOLS), a), places(a, *POOLS))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", POOLS)
def test_values_alone_are_one_kernel(name: str, layout: str, compiled: list[Compiled]) -> None:  # noqa: F811
    a = LAYOUTS[layout](image(torch.float32))
    same(run(lambda a: F.max_pool2d(a, **POOLS[name]), a), F.max_pool2d(a, **POOLS[name]))
    assert kernels(compiled) == [1]


def test_other_ranks() -> None:
    a = image(torch.float32)
    same(run(lambda a: F.max_pool1d(a[0], 3, 2, 1), a), F.max_pool1d(a[0], 3, 2, 1))
    for options in ({"kernel_size": 2}, {"kernel_size": (2, 3, 1), "stride": 1, "padding": (1, 1, 0), "dilation": 2}):
        pool = lambda a, o=options: F.max_pool3d(a, **o, return_indices=True)  # noqa: E731
        same(run(pool, a), pool(a))
    same(run(lambda a: F.max_pool2d(a[:0], 2), a), F.max_pool2d(a[:0], 2))


def test_what_comes_before_is_computed_once_an_element(compiled: list[Compiled]) -> None:  # noqa: F811
    def pooled(a: Tensor) -> Tensor:
        return F.max_pool2d(F.silu(F.silu(a * 3) - 1), 3, 2, 1)

    a = data(2, 5, 11, 13)
    torch.testing.assert_close(run(pooled, a), pooled(a))
    assert kernels(compiled) == [2]
    assert compiled[0].llvm.count("@primexec_exp") < 9


def test_large_windows_are_left_to_aten() -> None:
    traced, a = primexec.make_traced(lambda a: F.max_pool2d(a + 1, 5)), data(1, 2, 11, 13)
    assert torch.equal(traced(a, executor=("llvm", "aten")), F.max_pool2d(a + 1, 5))
    assert "a window of more than 16 elements" in str(traced.explain(a, executor=("llvm", "aten")))


def test_explain_tells_of_prims_made_of_simpler_ones() -> None:
    traced, a = primexec.make_traced(lambda a: (F.max_pool2d(a, 2), a.max(1))), data(1, 2, 11, 13)
    traced(a, executor=("llvm", "aten"))
    assert "kernel k0" in str(traced.explain(a, executor=("llvm", "aten")))


def test_conformance() -> None:
    names = [f"aten.max_pool{n}d_with_indices.default" for n in (2, 3)]
    assert not check_executor("llvm", names=names, random_programs=0).findings


def test_windows_of_lines_go_along_them(compiled: list[Compiled]) -> None:  # noqa: F811
    """Though many conditions step along the line, and none across."""
    a = data(8, 64, 128)
    assert torch.equal(run(lambda a: F.max_pool1d(a, 3, 2, 1), a), F.max_pool1d(a, 3, 2, 1))
    (kernel,) = compiled[-1].schedule.kernels
    assert layout.plan(kernel, compiled[-1].target).lane.axis == 3
