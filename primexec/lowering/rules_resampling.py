"""Decompositions of linear maps along dimensions, and of their transposes: edge padding, adaptive means, resizing.

Such a map is a list of taps: each says for every element of the result which element of the argument it takes, and
by which weight. The map gathers and adds up; its transpose scatters and adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from primexec.lowering.rules import NoExpansionError, rule, wide
from primexec.lowering.rules_indexing import RULES

__all__ = ["RULES"]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Taps:
    """What each element of the result takes: tensors of shape (number of taps, elements of the result).

    Attributes:
        places: which elements of the argument.
        weights: None for 1.
        taken: whether it takes it at all; None for always.
    """

    places: Tensor
    weights: Tensor | None = None
    taken: Tensor | None = None

    def weigh(self, a: Tensor, dim: int) -> Tensor:
        """The elements of `a`, a dimension of taps before `dim`; what is not taken is 0, though it be infinite."""
        shape = [1] * dim + [*self.places.shape] + [1] * (a.dim() - dim - 2)
        a = a if self.weights is None else a * self.weights.reshape(shape)
        return a if self.taken is None else torch.where(self.taken.reshape(shape), a, 0.0)


def _gather(a: Tensor, dim: int, taps: _Taps) -> Any:
    found = _aten.index.Tensor(a, [None] * dim + [taps.places.flatten()])
    return taps.weigh(found.unflatten(dim, taps.places.shape), dim).sum(dim)


def _scatter(a: Tensor, dim: int, size: int, taps: _Taps) -> Any:
    zeros = torch.zeros([*a.shape[:dim], size, *a.shape[dim + 1 :]], dtype=a.dtype, device=a.device)
    values = taps.weigh(a.unsqueeze(dim), dim).flatten(dim, dim + 1)
    return _aten.index_put.default(zeros, [None] * dim + [taps.places.flatten()], values, True)


def _along_last(a: Tensor, maps: Sequence[Callable[[Tensor, int], Any]]) -> Any:
    """A map for each of the last dimensions; 16-bit floats are rounded once."""
    result = a.to(wide(a.dtype))
    for dim, apply in enumerate(maps, a.dim() - len(maps)):
        result = apply(result, dim)
    return result.to(a.dtype)


# Padding ------------------------------------------------------------------------------------------------


def _padded(a: Tensor, padding: list[int], edge: Callable[[Tensor, int, int, bool], Tensor]) -> Any:
    """Each dimension between its edges; a negative number cuts off. `edge`: argument, dimension, size, whether last."""
    for dim, before, after in zip(range(a.dim() - 1, -1, -1), padding[::2], padding[1::2], strict=False):
        inside = a.narrow(dim, max(0, -before), a.shape[dim] + min(before, 0) + min(after, 0))
        edges = [edge(a, dim, n, last) if n > 0 else None for n, last in ((before, False), (after, True))]
        parts = [t for t in (edges[0], inside, edges[1]) if t is not None]
        a = torch.cat(parts, dim) if len(parts) > 1 else inside
    return a.clone()


def _reflected(a: Tensor, dim: int, count: int, last: bool) -> Tensor:
    return a.narrow(dim, a.shape[dim] - 1 - count if last else 1, count).flip(dim)


def _repeated(a: Tensor, dim: int, count: int, last: bool) -> Tensor:
    sizes = [count if d == dim else -1 for d in range(a.dim())]
    return a.narrow(dim, a.shape[dim] - 1 if last else 0, 1).expand(sizes)


for _rank in (1, 2, 3):
    rule(f"aten.reflection_pad{_rank}d.default")(partial(_padded, edge=_reflected))
    rule(f"aten.replication_pad{_rank}d.default")(partial(_padded, edge=_repeated))


@rule(*(f"aten.replication_pad{n}d_backward.default" for n in (1, 2, 3)))
def _replication_pad_backward(grad: Tensor, a: Tensor, padding: list[int]) -> Any:
    """What the edges were repeated to is added up there; where something was cut off stands 0."""

    def apply(before: int, after: int, size: int, g: Tensor, dim: int) -> Any:
        cut = [0, 0] * (g.dim() - 1 - dim) + [max(0, -before), max(0, -after)]
        g = _aten.constant_pad_nd.default(g, cut) if any(cut) else g
        before, after = max(0, before), max(0, after)
        if size == 1:
            return g.sum(dim, keepdim=True)
        edges = ((0, before), (before + size - 1, after))
        first, last = (g.narrow(dim, start, n + 1).sum(dim, keepdim=True) for start, n in edges)
        return torch.cat([first, g.narrow(dim, before + 1, size - 2), last], dim)

    rows = list(zip(padding[-2::-2], padding[-1::-2], strict=True))
    sizes = a.shape[a.dim() - len(rows) :]
    return _along_last(grad, [partial(apply, *row, size) for row, size in zip(rows, sizes, strict=True)])


# Means --------------------------------------------------------------------------------------------------


def _spread(size: int, g: Tensor, dim: int) -> Any:
    """The transpose of the adaptive mean along a dimension."""
    count = g.shape[dim]
    if size % count == 0:  # the windows do not overlap
        window = [-1] * dim + [-1, size // count] + [-1] * (g.dim() - dim - 1)
        return (g / (size // count)).unsqueeze(dim + 1).expand(window).flatten(dim, dim + 1)
    longest = max(-((-(i + 1) * size) // count) - i * size // count for i in range(count))
    i = torch.arange(count, device=g.device, dtype=torch.float64)  # quotients of sizes are exact enough to cut
    start = torch.floor(i * size / count).to(torch.int64)
    end = torch.ceil((i + 1) * size / count).to(torch.int64)
    places = start + torch.arange(longest, device=g.device).unsqueeze(1)
    weights = (1 / (end - start).to(g.dtype)).expand(places.shape)
    return _scatter(g, dim, size, _Taps(places.clamp(max=size - 1), weights, places < end))


def _adaptive_mean_backward(rank: int, grad: Tensor, a: Tensor) -> Any:
    if not grad.numel():
        return torch.zeros_like(a)
    return _along_last(grad, [partial(_spread, size) for size in a.shape[-rank:]])


for _rank in (2, 3):
    rule(f"aten._adaptive_avg_pool{_rank}d_backward.default")(partial(_adaptive_mean_backward, _rank))


# Resizing -----------------------------------------------------------------------------------------------

_Resizing = Callable[[int, int, bool, float | None, torch.dtype, Any], _Taps]


def _scale(size: int, out: int, align_corners: bool, scale: float | None) -> float:
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else size / out


def _nearest(size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any) -> _Taps:
    """As the kernels: in float32 for every dtype, and the scale given does not count where the sizes fit."""
    step = _scale(size, out, False, None if out in (size, 2 * size) else scale)
    places = torch.arange(out, device=device, dtype=torch.float32) * step
    return _Taps(places.to(torch.int64).clamp(max=size - 1).unsqueeze(0))


def _nearest_exact(size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any) -> _Taps:
    places = (torch.arange(out, device=device, dtype=torch.float32) + 0.5) * _scale(size, out, False, scale)
    return _Taps(places.to(torch.int64).clamp(max=size - 1).unsqueeze(0))


def _centers(size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any) -> Tensor:
    i = torch.arange(out, device=device, dtype=dtype)
    step = _scale(size, out, align, scale)
    return i * step if align else (i + 0.5) * step - 0.5


def _linear(size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any) -> _Taps:
    if size == out:
        return _Taps(torch.arange(out, device=device).unsqueeze(0))
    center = _centers(size, out, align, scale, dtype, device).clamp(min=0)
    below = center.floor().clamp(max=size - 1)
    rest = (center - below).clamp(0, 1)
    place = below.to(torch.int64)
    return _Taps(torch.stack([place, (place + 1).clamp(max=size - 1)]), torch.stack([1 - rest, rest]))


def cubic(t: Tensor, a: float = -0.75) -> list[Tensor]:
    """Keys' cubic convolution: the weights of the four neighbours of a point, t behind the second."""
    near, far = (
        ((a + 2) * x * x * x - (a + 3) * x * x + 1 for x in (t, 1 - t)),
        (a * (x * x * x - 5 * x * x + 8 * x - 4) for x in (t + 1, 2 - t)),
    )
    (second, third), (first, fourth) = near, far
    return [first, second, third, fourth]


