"""Reading and writing at computed places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from primexec.errors import IndexOutOfRangeError
from primexec.reference.dtypes import Array, cast, largest, smallest
from primexec.reference.registry import reference


def _places(self: Array, dim: int, index: Array) -> tuple[Any, ...]:
    """A NumPy index: index[i, j] along dim, i and j elsewhere.

    Raises:
        IndexOutOfRangeError: where an index is out of range; negative ones are.
    """
    if index.size and (index.min() < 0 or index.max() >= self.shape[dim]):
        raise IndexOutOfRangeError(f"an index is out of range for dimension {dim} of size {self.shape[dim]}")
    places: list[Any] = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    places[dim] = index
    return tuple(places)


@reference("aten.gather.default")
def gather(self: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    """result[i, j] = self[index[i, j], j] for dim 0, and alike for the others."""
    a, places = np.atleast_1d(self), np.atleast_1d(index)
    return np.asarray(a[_places(a, dim, places)]).reshape(index.shape)


def _scatter(self: Array, dim: int, index: Array, src: Any, ufunc: Any = None) -> Array:
    """A copy of self in which src is written to its places, or joined by the ufunc to what stands there."""
    if index.size == 0:
        return self.copy()
    result, places = np.atleast_1d(self).copy(), np.atleast_1d(index)
    where = _places(result, dim, places)
    if isinstance(src, np.ndarray):
        src = np.atleast_1d(src)[tuple(slice(n) for n in places.shape)]
    else:
        src = cast(np.asarray(src), self.dtype)
    if ufunc is None:
        result[where] = src
    else:
        ufunc.at(result, where, src)
    return result.reshape(self.shape)


@reference("aten.scatter.src", "aten.scatter.value")
def scatter(self: Array, dim: int, index: Array, src: Any) -> Array:
    """A copy of self with result[index[i, j], j] = src[i, j] for dim 0, or the value src; the last of repeats stays."""
    return _scatter(self, dim, index, src)


@reference("aten.scatter_add.default")
def scatter_add(self: Array, dim: int, index: Array, src: Array) -> Array:
    """A copy of self with src[i, j] added to result[index[i, j], j] for dim 0."""
    return _scatter(self, dim, index, src, np.add)


@reference("aten.scatter_reduce.two")
def scatter_reduce(self: Array, dim: int, index: Array, src: Array, reduce: str, *, include_self: bool = True) -> Array:
    """As scatter_add with sum, prod, mean, amax or amin; without include_self what self holds there is left out.

    The mean of integers is rounded down.
    """
    infinite = self.dtype.kind == "f"
    ufunc, neutral = {
        "sum": (np.add, 0),
        "mean": (np.add, 0),
        "prod": (np.multiply, 1),
        "amax": (np.maximum, -np.inf if infinite else smallest(self.dtype)),
        "amin": (np.minimum, np.inf if infinite else largest(self.dtype)),
    }[reduce]
    start = self if include_self else _scatter(self, dim, index, neutral)
    result = _scatter(start, dim, index, src, ufunc)
    if reduce != "mean":
        return result
    ones = np.ones(self.shape, np.int64)
    ones = ones if include_self else _scatter(ones, dim, index, 0)
    count = np.maximum(_scatter(ones, dim, index, np.ones(src.shape, np.int64), np.add), 1).astype(self.dtype)
    return np.asarray(result // count if self.dtype.kind in "ui" else result / count)


def _index(indices: Sequence[Array | None]) -> tuple[Any, ...]:
    """A NumPy index; one of uint8 is a mask."""
    return tuple(
        slice(None) if i is None else i.astype(bool) if i.dtype in (np.uint8, np.bool_) else i.astype(np.int64)
        for i in indices
    )


@reference("aten.index.Tensor")
def index(self: Array, indices: Sequence[Array | None]) -> Array:
    """NumPy's indexing by arrays; None stands for the whole dimension."""
    return np.array(self[_index(indices)])


@reference("aten.index_put.default")
def index_put(self: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    """A copy of self in which the elements that index would return are the values, or have them added."""
    result = self.copy()
    if accumulate:
        np.add.at(result, _index(indices), values)
    else:
        result[_index(indices)] = values
    return result


@reference("aten.nonzero.default")
def nonzero(self: Array) -> Array:
    """The coordinates of the elements that are not zero, in row-major order."""
    return np.argwhere(self)
