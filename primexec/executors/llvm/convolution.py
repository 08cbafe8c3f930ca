"""Convolutions that are sums of few terms: those of single channels, and those that make one channel of a few.

PyTorch computes convolutions as products of matrices, in blocks of channels; where groups have few channels there is
nothing to fill the blocks with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    if transposed or not a.is_floating_point():
        return "a transposed convolution, or one of integers"
    count, given, made, taps = a.shape[0], weight.shape[1], weight.shape[0] // groups, weight.shape[2:]
    if math.prod(taps) == 1 or given * math.prod(taps) > MOST_TERMS:
        return f"a product of matrices, or sums of more than {MOST_TERMS} terms"
    rows = zip(a.shape[2:], taps, stride, padding, dilation, strict=True)
    dims = [Dim.of(*row, ceil=False) for row in rows]
    if not all(d.count > 0 for d in dims) or not a.numel():
        return "there is nothing to add up"
    last = a.stride(1) == 1 and a.shape[1] >= NARROW <= groups * made  # vectors hold channels
    x = pad((a if last else a.contiguous()).to(wide(a.dtype)), dict(enumerate(dims, 2)), 0)
    batch, channel, *steps = x.stride()
    along = [d.count for d in dims], [d.step * s for d, s in zip(dims, steps, strict=True)]
    inside = [given, *taps], [channel, *(d.apart * s for d, s in zip(dims, steps, strict=True))]
    groups_of = [groups, made], [given * channel, 0]
    parts = [along, groups_of] if last else [groups_of, along]
    sizes, strides = ([n for part in (*parts, inside) for n in part[i]] for i in range(2))
    windows = x.as_strided([count, *sizes], [batch, *strides])
    factors = weight.to(x.dtype).reshape(groups, made, given, *taps)
    rank, ones = len(dims), [1] * len(dims)
    if last:  # in the order in which they are read
        terms = list(range(2, 3 + rank))
        turned = factors.permute(*terms, 0, 1).contiguous()
        factors = turned.permute(1 + rank, 2 + rank, *range(1 + rank)).reshape(*ones, groups, made, given, *taps)
    else:
        factors = factors.reshape(groups, made, *ones, given, *taps)
    total = (windows * factors).sum(list(range(3 + rank, 4 + 2 * rank)))
    total = total.flatten(1 + rank, 2 + rank).movedim(-1, 1) if last else total.flatten(1, 2)
    if bias is not None:
        total = total + bias.to(x.dtype).reshape(-1, *ones)
    return total.to(a.dtype)
