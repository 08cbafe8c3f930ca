"""Views, and what rearranges, joins or copies elements. Arrays stand for values, not for memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, storage
from primexec.reference.registry import reference


@reference("prims.broadcast_in_dim.default")
def broadcast_in_dim(a: Array, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> Array:
    """Dimension i becomes dimension broadcast_dimensions[i] of the shape; the others are repeats."""
    expanded = [1] * len(shape)
    for i, dim in enumerate(broadcast_dimensions):
        expanded[dim] = a.shape[i]
    return np.broadcast_to(a.reshape(expanded), tuple(shape))


@reference("prims.squeeze.default")
def squeeze(a: Array, dimensions: Sequence[int]) -> Array:
    """The operand without the dimensions listed, all of size 1."""
    return np.squeeze(a, tuple(dimensions))


@reference("prims.transpose.default")
def transpose(a: Array, permutation: Sequence[int]) -> Array:
    """Dimension i of the result is dimension permutation[i] of the operand."""
    return np.transpose(a, tuple(permutation))


@reference("aten.view.default")
def view(self: Array, size: Sequence[int]) -> Array:
    """The elements in row-major order under another shape."""
    return self.reshape(tuple(size))


def _bounds(length: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Start and end within a dimension; negative ones count from its end."""
    first = 0 if start is None else start
    last = length if end is None else end
    first, last = (n + length if n < 0 else n for n in (first, last))
    first = min(max(first, 0), length)
    return first, min(max(last, first), length)


def _along(a: Array, dim: int, start: int | None, end: int | None, step: int) -> tuple[slice, ...]:
    index = [slice(None)] * a.ndim
    index[dim] = slice(*_bounds(a.shape[dim], start, end), step)
    return tuple(index)


@reference("aten.slice.Tensor")
def slice_(self: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    """The elements start, start + step, ... below end along a dimension."""
    return self[_along(self, dim, start, end, step)]


@reference("aten.slice_scatter.default")
def slice_scatter(
    self: Array, src: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    """A copy in which the elements that slice would return are src's."""
    result = self.copy()
    result[_along(self, dim, start, end, step)] = src
    return result


def _places(size: Sequence[int], stride: Sequence[int], offset: int | None) -> Array:
    """Where in memory the elements stand, in elements."""
    places = np.full(tuple(size), offset or 0, np.int64)
    for i, (n, step) in enumerate(zip(size, stride, strict=True)):
        places += (np.arange(n) * step).reshape([n if j == i else 1 for j in range(len(size))])
    return places


@reference("aten.as_strided.default")
def as_strided(self: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Array:
    """The operand's memory read at storage_offset + index times stride, the operand being contiguous in its memory."""
    return self.reshape(-1)[_places(size, stride, storage_offset)]


@reference("prims.as_strided_scatter.default")
def as_strided_scatter(
    self: Array, src: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Array:
    """A copy in which the elements that as_strided would return are src's."""
    result = self.reshape(-1).copy()
    result[_places(size, stride, storage_offset)] = src
    return result.reshape(self.shape)


@reference("prims.view_of.default")
def view_of(a: Array) -> Array:
    """The operand itself."""
    return a


@reference("prims.conj.default")
def conj(a: Array) -> Array:
    """The complex conjugate."""
    return np.conjugate(a)


@reference("prims.rev.default")
def rev(a: Array, dims: Sequence[int]) -> Array:
    """The order reversed along dims."""
    return np.flip(a, tuple(dims))


@reference("prims.cat.default")
def cat(tensors: Sequence[Array], dim: int) -> Array:
    """The operands one after the other; an empty one of rank 1 joins anything."""
    rank = max(t.ndim for t in tensors)
    parts = [t for t in tensors if t.ndim == rank or t.shape != (0,)]
    return np.concatenate(parts, dim)


@reference("prims.clone.default")
def clone(self: Array, *, memory_format: Any = None) -> Array:
    """A copy; the layout is not the values' business."""
    return self.copy()


@reference("prims.device_put.default")
def device_put(a: Array, device: Any, non_blocking: bool = False) -> Array:
    """A copy; there is one device."""
    return a.copy()


@reference("prims.real.default")
def real(self: Array) -> Array:
    """The real part."""
    return self.real.copy()


@reference("prims.imag.default")
def imag(self: Array) -> Array:
    """The imaginary part."""
    return self.imag.copy()


def complex_of(real: Array, imag: Array) -> Array:
    """The complex numbers with these real and imaginary parts."""
    result = np.empty(np.broadcast_shapes(real.shape, imag.shape), np.result_type(real.dtype, np.complex64))
    result.real, result.imag = real, imag
    return result


@reference("aten.view_as_real.default")
def view_as_real(self: Array) -> Array:
    """Real and imaginary parts along a new last dimension."""
    return np.stack([self.real, self.imag], -1)


@reference("aten.view_as_complex.default")
def view_as_complex(self: Array) -> Array:
    """The complex numbers whose parts stand along the last dimension."""
    return complex_of(self[..., 0], self[..., 1])


@reference("prims.view_of_dtype.default")
def view_of_dtype(a: Array, dtype: Any) -> Array:
    """The same bits read as another dtype of the same size."""
    target = storage(dtype)
    if target.itemsize != a.dtype.itemsize:
        raise TypeError(f"bits of {a.dtype} cannot be read as {target}")
    return np.ascontiguousarray(a).view(target).reshape(a.shape)
