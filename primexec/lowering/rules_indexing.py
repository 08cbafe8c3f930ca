"""Decompositions of our own for operators that read and write at places that data tells."""

from __future__ import annotations

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
    """By `scatter_add`, as eager does it for more than one dimension."""
    if a.dim() < 2 or a.dim() != source.dim() or index.dim() != 1:
        return NotImplemented
    places = index.reshape([-1 if d == dim % a.dim() else 1 for d in range(a.dim())]).expand(source.shape)
    return _aten.scatter_add.default(a, dim, places, source if alpha == 1 else source * alpha)


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
