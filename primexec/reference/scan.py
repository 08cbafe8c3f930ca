"""Scans, sorting and searching along one dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, cast
from primexec.reference.registry import reference


def _widened(self: Array, dtype: Any) -> Array:
    """The operand in the dtype asked for; integers are summed as int64."""
    if dtype is not None:
        return cast(self, dtype)
    return self.astype(np.int64) if self.dtype.kind in "bui" else self


@reference("aten.cumsum.default")
def cumsum(self: Array, dim: int, *, dtype: Any = None) -> Array:
    """Sums of the elements up to each place."""
    a = _widened(self, dtype)
    return a.copy() if a.ndim == 0 else np.cumsum(a, dim, a.dtype)


@reference("aten.cumprod.default")
def cumprod(self: Array, dim: int, *, dtype: Any = None) -> Array:
    """Products of the elements up to each place."""
    a = _widened(self, dtype)
    return a.copy() if a.ndim == 0 else np.cumprod(a, dim, a.dtype)


def _running(self: Array, dim: int, better: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
    """The best element up to each place and the index of the last one; NaN beats everything."""
    a = np.moveaxis(np.atleast_1d(self), dim, 0)
    values, indices = a.copy(), np.zeros(a.shape, np.int64)
    for i in range(1, len(a)):
        best = values[i - 1]
        take = (a[i] != a[i]) | ((best == best) & better(a[i], best))
        values[i] = np.where(take, a[i], best)
        indices[i] = np.where(take, i, indices[i - 1])
    return np.moveaxis(values, 0, dim).reshape(self.shape), np.moveaxis(indices, 0, dim).reshape(self.shape)


@reference("aten.cummax.default")
def cummax(self: Array, dim: int) -> tuple[Array, Array]:
    """The largest element up to each place and the index of the last one; NaN stays."""
    return _running(self, dim, np.greater_equal)


@reference("aten.cummin.default")
def cummin(self: Array, dim: int) -> tuple[Array, Array]:
    """The smallest element up to each place and the index of the last one; NaN stays."""
    return _running(self, dim, np.less_equal)


def _log_add_exp(a: Array, b: Array) -> Any:
    """log(exp(a) + exp(b)), the larger real part taken out."""
    swap = a.real < b.real
    large, small = np.where(swap, b, a), np.where(swap, a, b)
    infinite = np.isinf(large.real) & (large.real == small.real)
    difference = np.where(infinite, np.zeros((), a.dtype), small - large)
    if a.dtype.kind == "f":
        # Two equal infinities: the larger one is the answer, whatever the logarithm adds.
        return large + np.log1p(np.exp(difference))
    return large + np.log(1 + np.exp(difference))


@reference("aten.logcumsumexp.default")
def logcumsumexp(self: Array, dim: int) -> Array:
    """The logarithm of the sums of exp of the elements up to each place, without overflow."""
    if self.ndim == 0:
        return self.copy()
    a = np.moveaxis(self, dim, 0).copy()
    for i in range(1, len(a)):
        a[i] = _log_add_exp(a[i - 1], a[i])
    return np.moveaxis(a, 0, dim)


def _order(a: Array, dim: int, descending: bool) -> Array:
    """The stable order; descending, NaN comes first."""
    if not descending:
        return np.argsort(a, dim, kind="stable")
    return np.flip(a.shape[dim] - 1 - np.argsort(np.flip(a, dim), dim, kind="stable"), dim)


@reference("aten.sort.stable")
def sort(self: Array, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    """The elements in order and where they stood; NaN counts as largest, equal ones keep their order."""
    a = np.atleast_1d(self)
    order = _order(a, dim, descending)
    return np.take_along_axis(a, order, dim).reshape(self.shape), order.reshape(self.shape)


@reference("aten.topk.default")
def topk(self: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Array, Array]:
    """The k largest (or smallest) elements in order and where they stand; NaN counts as largest."""
    a = np.atleast_1d(self)
    order = np.take(_order(a, dim, largest), np.arange(k), dim)
    shape = order.shape if self.ndim else ()
    return np.take_along_axis(a, order, dim).reshape(shape), order.reshape(shape)


@reference("aten.searchsorted.Tensor")
def searchsorted(
    sorted_sequence: Array,
    self: Array,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    """For each value the number of elements of the sorted sequence that stand before it (right: or equal it)."""
    sequence = sorted_sequence if sorter is None else np.take_along_axis(sorted_sequence, sorter, -1)
    values = self[..., None]
    rows = sequence if sequence.ndim == 1 else sequence[..., None, :]
    before = ~(rows > values) if right or side == "right" else ~(rows >= values)
    return np.asarray(before.sum(-1)).astype(np.int32 if out_int32 else np.int64)
