"""Convolutions of few terms, which are kernels: stencils whose sums stay in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import primexec
from tests.test_llvm import data

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
# Shapes of image and weight, stride, padding, dilation, groups.
Case = tuple[tuple[int, ...], tuple[int, ...], Any, Any, Any, int]
CASES: dict[str, Case] = {
    "depthwise": ((2, 8, 12, 13), (8, 1, 3, 3), 1, 1, 1, 8),
    "an image of one channel": ((2, 1, 33, 35), (1, 1, 3, 3), 1, 1, 1, 1),
    "gray from colours": ((2, 3, 17, 19), (1, 3, 3, 3), 1, 1, 1, 1),
    "several of one": ((2, 3, 17, 19), (6, 1, 3, 3), 1, 0, 1, 3),
    "pairs": ((2, 6, 9, 9), (4, 3, 3, 3), 1, 1, 1, 2),
    "steps": ((2, 3, 13, 11), (3, 1, 3, 5), 2, 1, 1, 3),
    "other steps": ((2, 3, 13, 21), (3, 1, 3, 3), (1, 3), (0, 2), (2, 1), 3),
    "apart": ((2, 4, 17, 19), (4, 1, 3, 3), 1, 2, 2, 4),
    "a blur": ((1, 3, 40, 40), (3, 1, 11, 11), 1, 5, 1, 3),
    "a filter": ((3, 1, 200), (1, 1, 31), 1, 15, 1, 1),
    "causal": ((2, 16, 50), (16, 1, 4), 1, 3, 1, 16),
    "one row": ((1, 1, 1000), (1, 1, 5), 1, 0, 1, 1),
    "volumes": ((2, 4, 6, 7, 8), (4, 1, 3, 3, 3), 1, 1, 1, 4),
    "one result": ((2, 2, 7, 7), (2, 1, 7, 7), 1, 0, 1, 2),
    "wide": ((1, 1, 9, 2000), (1, 1, 3, 5), 1, 1, 1, 1),
}

IMAGES = [name for name, case in CASES.items() if len(case[0]) == 4]


def _case(case: Case, dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[Callable[..., Tensor], Any]:
    shape, taps, stride, padding, dilation, groups = case
    image, weight, bias = (
        data(*shape, dtype=dtype),
        data(*taps, dtype=dtype, seed=1),
        data(taps[0], dtype=dtype, seed=2),
    )
    if last:
        image = image.contiguous(memory_format=torch.channels_last)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return _CONVOLUTIONS[x.dim()](x, w, b, stride, padding, dilation, groups)

    return fn, (image, weight, bias)


def _is_kernel(traced: Any, *args: Tensor) -> bool:
    return "(reduced)" in str(traced.explain(*args))


def _check(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(got.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_results(name: str, dtype: torch.dtype) -> None:
    fn, args = _case(CASES[name], dtype)
    traced = primexec.make_traced(fn, executor="llvm")
    _check(traced(*args), fn(*args), fn(*(a.double() for a in args)))
    assert _is_kernel(traced, *args)


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_channels_last(name: str) -> None:
    fn, args = _case(CASES[name], last=True)
    _check(primexec.make_traced(fn, executor="llvm")(*args), fn(*args), fn(*(a.double() for a in args)))


@pytest.mark.parametrize("padding", [1, "same"])
@torch.inference_mode()
def test_channels_last_in_inference_mode(padding: int | str) -> None:
    """PyTorch leaves the operator whole there."""
    x, w = data(2, 8, 9, 9).contiguous(memory_format=torch.channels_last), data(8, 1, 3, 3, seed=1)
    got = primexec.make_traced(F.conv2d, executor="llvm")(x, w, padding=padding, groups=8)
    _check(got, F.conv2d(x, w, padding=padding, groups=8), F.conv2d(x.double(), w.double(), padding=1, groups=8))


@torch.no_grad()
def test_what_is_around_belongs_to_the_kernels() -> None:
    """The padded image is made of what comes before, and what comes after is computed where sums are in registers."""

    def fn(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        made = F.conv2d(F.silu(x), w, b, padding=1, groups=x.shape[1])
        return F.relu(made * scale[:, None, None]) + x

    args = [data(2, 5, 14, 14), data(5, 1, 3, 3, seed=1), data(5, seed=2), data(5, seed=3)]
    traced = primexec.make_traced(fn, executor="llvm")
    _check(traced(*args), fn(*args), fn(*(a.double() for a in args)))
    assert str(traced.explain(*args)).count("region0: kernel") == 2


@torch.no_grad()
def test_what_pytorch_computes_in_full_blocks_is_left_to_it() -> None:
    for shape, taps, groups in [((2, 8, 12, 12), (16, 8, 3, 3), 1), ((2, 16, 7, 7), (16, 1, 5, 5), 16)]:
        args = [data(*shape), data(*taps, seed=1)]
        traced = primexec.make_traced(lambda x, w, groups=groups: F.conv2d(x, w, padding=1, groups=groups))
        torch.testing.assert_close(traced(*args), F.conv2d(*args, padding=1, groups=groups))
        assert not _is_kernel(traced, *args)


def _gradients(fn: Callable[..., Tensor], args: Any, like: Tensor) -> list[Tensor]:
    given = [a.detach().clone(memory_format=torch.preserve_format).requires_grad_() for a in args]
    fn(*given).backward(like.to(given[0].dtype))
    return [g for a in given if (g := a.grad) is not None]


@pytest.mark.parametrize(("name", "last"), [*((n, False) for n in CASES), *((n, True) for n in IMAGES)])
def test_gradients(name: str, last: bool) -> None:
    fn, args = _case(CASES[name], last=last)
    like = data(*fn(*args).shape, seed=3)
    traced = primexec.make_traced(fn, executor="llvm")
    exact = _gradients(fn, [a.double() for a in args], like)
    for row in zip(_gradients(traced, args, like), _gradients(fn, args, like), exact, strict=True):
        _check(*row)


@given(data_=st.data())
@torch.no_grad()
def test_any_sizes(data_: st.DataObject) -> None:
    draw = data_.draw
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per, made = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    taps = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, dilation * (n - 1))) for n in taps)
    sizes = tuple(dilation * (n - 1) + draw(st.integers(1, 20)) for n in taps)
    case = (
        (draw(st.integers(1, 2)), groups * per, *sizes),
        (groups * made, per, *taps),
        stride,
        padding,
        dilation,
        groups,
    )
    fn, args = _case(case, draw(st.sampled_from([torch.float32, torch.float64])), rank == 2 and draw(st.booleans()))
    _check(primexec.make_traced(fn, executor="llvm")(*args), fn(*args), fn(*(a.double() for a in args)))


@torch.no_grad()
def test_nan_and_infinities_reach_what_they_reach_in_eager_mode() -> None:
    fn, (x, w, b) = _case(CASES["depthwise"])
    x[0, 0, 3, 3], x[0, 1, 0, 0], x[1, 2, 11, 12] = float("nan"), float("inf"), -float("inf")
    torch.testing.assert_close(primexec.make_traced(fn, executor="llvm")(x, w, b), fn(x, w, b), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_rows_are_cut_among_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fn, args = _case(((1, 1, 700, 333), (1, 1, 3, 3), 1, 1, 1, 1))
        _check(primexec.make_traced(fn, executor="llvm")(*args), fn(*args), fn(*(a.double() for a in args)))
    finally:
        torch.set_num_threads(before)
