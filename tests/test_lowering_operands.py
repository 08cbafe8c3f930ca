"""What eager's kernels round, and what they refuse, before they compute; on `llvm`, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from primexec import make_traced

BOTH = ("llvm", "aten")
NUMBERS = (0.1, -0.7, 1 / 3, 257.3, 2049.0, 1e-6, 1e-8)

# Rounded beside numbers of half precision, apart from the second operand of products and quotients.
BINARY: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "add": lambda a, b: a + b,
    "radd": lambda a, b: b + a,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floor_divide": lambda a, b: a // b,
    "remainder": lambda a, b: a % b,
    "fmod": lambda a, b: torch.fmod(a, b),
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "add_": lambda a, b: a.clone().add_(b),
}
WITH_NUMBERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "clamp": lambda a, b: a.clamp(min=b),
    "masked_fill": lambda a, b: a.masked_fill(a > 0, b),
    "threshold": lambda a, b: F.threshold(a, b, b),
    "leaky_relu": lambda a, b: F.leaky_relu(a, b),
    "hardshrink": lambda a, b: F.hardshrink(a, abs(b)),
    "softshrink": lambda a, b: F.softshrink(a, abs(b)),
    "alpha": lambda a, b: a.flip(0).sub(a, alpha=b),
}


def inputs(dtype: torch.dtype) -> Tensor:
    """The numbers, rounded, what lies beside these, and others.

    As many as fill vectors: with `alpha`, eager rounds once more at the end of a tensor.
    """
    t = torch.tensor(NUMBERS).to(dtype)
    beside = [torch.nextafter(t, torch.full_like(t, end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([t, *beside, torch.randn(107, generator=torch.Generator().manual_seed(0)).to(dtype)])


def strict(fn: Callable[..., Any]) -> Callable[..., Any]:
    return make_traced(fn, executor="llvm", executor_parameters={"strict": True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*BINARY, *WITH_NUMBERS])
def test_numbers_are_rounded_as_in_eager(name: str, dtype: torch.dtype) -> None:
    fn, a = (BINARY | WITH_NUMBERS)[name], inputs(dtype)
    kinds: list[Callable[[float], Any]] = [float, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)]
    for kind in kinds if name in BINARY else kinds[:1]:
        numbers = list(map(kind, NUMBERS))
        got = strict(lambda a, numbers: [fn(a, b) for b in numbers])(a, numbers)
        for mine, b in zip(got, numbers, strict=True):
            torch.testing.assert_close(mine, fn(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["add", "rsub", "mul", "div", "alpha", "gt", "eq", "clamp"])
def test_numbers_that_vary_are_rounded_as_in_eager(name: str, dtype: torch.dtype) -> None:
    fn, a = (BINARY | WITH_NUMBERS)[name], inputs(dtype)
    traced = make_traced(fn, executor=BOTH)
    for number in NUMBERS:
        torch.testing.assert_close(traced(a, number), fn(a, number), rtol=0, atol=0, equal_nan=True)
    assert traced.cache_info().traces == 4


MASK, PLACES = torch.tensor([True, False, True]), torch.tensor([0, 2])
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "beyond int32: masked_fill": lambda x: x.int().masked_fill(MASK, 2**62) + 1,
    "beyond int32: clamp": lambda x: x.int().clamp(max=2**63) + 1,
    "beyond int32: fill_": lambda x: x.int().fill_(2**40) + 1,
    "beyond int32: full": lambda x: torch.full((3,), 2**40, dtype=torch.int32) + x.int(),
    "beyond int32: where": lambda x: torch.where(MASK, x.int(), 2**40) + 1,
    "beyond int32: scatter": lambda x: x.int().scatter(0, PLACES, 2**40) + 1,
    "beyond int32: index_fill": lambda x: x.int().index_fill(0, PLACES, 2**40) + 1,
    "beyond int32: pad": lambda x: F.pad(x.int(), (1, 1), value=2**40) + 1,
    "beyond int32: alpha": lambda x: x.int().add(x.int(), alpha=2**40) + 1,
    "beyond float16": lambda x: x.half().clamp(max=1e5) + 1,
    "beyond float32": lambda x: torch.full_like(x, 1e39) + x,
    "a negative bound": lambda x: F.smooth_l1_loss(x * 2, x, beta=-3),
    "a divisor": lambda x: F.celu(x * 2, 0.0) + 1,
    "alpha is bool": lambda x: x.add(x * 2, alpha=True) + 1,
    "no such kernel: elu": lambda x: F.elu(x.int() * 2) + 1,
    "no such kernel: softmax": lambda x: (x.int() * 2).softmax(0) + 1,
    "no such kernel: frac": lambda x: (x.int() * 2).frac() + 1,
    "no such kernel: interpolate": lambda x: F.interpolate(x.int().reshape(1, 1, 3), scale_factor=2) + 1,
    "no such kernel: unfold": lambda x: F.unfold(x.int().expand(1, 1, 3, 3), 2) + 1,
    "no such kernel: glu": lambda x: F.glu(x.int().repeat(4)) + 1,
    "no such kernel: reflection_pad1d": lambda x: F.pad((x > 0).reshape(1, 3), (1, 1), mode="reflect") ^ True,
    "mixed dtypes: cross": lambda x: torch.linalg.cross(x * 2, x.long()) + 1,
    "mixed dtypes: layer_norm": lambda x: F.layer_norm(x * 2, (3,), x.long()) + 1,
    "a value beyond float16: masked_fill": lambda x: x.half().masked_fill(MASK, x.sum() * 1e5) + 1,
    "a value beyond float16: index_fill": lambda x: x.half().index_fill(0, PLACES, x.sum() * 1e5) + 1,
    "an imaginary number": lambda x: x.int().new_full((3,), 1j) + 1,
    "True is no number": lambda x: (x.int() + 1) - True,
    "a source of another size": lambda x: x.index_add(0, PLACES, x) + 1,
    "a float into ints": lambda x: x.int().clone().mul_(2.5) + 1,
    "an int into bools": lambda x: (x > 0).mul_(2) ^ True,
    "floats of ints into ints": lambda x: x.int().logit_() + 1,
    "mixed dtypes": lambda x: torch.heaviside(x * 2, torch.tensor(1.0, dtype=torch.float64)) + 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_refuses_is_refused(name: str) -> None:
    fn, x = REFUSED[name], torch.ones(3)
    with pytest.raises((RuntimeError, NotImplementedError)) as expected:
        fn(x)
    with pytest.raises(expected.type) as got:
        make_traced(fn, executor=BOTH)(x)
    assert str(got.value) == str(expected.value)


def test_kernels_are_not_asked_where_sizes_depend_on_data() -> None:
    def counted(x: Tensor) -> Tensor:
        return torch.bincount(x, minlength=3) + 1

    traced = make_traced(counted, executor=BOTH)
    for x in (torch.tensor([0, 5]), torch.tensor([1])):
        assert torch.equal(traced(x), counted(x))


def test_numbers_that_eager_takes_stay_in_kernels() -> None:
    """Infinite bounds, those of a dtype, and what wraps."""

    def fn(x: Tensor) -> Any:
        low = torch.finfo(x.dtype).min
        y = x.masked_fill(x > 0, -torch.inf) + x.clamp(max=torch.inf) + x.masked_fill(x < 0, low)
        return y.softmax(0), F.smooth_l1_loss(x, y, beta=0.5), x.byte() * 300, x.int() > 2**40

    x = torch.tensor([0.5, -1.0, 2.0])
    for got, expected in zip(strict(fn)(x), fn(x), strict=True):
        torch.testing.assert_close(got, expected)
