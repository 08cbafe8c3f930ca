"""Arrays from numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array, cast, largest, storage
from primexec.reference.registry import reference


@reference("prims.full.default")
def full(
    shape: Sequence[int], fill_value: Any, *, dtype: Any, device: Any = None, requires_grad: bool = False
) -> Array:
    """Every element is the value."""
    return np.full(tuple(shape), cast(np.asarray(fill_value), dtype))


@reference("prims.iota.default")
def iota(length: int, *, start: int, step: int, dtype: Any, device: Any = None, requires_grad: bool = False) -> Array:
    """start, start + step, ..., length numbers."""
    return cast(start + step * np.arange(length), dtype)


@reference("prims.empty_strided.default")
def empty_strided(
    shape: Sequence[int], strides: Sequence[int], *, dtype: Any, device: Any = None, requires_grad: bool = False
) -> Array:
    """Memory that is not written: NaN, or the largest integer, so that reading it shows."""
    held = storage(dtype)
    return np.full(tuple(shape), np.nan if held.kind in "fc" else largest(dtype), held)
