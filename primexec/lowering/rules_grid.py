"""Decompositions of sampling at the places of a grid, forward and backward, in any number of dimensions.

Along each dimension a place takes a few taps. A sample is the sum over all combinations of them, one a dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primexec.lowering.rules import rule, wide
from primexec.lowering.rules_backward import RULES
from primexec.lowering.rules_resampling import cubic

__all__ = ["RULES"]

_aten = torch.ops.aten
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


@dataclass(frozen=True, slots=True)
class _Tap:
    """One element along a dimension: its place, whether there is one, its weight, how that changes with the grid."""

    place: Tensor
    inside: Tensor
    weight: Tensor | float
    slope: Tensor | float


def _fold(x: Tensor, low: float, high: float) -> tuple[Any, Any]:
    """Reflected at two ends until between them, and the sign of the slope."""
    if low == high:
        return torch.zeros_like(x), torch.zeros_like(x)
    span = high - low
    away = (x - low).abs()
    rest = torch.fmod(away, span)
    odd = torch.fmod(torch.floor(away / span), 2) != 0
    sign = torch.where(x < low, -1.0, 1.0)
    return torch.where(odd, span - rest + low, rest + low), torch.where(odd, -sign, sign)


def _pad(x: Tensor, size: int, rank: int, padding: int, align: bool) -> tuple[Any, Any]:
    """Where a place is found by the rule for places outside, and the slope of that."""
    slope: Any = 1.0
    if padding == _REFLECTION:
        x, slope = _fold(x, 0.0, size - 1.0) if align else _fold(x, -0.5, size - 0.5)
    if padding != _ZEROS:
        slope = torch.where((x > 0) & (x < size - 1), slope, 0.0)
        x = x.clamp(0, size - 1)
        x = torch.where(x == x, x, 0.0 if rank == 2 else size - 1.0)  # what eager's two kernels make of NaN
    return x, slope


def _tap(x: Tensor, size: int, weight: Tensor | float, slope: Tensor | float) -> _Tap:
    inside = (x >= 0) & (x < size)  # false for NaN
    return _Tap(torch.where(inside, x, 0.0).to(torch.int64), inside, weight, slope)


def _taps(x: Tensor, size: int, rank: int, mode: int, padding: int, align: bool) -> list[_Tap]:
    """Along a dimension of `size` elements that the grid calls -1 to 1."""
    step = (size - 1) / 2 if align else size / 2
    x = (x + 1) / 2 * (size - 1) if align else ((x + 1) * size - 1) / 2
    if mode == _BICUBIC:
        below = torch.floor(x)
        rest = x - below
        slopes = _cubic_slopes(rest)
        return [
            _tap(_pad(below + k, size, rank, padding, align)[0], size, w, s * step)
            for k, w, s in zip(range(-1, 3), cubic(rest), slopes, strict=True)
        ]
    x, bend = _pad(x, size, rank, padding, align)
    if mode == _NEAREST:
        return [_tap(torch.round(x), size, 1.0, 0.0)]
    below, slope = torch.floor(x), bend * step
    return [_tap(below, size, below + 1 - x, -slope), _tap(below + 1, size, x - below, slope)]


def _cubic_slopes(t: Tensor, a: float = -0.75) -> list[Tensor]:
    def near(x: Tensor) -> Tensor:
        return (3 * (a + 2) * x - 2 * (a + 3)) * x

    def far(x: Tensor) -> Tensor:
        return a * ((3 * x - 10) * x + 8)

    return [far(t + 1), near(t), -near(1 - t), -far(2 - t)]


def _combinations(image: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Iterator[Any]:
    """(places in the flat image, whether they are inside, taps), places of shape batch, 1, samples."""
    sizes = image.shape[2:]
    flat = grid.reshape(grid.shape[0], 1, -1, len(sizes))
    # The last coordinate of the grid goes with the first dimension.
    along = [
        _taps(flat[..., len(sizes) - 1 - d], size, len(sizes), mode, padding, align) for d, size in enumerate(sizes)
    ]
    for taps in itertools.product(*along):
        place, inside = taps[0].place, taps[0].inside
        for tap, size in zip(taps[1:], sizes[1:], strict=True):
            place, inside = place * size + tap.place, inside & tap.inside
        yield place, inside, taps


def _product(taps: Any) -> Any:
    return math.prod(taps[1:], start=taps[0]) if taps else 1.0


@rule("aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def _sample(image: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Any:
    dtype = wide(image.dtype)
    flat = image.to(dtype).flatten(2)
    total: Any = 0.0
    for place, inside, taps in _combinations(image, grid.to(dtype), mode, padding, align):
        found = _aten.gather.default(flat, 2, place.expand(-1, flat.shape[1], -1))
        weight = _product([t.weight for t in taps])
        # Eager's kernel for two dimensions multiplies what lies outside by weights that may be NaN.
        kept = mode != _NEAREST and len(taps) == 2
        total = total + (torch.where(inside, found, 0.0) * weight if kept else torch.where(inside, found * weight, 0.0))
    return total.to(image.dtype).reshape(*image.shape[:2], *grid.shape[1:-1])


@rule("aten.grid_sampler_2d_backward.default", "aten.grid_sampler_3d_backward.default")
def _backward(
    grad: Tensor, image: Tensor, grid: Tensor, mode: int, padding: int, align: bool, output_mask: list[bool]
) -> Any:
    dtype = wide(image.dtype)
    flat, g = image.to(dtype).flatten(2), grad.to(dtype).flatten(2)
    rank = grid.shape[-1]
    places, values = [], []
    slopes: list[Any] = [torch.zeros_like(g[:, :1])] * rank
    for chosen, inside, taps in _combinations(image, grid.to(dtype), mode, padding, align):
        place = chosen.expand(-1, flat.shape[1], -1)
        places.append(place)
        values.append(torch.where(inside, g * _product([t.weight for t in taps]), 0.0))
        if mode == _NEAREST:
            continue
        found = (_aten.gather.default(flat, 2, place) * g).sum(1, keepdim=True)
        for d, tap in enumerate(taps):
            others = [t.weight for t in (*taps[:d], *taps[d + 1 :])]
            slopes[d] = slopes[d] + torch.where(inside, found * _product([tap.slope, *others]), 0.0)
    to_grid = torch.cat(slopes[::-1], 1).transpose(1, 2).reshape(grid.shape).to(grid.dtype)
    if not output_mask[0]:
        return None, to_grid
    to_image = _aten.scatter_add.default(torch.zeros_like(flat), 2, torch.cat(places, 2), torch.cat(values, 2))
    return to_image.reshape(image.shape).to(image.dtype), to_grid
