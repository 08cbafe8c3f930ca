"""The executor `llvm`: the largest elements of windows and their places, with eager's rules for ties and NaN; means."""

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


MEANS: dict[str, dict[str, Any]] = {
    **{name: options for name, options in POOLS.items() if "dilation" not in options},
    "of elements alone": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    "of elements beyond": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True},
    "by a divisor": {"kernel_size": 2, "stride": 1, "divisor_override": 3},
}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float64, "contiguous"), (torch.bfloat16, "contiguous"), *((torch.float32, layout) for layout in LAYOUTS)],
)
def test_means(dtype: torch.dtype, layout: str) -> None:
    a = LAYOUTS[layout](image(dtype))
    means = lambda a: [F.avg_pool2d(a, **options) for options in MEANS.values()]  # noqa: E731
    for actual, expected in zip(run(means, a), means(a), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "contiguous") for name in MEANS), *(("overlapping", layout) for layout in LAYOUTS)],
)
def test_gradients_of_means(name: str, layout: str) -> None:
    a = LAYOUTS[layout](data(2, 5, 11, 13).double()).requires_grad_()
    mean = lambda a: F.avg_pool2d(a * a, **MEANS[name]).exp()  # noqa: E731
    traced, tangent = primexec.make_traced(mean, executor=("llvm", "aten")), torch.rand_like(mean(a))
    (actual,), (expected,) = (torch.autograd.grad(f(a), a, tangent) for f in (traced, mean))
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    declined = "declined 1 x aten.avg_pool2d_backward" in str(traced.explain(a))
    assert declined == (layout == "channels-last")


def test_means_of_other_ranks() -> None:
    a = data(2, 5, 11, 13)
    for pool in (lambda a: F.avg_pool1d(a[0], 3, 2, 1), lambda a: F.avg_pool3d(a, (2, 3, 1), 1, (1, 1, 0))):
        same(run(pool, a), pool(a))


def test_means_of_integers_and_large_windows_are_left_to_aten() -> None:
    for a, size, why in ((data(1, 2, 11, 13), 5, "more than 16"), (torch.arange(36).reshape(1, 6, 6), 2, "integers")):
        traced = primexec.make_traced(lambda a, size=size: F.avg_pool2d(a, size), executor=("llvm", "aten"))
        assert torch.equal(traced(a), F.avg_pool2d(a, size))
        assert why in str(traced.explain(a))


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


def _pools(rank: int) -> list[str]:
    return [f"max_pool{rank}d_with_indices", f"avg_pool{rank}d", f"avg_pool{rank}d_backward"]


def test_conformance() -> None:
    names = [f"aten.{pool}.default" for n in (2, 3) for pool in _pools(n)]
    assert not check_executor("llvm", names=names, random_programs=0).findings


def test_windows_of_lines_go_along_them(compiled: list[Compiled]) -> None:  # noqa: F811
    """Though many conditions step along the line, and none across."""
    a = data(8, 64, 128)
    assert torch.equal(run(lambda a: F.max_pool1d(a, 3, 2, 1), a), F.max_pool1d(a, 3, 2, 1))
    (kernel,) = compiled[-1].schedule.kernels
    assert layout.plan(kernel, compiled[-1].target).lane.axis == 3
