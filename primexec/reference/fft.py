"""Fourier transforms over dims; normalization 0: none, 1: by 1/sqrt(n), 2: by 1/n."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from primexec.reference.dtypes import Array
from primexec.reference.registry import reference


def _scaled(a: Array, sizes: Sequence[int], normalization: int) -> Array:
    count = math.prod(sizes)
    factor = {0: 1.0, 1: 1 / math.sqrt(count) if count else 1.0, 2: 1 / count if count else 1.0}[normalization]
    return (a * factor).astype(a.dtype)


def _sizes(a: Array, dim: Sequence[int]) -> list[int]:
    return [a.shape[d] for d in dim]


def _c2c(a: Array, dim: Sequence[int], forward: bool) -> Array:
    for d in dim:
        a = np.fft.fft(a, axis=d) if forward else np.fft.ifft(a, axis=d, norm="forward")
    return a


@reference("aten._fft_c2c.default")
def fft_c2c(self: Array, dim: Sequence[int], normalization: int, forward: bool) -> Array:
    """The transform with exponent sign -1 (forward) or 1."""
    return _scaled(_c2c(self, dim, forward), _sizes(self, dim), normalization)


@reference("aten._fft_r2c.default")
def fft_r2c(self: Array, dim: Sequence[int], normalization: int, onesided: bool) -> Array:
    """The forward transform of real numbers; onesided: the last of dims holds n // 2 + 1 coefficients."""
    last = dim[-1]
    once = np.fft.rfft(self, axis=last) if onesided else np.fft.fft(self, axis=last)
    return _scaled(_c2c(once, dim[:-1], True), _sizes(self, dim), normalization)


@reference("aten._fft_c2r.default")
def fft_c2r(self: Array, dim: Sequence[int], normalization: int, last_dim_size: int) -> Array:
    """The backward transform of a onesided spectrum to last_dim_size real numbers."""
    most = _c2c(self, dim[:-1], False)
    result = np.fft.irfft(most, last_dim_size, axis=dim[-1], norm="forward")
    return _scaled(result, _sizes(result, dim), normalization)
