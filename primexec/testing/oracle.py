"""What a result is compared with: the NumPy reference of the prim, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primexec import _torch, reference
from primexec.testing.families import Row

Values = tuple[Tensor, ...]

_WIDE: dict[Any, torch.dtype] = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


def widen(value: Any) -> Any:
    """A tensor, or a dtype, in float64 or complex128; anything else as it is."""
    if isinstance(value, Tensor):
        return value.resolve_conj().to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def expected(name: str, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
    """The results of one call, floating ones in float64 or complex128 unless the row is native."""
    if not row.native:
        args, kwargs = _torch.pytree.tree_map(widen, (args, kwargs))
    if row.stand_in is None:
        return evaluate(name, args, kwargs)
    results = row.stand_in(*args, **kwargs)
    return tuple(map(widen, results if isinstance(results, tuple) else (results,)))


def evaluate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
    """The results of a reference on tensors of dtypes that NumPy has, without those that were not asked for."""
    args, kwargs = _torch.pytree.tree_map(_array, (args, kwargs))
    results = reference.lookup(name)(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(torch.from_numpy(np.array(r)) for r in results if r is not None)


def _array(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.resolve_conj().resolve_neg().numpy() if isinstance(value, Tensor) else value


def scales(name: str, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any], want: Sequence[Tensor]) -> Values:
    """For each result, what its rounding errors are measured by."""
    return _SCALES[row.scale](name, args, kwargs, want)


def _terms(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], want: Sequence[Tensor]) -> Values:
    args, kwargs = _torch.pytree.tree_map(lambda x: _magnitude(widen(x)), (args, kwargs))
    return evaluate(name, args, kwargs)


def _magnitude(value: Any) -> Any:
    inexact = isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)
    return value.abs() if inexact else value


def _total(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], want: Sequence[Tensor]) -> Values:
    """Every result of a transform adds up every element, twice where half of them are implied."""
    total = 2 * args[0].abs().double().sum()
    return tuple(total.expand(y.shape) for y in want)


def _largest(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], want: Sequence[Tensor]) -> Values:
    return tuple((y.abs().max() if y.numel() else y.abs()).double().expand(y.shape) for y in want)


_SCALES: dict[str, Callable[..., Values]] = {"terms": _terms, "total": _total, "largest": _largest}
