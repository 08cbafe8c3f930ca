"""Pooling by the largest element, made of simpler prims: each window is compared tap by tap, in eager's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.passes.pools import FEW_ELEMENTS, spread

_slice: Callable[..., Tensor] = torch.ops.aten.slice.Tensor


@dataclass(frozen=True, slots=True)
class _Dim:
    """A dimension that windows move along: tap `k` of window `o` is the element `o * step - before + k * apart`."""

    size: int
    taps: int
    step: int
    before: int
    apart: int
    count: int

    @classmethod
    def of(cls, size: int, taps: int, step: int, before: int, apart: int, ceil: bool) -> _Dim:
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
        sizes = spread(kernel_size, rank)
        if math.prod(sizes) > FEW_ELEMENTS:
            return f"a window of more than {FEW_ELEMENTS} elements"
        steps = spread(stride, rank) if stride else sizes
        rows = zip(a.shape[-rank:], sizes, steps, spread(padding, rank), spread(dilation, rank), strict=True)
        dims = [_Dim.of(*row, ceil_mode) for row in rows]
        return _largest(a, dict(enumerate(dims, a.dim() - rank)))

    return rule


def _padded(a: Tensor, dims: dict[int, _Dim]) -> Tensor:
    """With the least number wherever windows reach beyond the elements; laid out as they are."""
    around = {at: (d.before, max(0, d.end - d.before - d.size)) for at, d in dims.items()}
    if not any(map(any, around.values())):
        return a
    least = -math.inf if a.is_floating_point() else torch.iinfo(a.dtype).min
    order = sorted(range(a.dim()), key=lambda d: (a.stride(d), a.shape[d]), reverse=True)
    sizes = [n for d in reversed(order) for n in around.get(d, (0, 0))]
    return F.pad(a.permute(order), sizes, value=least).permute([order.index(d) for d in range(a.dim())])


def _largest(a: Tensor, dims: dict[int, _Dim]) -> tuple[Tensor, Tensor]:
    """The largest element of each window, the last NaN if there is one, and its number in the flattened plane."""
    padded = _padded(a, dims)
    starts = {at: torch.arange(d.count) * d.step - d.before for at, d in dims.items()}
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


def _number(rank: int, dims: dict[int, _Dim], along: dict[int, Tensor]) -> Tensor:
    """The numbers, in the flattened plane, of the elements at these places along each dimension."""
    found = torch.zeros((), dtype=torch.int64)
    for at, d in dims.items():
        found = found * d.size + along[at].reshape([-1 if i == at else 1 for i in range(rank)])
    return found
