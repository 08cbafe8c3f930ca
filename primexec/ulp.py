"""How far two tensors are apart: absolutely, relatively, and in units in the last place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True, slots=True)
class Error:
    """The largest differences between two tensors, each over all elements.

    Attributes:
        absolute: of |a - b|.
        relative: of |a - b| / |b|; infinite where b is zero and a is not.
        ulps: of |a - b| in units in the last place of b in the dtype of the program; of integers and booleans,
            how many elements differ.
        index: the element with the most ulps; None where nothing differs or there is no element.
    """

    absolute: float = 0.0
    relative: float = 0.0
    ulps: float = 0.0
    index: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.absolute:.3g} absolute, {self.relative:.3g} relative, {self.ulps:.3g} ulp"


def is_floating(dtype: torch.dtype) -> bool:
    """Whether values of the dtype are rounded: floating-point and complex."""
    return dtype.is_floating_point or dtype.is_complex


def finfo(dtype: torch.dtype) -> torch.finfo:
    """The limits of a floating-point dtype, and of the parts of a complex one."""
    return torch.finfo(_REAL.get(dtype, dtype))


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each number, or complex number's length, in float64.

    Next to infinities it is that of the largest number, and NaN counts as 0.

    >>> spacing(torch.tensor([1.0, -1.5, 2.0]), torch.bfloat16)
    tensor([0.0078, 0.0078, 0.0156], dtype=torch.float64)
    """
    limits = finfo(dtype)
    magnitude = x.abs().double().nan_to_num(0.0)
    exponent = torch.frexp(magnitude.clamp(limits.tiny, limits.max)).exponent
    return limits.eps * torch.exp2((exponent - 1).double())


def difference(got: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """|got - expected| in float64 for each element; infinite where one is not a number or not finite alone.

    A number too large for `dtype` counts as the infinity that it rounds to.
    """
    wide = torch.complex128 if dtype.is_complex else torch.float64
    got, expected = got.detach().to(wide), expected.detach().to(wide)
    if dtype.is_complex:
        parts = [difference(g, e, _REAL[dtype]) for g, e in zip(_parts(got), _parts(expected), strict=True)]
        return torch.hypot(*parts)
    limits = finfo(dtype)
    overflow = limits.max * (1 + limits.eps / 4)
    apart = (got - expected).abs()
    if apart.numel() == 0 or max(got.abs().max().item(), expected.abs().max().item()) < overflow:
        return apart  # all are numbers, and finite: max is NaN where one is not
    got, expected = (torch.where(t.abs() >= overflow, t.sign() * math.inf, t) for t in (got, expected))
    same = (got == expected) | (got.isnan() & expected.isnan())
    apart = (got - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(same, 0.0, apart)


def _parts(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.view_as_real(t.resolve_conj()).unbind(-1)  # type: ignore[return-value]


def measure(got: Tensor, expected: Tensor, dtype: torch.dtype) -> Error:
    """The largest differences between two tensors of one shape; `dtype` is the program's, `expected` may be wider.

    >>> measure(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), torch.float32)
    Error(absolute=0.5, relative=0.25, ulps=2097152.0, index=(1,))
    """
    if got.numel() == 0:
        return Error()
    if not is_floating(dtype):
        apart = (got.detach() != expected.detach()).double()
        size = (got.detach().double() - expected.detach().double()).abs()
        return Error(size.max().item(), _ratio(size, expected.double().abs()), apart.sum().item(), _worst(apart))
    apart = difference(got, expected, dtype)
    magnitude = expected.detach().abs().double()
    ulps = (apart / spacing(magnitude, dtype)).nan_to_num(nan=math.inf, posinf=math.inf)
    return Error(apart.max().item(), _ratio(apart, magnitude), ulps.max().item(), _worst(ulps))


def _ratio(apart: Tensor, magnitude: Tensor) -> float:
    ratio = torch.where(apart == 0, 0.0, apart / magnitude)
    return ratio.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def _worst(apart: Tensor) -> tuple[int, ...] | None:
    if not apart.any():
        return None
    index = torch.unravel_index(apart.flatten().argmax(), apart.shape)
    return tuple(int(i) for i in index)