def _cubic(size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any) -> _Taps:
    center = _centers(size, out, align, scale, dtype, device)
    below = center.floor()
    weights = torch.stack(cubic((center - below).clamp(0, 1)))
    places = below.to(torch.int64) + torch.arange(-1, 3, device=device).unsqueeze(1)
    return _Taps(places.clamp(0, size - 1), weights)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _keys(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near, far = (a + 2) * x * x * x - (a + 3) * x * x + 1, a * (x * x * x - 5 * x * x + 8 * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _antialiased(
    filter_: Callable[[Tensor], Tensor], radius: int,
    size: int, out: int, align: bool, scale: float | None, dtype: Any, device: Any,
) -> _Taps:  # fmt: skip
    """A filter as wide as the elements of the result are in the argument, its weights divided by their sum."""
    step = _scale(size, out, align, scale)
    stretch = max(step, 1.0)
    center = (torch.arange(out, device=device, dtype=dtype) + 0.5) * step
    low = (center - radius * stretch + 0.5).to(torch.int64).clamp(min=0)
    high = (center + radius * stretch + 0.5).to(torch.int64).clamp(max=size)
    places = low + torch.arange(math.ceil(radius * stretch) * 2 + 1, device=device).unsqueeze(1)
    taken = places < high
    weights = torch.where(taken, filter_((places - center + 0.5) * (1 / stretch)), 0.0)
    return _Taps(places.clamp(max=size - 1), weights / weights.sum(0), taken)


# Operator: taps, and whether corners may be aligned; the backward operators follow from them.
_RESIZING: dict[str, tuple[_Resizing, bool]] = {
    **{f"upsample_nearest{n}d": (_nearest, False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": (_nearest_exact, False) for n in (1, 2, 3)},
    "upsample_linear1d": (_linear, True),
    "upsample_bilinear2d": (_linear, True),
    "upsample_trilinear3d": (_linear, True),
    "upsample_bicubic2d": (_cubic, True),
    "_upsample_bilinear2d_aa": (partial(_antialiased, _triangle, 1), True),
    "_upsample_bicubic2d_aa": (partial(_antialiased, _keys, 2), True),
}


def _halved(taps: _Resizing, size: int, scale: float | None, g: Tensor, dim: int) -> Any:
    """The transpose of twice or half as many elements, each the nearest one; None for other sizes."""
    count = g.shape[dim]
    step = _scale(size, count, False, scale)
    if (count, step) == (2 * size, 0.5):
        pairs = g.unflatten(dim, (size, 2))
        return pairs.select(dim + 1, 0) + pairs.select(dim + 1, 1)
    if (2 * count, step) == (size, 2.0):
        none = torch.zeros_like(g)
        spread = torch.stack([g, none] if taps is _nearest else [none, g], dim + 1)
        return spread.flatten(dim, dim + 1)
    return None


def _resize_backward(taps: _Resizing, aligns: bool, grad: Tensor, output_size: Any, input_size: Any, *rest: Any) -> Any:
    """`rest` holds whether corners are aligned, where that is a choice, and the scales that were given."""
    align, scales = (rest[0], rest[1:]) if aligns else (False, rest)
    sizes = input_size[2:]
    if taps is _cubic and list(sizes) == list(output_size):
        return grad.clone()  # as the kernel, whatever the scales
    scales = (*scales, *[None] * (len(sizes) - len(scales)))

    def apply(size: int, scale: float | None, g: Tensor, dim: int) -> Any:
        halved = _halved(taps, size, scale, g, dim) if taps in (_nearest, _nearest_exact) else None
        if halved is not None:
            return halved
        return _scatter(g, dim, size, taps(size, g.shape[dim], align, scale, g.dtype, g.device))

    return _along_last(grad, [partial(apply, size, scale) for size, scale in zip(sizes, scales, strict=True)])


def _of_floats(a: Tensor) -> None:
    if not a.is_floating_point():
        raise NoExpansionError("integers are resized with weights in fixed point")


@rule("aten.upsample_bilinear2d.default", "aten.upsample_bicubic2d.default")
def _not_of_integers(a: Tensor, *rest: Any) -> Any:
    _of_floats(a)
    return NotImplemented


def _resize(taps: _Resizing, a: Tensor, output_size: Any, align: bool, *scales: float | None) -> Any:
    _of_floats(a)
    if list(a.shape[2:]) == list(output_size):
        return a.clone()  # as the kernel, whatever the scales
    scales = (*scales, *[None] * (len(output_size) - len(scales)))

    def apply(out: int, scale: float | None, x: Tensor, dim: int) -> Any:
        return _gather(x, dim, taps(x.shape[dim], out, align, scale, x.dtype, x.device))

    return _along_last(a, [partial(apply, out, scale) for out, scale in zip(output_size, scales, strict=True)])


for _name, (_taps, _aligns) in _RESIZING.items():
    rule(f"aten.{_name}_backward.default")(partial(_resize_backward, _taps, _aligns))
    if _name.endswith("_aa"):
        rule(f"aten.{_name}.default")(partial(_resize, _taps))
