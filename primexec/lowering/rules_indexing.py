"""Decompositions of our own for operators that read and write at places that data tells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from primexec.lowering.rules import RULES, rule

__all__ = ["RULES"]

_aten = torch.ops.aten


@rule("aten.index_select.default")
def _index_select(a: Tensor, dim: int, index: Tensor) -> Any:
    """By `gather`, which takes no negative indices either."""
    if a.dim() == 0 or index.dim() != 1:
        return NotImplemented
    dim %= a.dim()
    shape = [*a.shape[:dim], index.shape[0], *a.shape[dim + 1 :]]
    places = index.reshape([-1 if d == dim else 1 for d in range(a.dim())]).expand(shape)
    return _aten.gather.default(a, dim, places)


@rule("aten.embedding.default")
def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """By `gather`: negative indices are errors."""
    if indices.dim() == 0:
        return _embedding(weight, indices.reshape(1)).squeeze(0)
    table = weight.expand(*indices.shape[:-1], *weight.shape)
    places = indices.unsqueeze(-1).expand(*indices.shape, weight.shape[1])
    return _aten.gather.default(table, indices.dim() - 1, places)


@rule("aten.index_add.default")
def _index_add(a: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Any:
    """By `scatter_add`, as eager does it for more than one dimension; negative indices are errors."""
    if not _fits(a, dim, index, source):
        return NotImplemented
    if a.dim() == 1:
        term = source if alpha == 1 else source * alpha
        return _aten.index_put.default(a, [_unwrapped(index, a.shape[0])], term, accumulate=True)
    places = index.reshape([-1 if d == dim % a.dim() else 1 for d in range(a.dim())]).expand(source.shape)
    return _aten.scatter_add.default(a, dim, places, source if alpha == 1 else source * alpha)


def _fits(a: Tensor, dim: int, index: Tensor, source: Tensor) -> bool:
    """Whether there are sizes, equal in all dimensions but one; PyTorch's rules do not ask, and its kernels refuse."""
    if a.dim() != source.dim() or index.dim() != 1 or not a.dim():
        return False
    dim %= a.dim()
    return source.shape == (*a.shape[:dim], index.shape[0], *a.shape[dim + 1 :])


def _unwrapped(index: Tensor, size: int) -> Tensor:
    """Indices of `index_put` of which the negative ones are beyond the other end."""
    return torch.where(index < 0, index - size, index)


@rule("aten.index_copy.default")
def _index_copy(a: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """By `index_put`; negative indices are errors."""
    if not _fits(a, dim, index, source):
        return NotImplemented
    dim %= a.dim()
    return _aten.index_put.default(a, [*[None] * dim, _unwrapped(index, a.shape[dim])], source)


@rule("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def _index_fill(a: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    """By `index_put`: negative indices count from the end."""
    if not a.dim():
        return NotImplemented
    made = value.to(a.dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=a.dtype, device=a.device)
    return _aten.index_put.default(a, [*[None] * (dim % a.dim()), index.reshape(-1)], made)


@rule("aten.max_unpool2d.default", "aten.max_unpool3d.default")
def _max_unpool(a: Tensor, indices: Tensor, output_size: list[int], *windows: Any) -> Any:
    """By `scatter` in each plane: an index outside of its plane is an error."""
    planes = a.shape[: a.dim() - len(output_size)]
    shape = math.prod(planes), math.prod(a.shape[len(planes) :])
    empty = torch.zeros(shape[0], math.prod(output_size), dtype=a.dtype, device=a.device)
    made = _aten.scatter.src(empty, 1, indices.reshape(shape), a.reshape(shape))
    return made.reshape(*planes, *output_size)


@rule("aten.roll.default")
def _roll(a: Tensor, shifts: list[int], dims: list[int] = ()) -> Any:  # type: ignore[assignment]
    """Two slices joined for each dimension."""
    if not dims:
        return _roll(a.reshape(-1), shifts, [0]).reshape(a.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = a.shape[dim] if a.dim() else 1
        start = -shift % size if size else 0
        if start:
            a = torch.cat([a.narrow(dim, start, size - start), a.narrow(dim, 0, start)], dim)
    return a.clone()
