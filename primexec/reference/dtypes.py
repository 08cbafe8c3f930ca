"""Dtypes by name, and how arrays hold them: float16 and bfloat16 live in float32 arrays of rounded values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The NumPy dtype that holds the values of each dtype. complex32 is not held.
STORAGE: dict[str, Any] = {
    "bool": np.bool_, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "float16": np.float32, "bfloat16": np.float32, "float32": np.float32, "float64": np.float64,
    "complex64": np.complex64, "complex128": np.complex128,
}  # fmt: skip
_LIMITS = {"bfloat16": 2.0**127 * (2 - 2**-7)}


def name_of(dtype: object) -> str:
    """The plain name of a dtype of NumPy or of torch, or of a name.

    >>> name_of(np.dtype("float32")), name_of("torch.bfloat16")
    ('float32', 'bfloat16')

    Raises:
        TypeError: where no array can hold values of this dtype.
    """
    name = np.dtype(dtype).name if isinstance(dtype, (np.dtype, type)) else str(dtype).removeprefix("torch.")
    if name not in STORAGE:
        raise TypeError(f"the reference has no arrays of {name}")
    return name


def storage(dtype: object) -> np.dtype[Any]:
    """The NumPy dtype whose arrays hold the values of this dtype."""
    held: np.dtype[Any] = np.dtype(STORAGE[name_of(dtype)])
    return held


def at(*place: Any) -> Any:
    """A NumPy index into the last dimensions."""
    return (..., *place)


def is_floating(array: Array) -> bool:
    """Whether the values are real floating-point numbers."""
    return array.dtype.kind == "f"


def cast(array: Array, dtype: object) -> Array:
    """The values converted to a dtype, rounded to nearest even; floats to integers cut towards zero.

    >>> cast(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32), "bfloat16").tolist()
    [1.0, 1.015625]
    """
    name = name_of(dtype)
    target = storage(name)
    if array.dtype.kind == "c" and target.kind not in "cb":
        array = array.real
    if array.dtype.kind == "f" and target.kind in "ui" and target.itemsize < 8:
        array = array.astype(np.int64)  # then modulo 2^bits, as C does by way of a wider integer
    array = array if array.dtype == target else array.astype(target)
    return _ROUND[name](array) if name in _ROUND else array


def _round_float16(array: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(np.float16).astype(np.float32)


def _round_bfloat16(array: Array) -> Array:
    """To the upper 16 bits of a float32, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(array), np.float32(np.nan), rounded.view(np.float32).reshape(array.shape))


_ROUND = {"float16": _round_float16, "bfloat16": _round_bfloat16}


def largest(dtype: object) -> int | float | bool:
    """The largest finite value of a dtype."""
    name = name_of(dtype)
    if name in _LIMITS:
        return _LIMITS[name]
    if name == "bool":
        return True
    return int(np.iinfo(name).max) if np.dtype(name).kind in "ui" else float(np.finfo(name).max)


def smallest(dtype: object) -> int | float | bool:
    """The smallest finite value of a dtype."""
    name = name_of(dtype)
    if name in _LIMITS:
        return -_LIMITS[name]
    if name == "bool":
        return False
    return int(np.iinfo(name).min) if np.dtype(name).kind in "ui" else float(np.finfo(name).min)
