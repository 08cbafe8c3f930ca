"""Convolutions that are sums of few terms: those of single channels, and those that make one channel of a few.

PyTorch computes convolutions as products of matrices, in blocks of channels; where groups have few channels there is
nothing to fill the blocks with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.executors.llvm.layout import NARROW
from primexec.executors.llvm.stencil import MOST_TERMS
from primexec.executors.llvm.windows import Dim, pad
from primexec.lowering.rules import wide


def convolution(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """The operator `convolution`."""
    count, given, made, taps = a.shape[0], weight.shape[1], weight.shape[0] // groups, weight.shape[2:]
    if reason := _why_not(a, taps, given, transposed):
        return reason
    dims = _dims(a, taps, stride, padding, dilation)
    if not all(d.count > 0 for d in dims) or not a.numel():
        return "there is nothing to add up"
    last = a.stride(1) == 1 and a.shape[1] >= NARROW <= groups * made  # vectors hold channels
    x = pad((a if last else a.contiguous()).to(wide(a.dtype)), dict(enumerate(dims, 2)), 0)
    batch, channel, *strides = x.stride()
    steps = [(d.count, d.step * s, d.apart * s) for d, s in zip(dims, strides, strict=True)]
    places, moves, apart = zip(*steps, strict=True)
    windows = x.as_strided(
        [count, groups, made, *places, given, *taps],
        [batch, given * channel, 0, *moves, channel, *apart],
    )
    factors = weight.to(x.dtype).reshape(groups, made, given, *taps)
    rank, ones = len(dims), [1] * len(dims)
    if last:  # in the order in which they are read
        factors = factors.permute(*range(2, 3 + rank), 0, 1).contiguous().permute(-2, -1, *range(1 + rank))
    factors = factors.reshape(groups, made, *ones, given, *taps)
    total = (windows * factors).sum(list(range(3 + rank, 4 + 2 * rank))).flatten(1, 2)
    if last:
        total = total.clone(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    if bias is not None:
        total = total + bias.to(x.dtype).reshape(-1, *ones)
    return total.to(a.dtype)


def convolution_backward(
    grad: Tensor,
    a: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The operator `convolution_backward`."""
    given, made, taps = weight.shape[1], weight.shape[0] // groups, weight.shape[2:]
    if reason := _why_not(a, taps, max(given, made), transposed):
        return reason
    if max(stride) > 1 or not grad.numel():
        return "a convolution with steps, or there is nothing to add up"
    margin = [d * (n - 1) - p for d, n, p in zip(dilation, taps, padding, strict=True)]
    if min(margin) < 0:
        return "more padding than a window has"
    spatial = list(range(2, a.dim()))
    found: list[Any] = [None, None, None]
    if output_mask[0]:
        turned = weight.reshape(groups, made, given, *taps).transpose(1, 2).reshape(-1, made, *taps).flip(spatial)
        found[0] = convolution(grad, turned, None, stride, margin, dilation, False, output_padding, groups)
    if output_mask[1]:
        found[1] = _weights(grad, a, weight, _dims(a, taps, stride, padding, dilation), groups)
    if output_mask[2]:
        found[2] = grad.sum([0, *spatial])
    return next((f for f in found if isinstance(f, str)), tuple(found))


def _why_not(a: Tensor, taps: Sequence[int], channels: int, transposed: bool) -> str:
    """Why sums over windows of so many channels are PyTorch's; empty where they are not."""
    if transposed or not a.is_floating_point():
        return "a transposed convolution, or one of integers"
    if math.prod(taps) == 1 or channels * math.prod(taps) > MOST_TERMS:
        return f"a product of matrices, or sums of more than {MOST_TERMS} terms"
    return ""


def _dims(
    a: Tensor, taps: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[Dim]:
    """The dimensions that windows move along."""
    return [Dim.of(*row, ceil=False) for row in zip(a.shape[2:], taps, stride, padding, dilation, strict=True)]


def _weights(grad: Tensor, a: Tensor, weight: Tensor, dims: Sequence[Dim], groups: int) -> Tensor:
    """The gradient of the weight: for each of its elements, products of two images of equal rows, one of them moved."""
    given, made, taps = weight.shape[1], weight.shape[0] // groups, weight.shape[2:]
    x = pad(a.contiguous().to(wide(a.dtype)), dict(enumerate(dims, 2)), 0)
    sizes, counts = x.shape[2:], grad.shape[2:]
    missing = [size - count for size, count in zip(sizes[1:], counts[1:], strict=True)]
    g = F.pad(grad.contiguous().to(x.dtype), [n for last in reversed(missing) for n in (0, last)])
    steps = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    length = 1 + sum(step * (n - 1) for step, n in zip(steps, counts, strict=True))
    g = g.flatten(2).narrow(-1, 0, length).reshape(-1, groups, made, 1, *[1] * len(taps), length)
    x = x.flatten(2)
    batch, channel, _ = x.stride()
    moved = [d.apart * step for d, step in zip(dims, steps, strict=True)]
    windows = x.as_strided(
        [x.shape[0], groups, 1, given, *taps, length], [batch, given * channel, 0, channel, *moved, 1]
    )
    return (g * windows).sum((0, -1)).reshape(weight.shape).to(weight.dtype)
