"""Reductions over dimensions, and the elements of a given rank along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, storage
from primexec.reference.registry import reference


def _axes(a: Array, dims: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if dims is None or a.ndim == 0 else tuple(dims)


@reference("prims.sum.default")
def sum_(inp: Array, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """The sum over dims; 0 of nothing, integers modulo 2^bits."""
    held = inp.dtype if output_dtype is None else storage(output_dtype)
    return np.sum(inp, _axes(inp, dims), held)


@reference("prims.prod.default")
def prod(inp: Array, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """The product over dims; 1 of nothing, integers modulo 2^bits."""
    held = inp.dtype if output_dtype is None else storage(output_dtype)
    return np.prod(inp, _axes(inp, dims), held)


@reference("prims.amax.default")
def amax(inp: Array, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """The largest element over dims; NaN where there is one."""
    return np.amax(inp, _axes(inp, dims))


@reference("prims.amin.default")
def amin(inp: Array, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """The smallest element over dims; NaN where there is one."""
    return np.amin(inp, _axes(inp, dims))


@reference("aten.argmax.default")
def argmax(self: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index of the first largest element; NaN counts as largest."""
    return np.argmax(self, None if self.ndim == 0 else dim, keepdims=keepdim)


@reference("aten.argmin.default")
def argmin(self: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index of the first smallest element; NaN counts as smallest."""
    return np.argmin(self, None if self.ndim == 0 else dim, keepdims=keepdim)


def _taken(self: Array, index: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The elements at indices along a dimension that has been reduced to size 1, and the indices."""
    shape = index.shape if self.ndim else ()
    values = np.take_along_axis(np.atleast_1d(self), np.atleast_1d(index), dim).reshape(shape)
    index = index.reshape(shape).astype(np.int64)
    return (values, index) if keepdim or self.ndim == 0 else (values.squeeze(dim), index.squeeze(dim))


@reference("aten.max.dim")
def max_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """The largest element along a dimension and the index of the first one; NaN counts as largest."""
    return _taken(self, np.argmax(np.atleast_1d(self), dim, keepdims=True), dim, keepdim)


@reference("aten.min.dim")
def min_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """The smallest element along a dimension and the index of the first one; NaN counts as smallest."""
    return _taken(self, np.argmin(np.atleast_1d(self), dim, keepdims=True), dim, keepdim)


def _of_rank(self: Array, rank: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The elements that stand at a place (from 0) of the sorted order, and their indices."""
    order = np.argsort(np.atleast_1d(self), dim, kind="stable")
    return _taken(self, np.take_along_axis(order, rank, dim), dim, keepdim)


@reference("aten.kthvalue.default")
def kthvalue(self: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The k-th smallest element along a dimension, k from 1, and its index; NaN counts as largest."""
    shape = list(np.atleast_1d(self).shape)
    shape[dim] = 1
    return _of_rank(self, np.full(shape, k - 1), dim, keepdim)


def _nan(self: Array) -> Array:
    return np.atleast_1d(np.isnan(self) if self.dtype.kind == "f" else np.zeros(self.shape, bool))


@reference("aten.median.dim")
def median(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """The element of rank ceil(n/2) along a dimension and its index; the first NaN where there is one."""
    missing = _nan(self)
    length = missing.shape[dim]
    kept = np.sum(~missing, dim, keepdims=True)
    return _of_rank(self, np.where(kept < length, kept, (length - 1) // 2), dim, keepdim)


@reference("aten.nanmedian.dim")
def nanmedian(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """As median, of the elements that are not NaN."""
    kept = np.sum(~_nan(self), dim, keepdims=True)
    return _of_rank(self, np.maximum(kept - 1, 0) // 2, dim, keepdim)


@reference("aten.mode.default")
def mode(self: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The most frequent element along a dimension, the smallest of equals, and the index of the last one."""
    rows = np.moveaxis(np.atleast_1d(self), dim, -1)
    index = np.empty((*rows.shape[:-1], 1), np.int64)
    for place in np.ndindex(rows.shape[:-1]):
        values, counts = np.unique(rows[place], return_counts=True, equal_nan=False)
        value = values[np.argmax(counts)]
        index[place] = np.flatnonzero((rows[place] == value) | ((rows[place] != rows[place]) & (value != value)))[-1]
    return _taken(self, np.moveaxis(index, -1, dim), dim, keepdim)
