"""Matrix products and convolution: one product of matrices for each place of the filter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, at
from primexec.reference.registry import reference


@reference("aten.mm.default", "aten.bmm.default")
def matmul(self: Array, mat2: Array) -> Any:
    """The product of matrices, or of each pair of a batch."""
    return np.matmul(self, mat2)


def _spread(values: Sequence[int], rank: int) -> tuple[int, ...]:
    """One value for each spatial dimension; a single one stands for all."""
    return tuple(values) if len(values) == rank else (values[0],) * rank


def _taps(
    kernel: Sequence[int], count: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """For each place of the filter the slices that count windows read there."""
    for place in itertools.product(*map(range, kernel)):
        slices = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s) for i, n, s, d in zip(place, count, stride, dilation, strict=True)
        )
        yield place, (..., *slices)


def _padded(a: Array, padding: Sequence[int]) -> Array:
    return np.pad(a, [(0, 0), (0, 0), *((p, p) for p in padding)])


def _correlate(a: Array, w: Array, stride: Any, padding: Any, dilation: Any, groups: int) -> Array:
    """(N, C, *) with (O, C/groups, *k) to (N, O, *)."""
    n, kernel = len(a), w.shape[2:]
    a = _padded(a, padding)
    count = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(a.shape[2:], kernel, stride, dilation, strict=True)
    ]
    filters = w.reshape(groups, len(w) // groups, w.shape[1], *kernel)
    result = np.zeros((n, groups, len(w) // groups, int(np.prod(count))), np.result_type(a, w))
    for place, slices in _taps(kernel, count, stride, dilation):
        read = a[slices].reshape(n, groups, w.shape[1], -1)
        result += np.matmul(filters[at(*place)], read)
    return result.reshape(n, len(w), *count)


def _spread_out(
    a: Array, w: Array, stride: Any, padding: Any, dilation: Any, groups: int, size: Sequence[int]
) -> Array:
    """The adjoint of _correlate: (N, O, *) with (O, C/groups, *k) to (N, C, *size)."""
    n, kernel, count = len(a), w.shape[2:], a.shape[2:]
    reach = [(c - 1) * s + d * (k - 1) + 1 for c, k, s, d in zip(count, kernel, stride, dilation, strict=True)]
    full = [max(r, p + m) for r, p, m in zip(reach, padding, size, strict=True)]
    result = np.zeros((n, groups * w.shape[1], *full), np.result_type(a, w))
    rows = a.reshape(n, groups, len(w) // groups, -1)
    filters = w.reshape(groups, len(w) // groups, w.shape[1], *kernel)
    for place, slices in _taps(kernel, count, stride, dilation):
        part = np.matmul(np.swapaxes(filters[at(*place)], 1, 2), rows)
        result[slices] += part.reshape(n, -1, *count)
    return np.asarray(result[at(*(slice(p, p + m) for p, m in zip(padding, size, strict=True)))])


def _filter_gradient(
    grad: Array, a: Array, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Array:
    """The sums over windows of grad (N, O, *) times what each place of the filter read of a (N, C, *)."""
    n, outputs, inputs = len(a), grad.shape[1] // groups, a.shape[1] // groups
    rows = grad.reshape(n, groups, outputs, -1)
    a = _padded(a, padding)
    result = np.zeros((groups, outputs, inputs, *kernel), np.result_type(grad, a))
    for place, slices in _taps(kernel, grad.shape[2:], stride, dilation):
        read = a[slices].reshape(n, groups, inputs, -1)
        result[at(*place)] = np.matmul(rows, np.swapaxes(read, 2, 3)).sum(0)
    return result.reshape(groups * outputs, inputs, *kernel)


@reference("aten.convolution.default")
def convolution(
    input: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    """Cross-correlation of each group of channels (N, C, *) with its filters (O, C/groups, *k).

    Transposed: the adjoint, with filters (C, O/groups, *k).
    """
    rank = input.ndim - 2
    stride, padding, dilation, more = (_spread(v, rank) for v in (stride, padding, dilation, output_padding))
    if transposed:
        sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True)
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + m for n, k, s, p, d, m in sizes]
        result = _spread_out(input, weight, stride, padding, dilation, groups, size)
    else:
        result = _correlate(input, weight, stride, padding, dilation, groups)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


@reference("aten.convolution_backward.default")
def convolution_backward(
    grad_output: Array,
    input: Array,
    weight: Array,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients of convolution with respect to input, weight and bias, None where not asked for."""
    rank = input.ndim - 2
    stride, padding, dilation = (_spread(v, rank) for v in (stride, padding, dilation))
    kernel, adjoint = weight.shape[2:], np.conjugate(weight)
    grads: list[Array | None] = [None, None, None]
    if output_mask[0] and transposed:
        grads[0] = _correlate(grad_output, adjoint, stride, padding, dilation, groups)
    elif output_mask[0]:
        grads[0] = _spread_out(grad_output, adjoint, stride, padding, dilation, groups, input.shape[2:])
    if output_mask[1] and transposed:
        conjugated = _filter_gradient(input, np.conjugate(grad_output), kernel, stride, padding, dilation, groups)
        grads[1] = np.conjugate(conjugated) if input.dtype.kind == "c" else conjugated
    elif output_mask[1]:
        grads[1] = _filter_gradient(grad_output, np.conjugate(input), kernel, stride, padding, dilation, groups)
    if output_mask[2]:
        grads[2] = np.asarray(grad_output.sum((0, *range(2, rank + 2))))
    return grads[0], grads[1], grads[2]
