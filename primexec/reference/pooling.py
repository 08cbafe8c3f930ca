"""Pooling over windows, in two and three dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, at, smallest
from primexec.reference.registry import reference

Sizes = Sequence[int] | int


def _spread(values: Sizes, rank: int) -> tuple[int, ...]:
    """One value for each spatial dimension; a single one stands for all."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values if len(values) == rank else values * rank


def _count(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows there are; with ceil_mode the last one may reach past the padding but must not start there."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _windows(
    shape: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Iterator[tuple[tuple[int, ...], list[tuple[int, int, int]]]]:
    """The coordinates of each output place, and start, end and size of its window along each dimension.

    The start may be negative; end and size reach into the padding.
    """
    counts = [_count(*a, ceil_mode) for a in zip(shape, kernel, stride, padding, dilation, strict=True)]
    for place in itertools.product(*map(range, counts)):
        window = []
        for i, n, k, s, p, d in zip(place, shape, kernel, stride, padding, dilation, strict=True):
            start = i * s - p
            end = min(start + d * (k - 1) + 1, n + p)
            window.append((start, end, end - start))
        yield place, window


def _inside(window: Sequence[tuple[int, int, int]], shape: Sequence[int]) -> tuple[Any, ...]:
    return (..., *(slice(max(a, 0), min(b, n)) for (a, b, _), n in zip(window, shape, strict=True)))


def _divisor(window: Any, shape: Sequence[int], include_pad: bool, override: int | None) -> int:
    if override is not None:
        return override
    if include_pad:
        return math.prod(size for _, _, size in window)
    return math.prod(min(b, n) - max(a, 0) for (a, b, _), n in zip(window, shape, strict=True))


def _avg_windows(
    shape: Sequence[int], kernel_size: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool, include: bool, divide: Any
) -> list[tuple[tuple[Any, ...], tuple[Any, ...], int]]:
    """(output place, input slices, divisor) of every window."""
    rank = len(shape)
    kernel = _spread(kernel_size, rank)
    steps = _spread(stride, rank) if stride != [] and stride != () else kernel
    windows = _windows(shape, kernel, steps, _spread(padding, rank), (1,) * rank, ceil_mode)
    return [(at(*place), _inside(w, shape), _divisor(w, shape, include, divide)) for place, w in windows]


def _outputs(shape: Sequence[int], places: Sequence[tuple[Any, ...]], rank: int) -> tuple[int, ...]:
    """The shape of the output, whose last place is the last one listed."""
    return (*shape[: len(shape) - rank], *(i + 1 for i in places[-1][-rank:]))


def _avg_pool(self: Array, rank: int, *settings: Any) -> Array:
    windows = _avg_windows(self.shape[-rank:], *settings)
    result = np.zeros(_outputs(self.shape, [w[0] for w in windows], rank), self.dtype)
    axes = tuple(range(-rank, 0))
    for place, inside, divisor in windows:
        total = self[inside].sum(axes, dtype=self.dtype)
        # Integers are cut towards zero.
        result[place] = total / divisor if self.dtype.kind == "f" else np.trunc(total / divisor)
    return result


def _avg_pool_backward(grad: Array, self: Array, rank: int, *settings: Any) -> Array:
    result = np.zeros(self.shape, self.dtype)
    for place, inside, divisor in _avg_windows(self.shape[-rank:], *settings):
        result[inside] += grad[place][(..., *[None] * rank)] / divisor
    return result


def _avg_forward(rank: int) -> Callable[..., Array]:
    def avg_pool(
        self: Array,
        kernel_size: Sizes,
        stride: Sizes = (),
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Array:
        """The mean over windows, divided by the override or by the window's size with or without padding."""
        return _avg_pool(self, rank, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    return avg_pool


def _avg_backward(rank: int) -> Callable[..., Array]:
    def avg_pool_backward(
        grad_output: Array,
        self: Array,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Array:
        """The gradient of avg_pool with respect to its input."""
        settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return _avg_pool_backward(grad_output, self, rank, *settings)

    return avg_pool_backward


def _largest_of(rows: Array) -> Any:
    """The index along the last axis of the first largest element, or of the last NaN."""
    first = np.argmax(rows, -1)
    if rows.dtype.kind != "f":
        return first
    missing = np.isnan(rows)
    return np.where(missing.any(-1), rows.shape[-1] - 1 - np.argmax(missing[..., ::-1], -1), first)


def _max_over(
    self: Array, rank: int, windows: Sequence[tuple[tuple[int, ...], tuple[Any, ...]]]
) -> tuple[Array, Array]:
    """The largest element of each window and its position in the flattened plane."""
    positions = np.arange(math.prod(self.shape[-rank:])).reshape(self.shape[-rank:])
    shape = _outputs(self.shape, [place for place, _ in windows], rank)
    values, indices = np.full(shape, smallest(self.dtype), self.dtype), np.zeros(shape, np.int64)
    lead = self.shape[: self.ndim - rank]
    for place, inside in windows:
        rows = self[inside].reshape(*lead, -1)
        best = _largest_of(rows)
        values[at(*place)] = np.take_along_axis(rows, best[..., None], -1)[..., 0]
        indices[at(*place)] = positions[inside].reshape(-1)[best]
    return values, indices


def _max_pool(self: Array, rank: int, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil: bool) -> Any:
    shape, sizes = self.shape[-rank:], _spread(kernel, rank)
    steps = _spread(stride, rank) if stride != [] and stride != () else sizes
    apart = _spread(dilation, rank)
    windows = []
    for place, window in _windows(shape, sizes, steps, _spread(padding, rank), apart, ceil):
        # The places of a dilated filter that lie inside of the input.
        starts = [a if a >= 0 else a % d for (a, _, _), d in zip(window, apart, strict=True)]
        ends = [min(a + d * (k - 1) + 1, n) for (a, _, _), k, d, n in zip(window, sizes, apart, shape, strict=True)]
        windows.append((place, (..., *(slice(a, b, d) for a, b, d in zip(starts, ends, apart, strict=True)))))
    return _max_over(self, rank, windows)


def _max_forward(rank: int) -> Callable[..., Any]:
    def max_pool(
        self: Array,
        kernel_size: Sizes,
        stride: Sizes = (),
        padding: Sizes = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
    ) -> Any:
        """The largest element of each window and where it stands in the flattened plane; NaN counts as largest."""
        return _max_pool(self, rank, kernel_size, stride, padding, dilation, ceil_mode)

    return max_pool


def _adaptive(self: Array, rank: int, output_size: Sizes) -> tuple[Array, Array]:
    shape, counts = self.shape[-rank:], _spread(output_size, rank)
    windows = [
        (place, (..., *(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, shape, counts, strict=True))))
        for place in itertools.product(*map(range, counts))
    ]
    return _max_over(self, rank, windows)


def _adaptive_forward(rank: int) -> Callable[..., Any]:
    def adaptive_max_pool(self: Array, output_size: Sizes) -> Any:
        """The largest element of each window, from floor(i H/H') to ceil((i+1) H/H'), and where it stands."""
        return _adaptive(self, rank, output_size)

    return adaptive_max_pool


def _starts(sample: Any, size: int, count: int, kernel: int) -> list[int]:
    """Starts of pseudo-random windows (Graham, "Fractional max-pooling", 2014); the last ends with the input."""
    if count == 1:
        return [size - kernel]
    step = sample.dtype.type(size - kernel) / sample.dtype.type(count - 1)
    return [*(int((i + sample) * step) - int(sample * step) for i in range(count - 1)), size - kernel]


def _fractional(self: Array, rank: int, kernel: Sizes, output: Sizes, samples: Array, order: Any) -> Any:
    """Each plane of a batch has windows of its own; order says which sample belongs to which dimension."""
    sizes, counts, shape = _spread(kernel, rank), _spread(output, rank), self.shape[-rank:]
    planes = self.reshape(-1, *shape)
    values = np.empty((len(planes), *counts), self.dtype)
    indices = np.empty(values.shape, np.int64)
    for n, (plane, sample) in enumerate(zip(planes, samples.reshape(-1, rank), strict=True)):
        starts = [_starts(sample[order[i]], shape[i], counts[i], sizes[i]) for i in range(rank)]
        windows = [
            (place, (..., *(slice(s[i], s[i] + k) for i, s, k in zip(place, starts, sizes, strict=True))))
            for place in itertools.product(*map(range, counts))
        ]
        values[n], indices[n] = _max_over(plane, rank, windows)
    result = (*self.shape[:-rank], *counts)
    return values.reshape(result), indices.reshape(result)


def _fractional_forward(rank: int) -> Callable[..., Any]:
    order = (1, 0) if rank == 2 else (0, 1, 2)  # the samples of planes are column, row; of volumes depth, row, column

    def fractional_max_pool(self: Array, kernel_size: Sizes, output_size: Sizes, random_samples: Array) -> Any:
        """The largest element of windows whose starts the samples (N, C, rank) choose, and where it stands."""
        return _fractional(self, rank, kernel_size, output_size, random_samples, order)

    return fractional_max_pool


_BY_RANK: dict[str, Callable[[int], Callable[..., Any]]] = {
    "aten.avg_pool{}d.default": _avg_forward,
    "aten.avg_pool{}d_backward.default": _avg_backward,
    "aten.max_pool{}d_with_indices.default": _max_forward,
    "aten.adaptive_max_pool{}d.default": _adaptive_forward,
    "aten.fractional_max_pool{}d.default": _fractional_forward,
}
for _name, _make in _BY_RANK.items():
    for _rank in (2, 3):
        reference(_name.format(_rank))(_make(_rank))
