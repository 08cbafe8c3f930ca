"""Pooling by the largest element and by the mean, made of simpler prims: windows tap by tap, in eager's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.lowering.rules import wide
from primexec.passes.pools import FEW_ELEMENTS, spread

_slice: Callable[..., Tensor] = torch.ops.aten.slice.Tensor


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension that windows move along: tap `k` of window `o` is the element `o * step - before + k * apart`."""

    size: int
    taps: int
    step: int
    before: int
    apart: int
    count: int

    @classmethod
    def of(cls, size: int, taps: int, step: int, before: int, apart: int, ceil: bool) -> Dim:
        room = size + 2 * before - apart * (taps - 1) - 1
        count = (room + (step - 1 if ceil else 0)) // step + 1
        if ceil and (count - 1) * step >= size + before:  # a window must begin inside
            count -= 1
        return cls(size, taps, step, before, apart, count)

    @property
    def end(self) -> int:
        """One past the last element, of the padded dimension, that a window takes."""
        return (self.count - 1) * self.step + (self.taps - 1) * self.apart + 1

    def window(self, a: Tensor, dim: int, tap: int) -> Tensor:
        start = tap * self.apart
        return _slice(a, dim, start, start + (self.count - 1) * self.step + 1, self.step)

    def starts(self) -> Tensor:
        """Where each window starts."""
        return torch.arange(self.count) * self.step - self.before

    def elements(self, padded: bool) -> Tensor | int:
        """How many elements each window takes, those of the padding included where `padded`."""
        first, end = (-self.before, self.size + self.before) if padded else (0, self.size)
        if first <= -self.before and self.end - self.before <= end:
            return self.taps
        starts = self.starts()
        return (starts + self.taps).clamp(max=end) - starts.clamp(min=first)

    def turned_round(self) -> Dim:
        """The windows, of those that begin at every element, which take an element."""
        return Dim(self.count, self.taps, 1, self.taps - 1 - self.before, 1, self.size)

    def given_back(self, a: Tensor, dim: int) -> Any:
        """For each element the sum over the windows that take it."""
        places = torch.arange(self.size) + self.before
        last = ((places.double() + 0.5) / self.step).to(torch.int64)  # the last window that starts before the element
        total: Any = 0
        for back in range(-(-self.taps // self.step)):
            window = last - back
            takes = (window >= 0) & (window < self.count) & (places - window * self.step < self.taps)
            part = a.index_select(dim, window.clamp(0, self.count - 1))
            total = total + torch.where(takes.reshape([-1 if d == dim else 1 for d in range(a.dim())]), part, 0.0)
        return total


def _dims(
    a: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> dict[int, Dim] | str:
    """The dimensions that windows move along; or why their taps are too many."""
    sizes = spread(kernel_size, rank)
    if math.prod(sizes) > FEW_ELEMENTS:
        return f"a window of more than {FEW_ELEMENTS} elements"
    steps = spread(stride, rank) if stride else sizes
    rows = zip(a.shape[-rank:], sizes, steps, spread(padding, rank), spread(dilation, rank), strict=True)
    return {at: Dim.of(*row, ceil) for at, row in enumerate(rows, a.dim() - rank)}


def _dims_of_means(
    a: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, ceil: bool
) -> dict[int, Dim] | str:
    if not a.is_floating_point():
        return "means of integers are cut towards zero"
    return _dims(a, rank, kernel_size, stride, padding, 1, ceil)


def max_pool(rank: int) -> Callable[..., Any]:
    """The operator `max_pool{rank}d_with_indices`."""

    def rule(
        a: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        ceil_mode: bool = False,
    ) -> Any:
        dims = _dims(a, rank, kernel_size, stride, padding, dilation, ceil_mode)
        return dims if isinstance(dims, str) else _largest(a, dims)

    return rule


def mean_pool(rank: int) -> Callable[..., Any]:
    """The operator `avg_pool{rank}d`."""

    def rule(
        a: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] | int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        dims = _dims_of_means(a, rank, kernel_size, stride, padding, ceil_mode)
        if isinstance(dims, str):
            return dims
        divisor = _divisor(a.dim(), dims, count_include_pad, divisor_override)
        return (_sums(a.to(wide(a.dtype)), dims) / divisor).to(a.dtype)

    return rule


def mean_pool_backward(rank: int) -> Callable[..., Any]:
    """The operator `avg_pool{rank}d_backward`."""

    def rule(
        grad: Tensor,
        a: Tensor,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil: bool,
        padded: bool,
        divisor: int | None,
    ) -> Any:
        dims = _dims_of_means(a, rank, kernel_size, stride, padding, ceil)
        if isinstance(dims, str):
            return dims
        found = grad.to(wide(a.dtype)) / _divisor(a.dim(), dims, padded, divisor)
        if all(d.step == 1 for d in dims.values()):
            return _sums(found, {at: d.turned_round() for at, d in dims.items()}).to(a.dtype)
        for at, d in dims.items():
            found = d.given_back(found, at)
        return found.to(a.dtype)

    return rule


def _sums(a: Tensor, dims: dict[int, Dim]) -> Any:
    """The sum of each window."""
    padded = pad(a, dims, 0)
    total: Any = 0.0  # as in eager, which tells it from a sum of negative zeros
    for taps in itertools.product(*(range(d.taps) for d in dims.values())):
        part = padded
        for (at, d), tap in zip(dims.items(), taps, strict=True):
            part = d.window(part, at, tap)
        total = total + part
    return total


def _divisor(rank: int, dims: dict[int, Dim], padded: bool, override: int | None) -> Any:
    """What the sums of windows are divided by."""
    found: Any = 1
    for at, d in dims.items():
        elements = d.elements(padded)
        if isinstance(elements, Tensor):
            elements = elements.reshape([-1 if i == at else 1 for i in range(rank)])
        found = found * elements
    return found if override is None else override


def pad(a: Tensor, dims: dict[int, Dim], value: float) -> Tensor:
    """With a value wherever windows reach beyond the elements; laid out as they are."""
    around = {at: (d.before, max(0, d.end - d.before - d.size)) for at, d in dims.items()}
    if not any(map(any, around.values())):
        return a
    order = sorted(range(a.dim()), key=lambda d: (a.stride(d), a.shape[d]), reverse=True)
    sizes = [n for d in reversed(order) for n in around.get(d, (0, 0))]
    return F.pad(a.permute(order), sizes, value=value).permute([order.index(d) for d in range(a.dim())])


def _largest(a: Tensor, dims: dict[int, Dim]) -> tuple[Tensor, Tensor]:
    """The largest element of each window, the last NaN if there is one, and its number in the flattened plane."""
    padded = pad(a, dims, -math.inf if a.is_floating_point() else torch.iinfo(a.dtype).min)
    starts = {at: d.starts() for at, d in dims.items()}
    place = _number(a.dim(), dims, {at: torch.where(s < 0, s % dims[at].apart, s) for at, s in starts.items()})
    best = None
    for taps in itertools.product(*(range(d.taps) for d in dims.values())):
        value, here = padded, dict(starts)
        for (at, d), tap in zip(dims.items(), taps, strict=True):
            value, here[at] = d.window(value, at, tap), starts[at] + tap * d.apart
        if best is None:
            best, place = value, place.expand(value.shape)
            continue
        larger = (value > best) | (value != value)
        best = torch.where(larger, value, best)
        place = torch.where(larger, _number(a.dim(), dims, here), place)
    assert best is not None
    return best, place


def _number(rank: int, dims: dict[int, Dim], along: dict[int, Tensor]) -> Tensor:
    """The numbers, in the flattened plane, of the elements at these places along each dimension."""
    found = torch.zeros((), dtype=torch.int64)
    for at, d in dims.items():
        found = found * d.size + along[at].reshape([-1 if i == at else 1 for i in range(rank)])
    return found
