"""Decompositions of backward operators that PyTorch keeps whole: losses, distances, extremes of windows, bags."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from primexec.lowering.rules import rule, wide
from primexec.lowering.rules_whole import RULES, pairs

__all__ = ["RULES"]

_aten = torch.ops.aten


@rule("aten.softshrink_backward.default", "aten.hardshrink_backward.default")
def _shrink_backward(grad: Tensor, a: Tensor, limit: float) -> Any:
    return torch.where((a < -limit) | (a > limit), grad, 0.0)


@rule("aten._efficientzerotensor.default")
def _zeros(size: list[int], *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return torch.zeros(size, dtype=dtype, device=device)


# Writing back to where values came from -----------------------------------------------------------------


def _write_back(rank: int, grad: Tensor, a: Tensor, indices: Tensor) -> Any:
    """Each gradient to the place that its window's extreme was found at, among the last `rank` dimensions of `a`."""
    g = grad.to(wide(grad.dtype)).flatten(-rank)
    zeros = torch.zeros_like(a, dtype=g.dtype, memory_format=torch.contiguous_format).flatten(-rank)
    return _aten.scatter_add.default(zeros, a.dim() - rank, indices.flatten(-rank), g).reshape(a.shape).to(grad.dtype)


@rule("aten.adaptive_max_pool2d_backward.default")
def _adaptive_max_2d(grad: Tensor, a: Tensor, indices: Tensor) -> Any:
    return _write_back(2, grad, a, indices)


@rule("aten.adaptive_max_pool3d_backward.default")
def _adaptive_max_3d(grad: Tensor, a: Tensor, indices: Tensor) -> Any:
    return _write_back(3, grad, a, indices)


@rule("aten.fractional_max_pool2d_backward.default")
def _fractional_max_2d(grad: Tensor, a: Tensor, kernel: Any, output_size: Any, indices: Tensor) -> Any:
    return _write_back(2, grad, a, indices)


@rule("aten.fractional_max_pool3d_backward.default")
def _fractional_max_3d(grad: Tensor, a: Tensor, kernel: Any, output_size: Any, indices: Tensor) -> Any:
    return _write_back(3, grad, a, indices)


@rule("aten.max_pool3d_with_indices_backward.default")
def _max_3d(grad: Tensor, a: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
            indices: Tensor) -> Any:  # fmt: skip
    return _write_back(3, grad, a, indices)


@rule("aten.masked_scatter_backward.default")
def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: list[int]) -> Any:
    """What lies outside of the mask goes to a place past the end."""
    count = math.prod(sizes)
    grad, mask = torch.broadcast_tensors(grad, mask)
    chosen = mask.reshape(-1)
    places = torch.where(chosen, chosen.to(torch.int64).cumsum(0) - 1, count).clamp(max=count)
    zeros = torch.zeros(count + 1, dtype=grad.dtype, device=grad.device)
    return _aten.scatter_add.default(zeros, 0, places, grad.reshape(-1))[:count].reshape(sizes)


# Losses -------------------------------------------------------------------------------------------------


def _rows(a: Tensor) -> Tensor:
    """Scores of classes, a row for each that is judged."""
    return a.reshape(-1, a.shape[-1] if a.dim() else 1)


def _share(a: Tensor, reduction: int) -> float:
    """What one pair of classes counts in the loss: means are over classes and, if asked for, over rows."""
    return 1 / max(a.numel() if reduction == 1 else a.shape[-1], 1)


@rule("aten.multi_margin_loss_backward.default")
def _multi_margin_backward(grad: Tensor, a: Tensor, target: Tensor, p: float, margin: float,
                           weight: Tensor | None = None, reduction: int = 1) -> Any:  # fmt: skip
    x = _rows(a)
    t = target.reshape(-1, 1)
    distance = margin - x.gather(1, t) + x
    mine = torch.arange(x.shape[1], device=a.device) == t
    slope = (torch.ones_like(distance) if p == 1 else 2 * distance) * _share(x, reduction)
    slope = slope if weight is None else slope * weight[t]
    pushed = torch.where((distance > 0) & ~mine, slope, 0.0)
    found = torch.where(mine, -pushed.sum(1, keepdim=True), pushed)
    return (found * (grad.reshape(-1, 1) if grad.dim() else grad)).reshape(a.shape)


def _labels(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of rows, 0 from the first negative one on, which of them count, and 1 - x[label] + x[other] for each."""
    t = target.reshape(x.shape)
    used = (t < 0).to(torch.int64).cumsum(1) == 0
    t = torch.where(used, t, 0)
    return t, used, 1 - x.gather(1, t).unsqueeze(2) + x.unsqueeze(1)


@rule("aten.multilabel_margin_loss_forward.default")
def _multilabel_margin(a: Tensor, target: Tensor, reduction: int) -> Any:
    """Every label of a row against every class that is no label. PyTorch's decomposition counts absent labels too."""
    x = _rows(a)
    t, used, distance = _labels(x, target)
    classes = torch.arange(x.shape[1], device=a.device)
    is_target = ((t.unsqueeze(2) == classes) & used.unsqueeze(2)).any(1)
    loss = torch.where(used.unsqueeze(2) & ~is_target.unsqueeze(1), distance.clamp_min(0), 0.0).sum((1, 2))
    loss = loss / x.shape[1]
    whole = (loss.reshape(a.shape[:-1]), loss.mean(), loss.sum())[reduction]
    return whole, is_target.to(a.dtype).reshape(target.shape)


@rule("aten.multilabel_margin_loss_backward.default")
def _multilabel_margin_backward(grad: Tensor, a: Tensor, target: Tensor, reduction: int, is_target: Tensor) -> Any:
    x = _rows(a)
    others = is_target.reshape(x.shape) == 0
    t, used, distance = _labels(x, target)
    pushed = ((distance > 0) & used.unsqueeze(2) & others.unsqueeze(1)).to(a.dtype) * _share(x, reduction)
    found = _aten.scatter_add.default(pushed.sum(1), 1, t, -pushed.sum(2))
    return (found * (grad.reshape(-1, 1) if grad.dim() else grad)).reshape(a.shape)


# Norms --------------------------------------------------------------------------------------------------


@rule("aten.native_group_norm_backward.default")
def _group_norm_backward(grad: Tensor, a: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, n: int, c: int,
                         inner: int, groups: int, output_mask: list[bool]) -> Any:  # fmt: skip
    """Inputs are cut into groups before they meet: a product in another shape would have to be kept."""
    dtype, each = wide(a.dtype), (n, groups, c // groups, 1)
    result = a.dtype if weight is None else torch.promote_types(a.dtype, weight.dtype)
    g, x = (t.to(dtype).reshape(*each[:3], inner) for t in (grad, a))
    m, r = (t.to(dtype).reshape(n, groups, 1, 1) for t in (mean, rstd))
    by_x, alone = (g * x).sum(-1, keepdim=True), g.sum(-1, keepdim=True)
    to_a = to_weight = to_bias = None
    if output_mask[0]:
        w = torch.ones((), dtype=dtype) if weight is None else weight.to(dtype).reshape(1, *each[1:])
        along_x, along = ((t * w).sum(2, keepdim=True) for t in (by_x, alone))
        slope = (along * m - along_x) * r * r * r / (inner * each[2])
        shift = -slope * m - along * r / (inner * each[2])
        factors = ((w * r).expand(each), slope.expand(each), shift.expand(each))
        by_grad, by_a, added = (t.reshape(n, c, *[1] * (a.dim() - 2)) for t in factors)
        to_a = (grad.to(dtype) * by_grad + a.to(dtype) * by_a + added).to(result)
    if output_mask[1]:
        to_weight = ((by_x - alone * m) * r).sum(0).reshape(c).to(result)
    if output_mask[2]:
        to_bias = alone.sum(0).reshape(c).to(result)
    return to_a, to_weight, to_bias


# Distances ----------------------------------------------------------------------------------------------


def _toward(difference: Tensor, grad: Tensor, distance: Tensor, p: float) -> Tensor:
    """The gradient of a norm by the difference; 0 where the norm is 0, as eager has it."""
    sign, grad, distance = difference.sgn(), grad.unsqueeze(-1), distance.unsqueeze(-1)
    if p == 1:
        return grad * sign
    if p == math.inf:
        return grad * sign * (difference.abs() == distance)
    if p == 2:
        return torch.where(distance == 0, 0.0, grad * difference / distance)
    power = torch.where(difference == 0, 0.0, difference.abs().pow(p - 1)) if p < 1 else difference.abs().pow(p - 1)
    return torch.where(distance == 0, 0.0, sign * power * grad / distance.pow(p - 1))


@rule("aten._cdist_backward.default")
def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distances: Tensor) -> Any:
    if p == 0:
        return torch.zeros_like(a)
    return _toward(a.unsqueeze(-2) - b.unsqueeze(-3), grad, distances, p).sum(-2).sum_to_size(a.shape)


@rule("aten._pdist_backward.default")
def _pdist_backward(grad: Tensor, a: Tensor, p: float, distances: Tensor) -> Any:
    if p == 0 or a.shape[0] < 2:
        return torch.zeros_like(a)
    i, j = pairs(a)
    found = _toward(a[i] - a[j], grad, distances, p)
    return _aten.index_put.default(torch.zeros_like(a), [torch.cat([i, j])], torch.cat([found, -found]), True)


# Bags ---------------------------------------------------------------------------------------------------

_SUM, _MEAN, _MAX = range(3)


def _bags(indices: Tensor, offsets: Tensor) -> Tensor:
    """The bag of each index."""
    k = torch.arange(indices.shape[0], dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, k, right=True) - 1


@rule("aten._embedding_bag_backward.default")
def _embedding_bag_backward(grad: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor, bag_size: Tensor,
                            maximum_indices: Tensor, num_weights: int, scale_grad_by_freq: bool, mode: int,
                            sparse: bool, weights: Tensor | None, padding_idx: int = -1) -> Any:  # fmt: skip
    if sparse or scale_grad_by_freq:
        return NotImplemented
    zeros = torch.zeros(num_weights, grad.shape[1], dtype=grad.dtype, device=grad.device)
    if mode == _MAX:
        filled = (bag_size != 0).unsqueeze(1)
        places = torch.where(filled, maximum_indices, 0).to(torch.int64)
        return _aten.scatter_add.default(zeros, 0, places, torch.where(filled, grad, 0.0))
    bags = _bags(indices, offsets)
    values = grad[bags]
    if mode == _MEAN:
        values = values / bag_size[bags].unsqueeze(1)
    if weights is not None:
        values = values * weights.unsqueeze(1)
    if padding_idx >= 0:
        values = torch.where((indices == padding_idx).unsqueeze(1), 0.0, values)
    return _aten.index_put.default(zeros, [indices], values, True)


@rule("aten._embedding_bag_per_sample_weights_backward.default")
def _bag_weights_backward(grad: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor,
                          mode: int, padding_idx: int = -1) -> Any:  # fmt: skip
    found = (grad[_bags(indices, offsets)] * weight[indices]).sum(1)
    return torch.where(indices == padding_idx, 0.0, found) if padding_idx >= 0 else found
