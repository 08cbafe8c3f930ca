"""What a result is compared with: the operator in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from primexec import _torch
from primexec.testing.families import Row

_WIDE: dict[Any, torch.dtype] = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


def expected(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], row: Row) -> tuple[Tensor, ...]:
    """The results in float64 or complex128, integers as they are.

    Raises:
        Exception: where the operator is not defined for these arguments.
    """
    if not row.native:
        args, kwargs = _torch.pytree.tree_map(_widen, (args, kwargs))
    return tuple(_widen(r.resolve_conj()) for r in evaluate(op, args, kwargs))


def magnitudes(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The sums of the magnitudes of the terms of each result: what their errors are measured by."""
    args, kwargs = _torch.pytree.tree_map(lambda x: _magnitude(_widen(x)), (args, kwargs))
    special = _MAGNITUDES.get(op.name())
    return (special(args),) if special else evaluate(op, args, kwargs)


def _mean_square(args: tuple[Any, ...]) -> Tensor:
    return args[0].square().mean(args[1])  # type: ignore[no-any-return]


def _total(args: tuple[Any, ...]) -> Tensor:
    """Every result of a transform adds up every element, twice where half of them are implied."""
    return 2 * args[0].abs().sum()  # type: ignore[no-any-return]


# Where the operator itself, on the absolute values of its arguments, does not tell.
_MAGNITUDES: dict[str, Callable[[tuple[Any, ...]], Tensor]] = {
    "prims::var": _mean_square,
    **dict.fromkeys(("prims::fft_c2c", "prims::fft_r2c", "prims::fft_c2r"), _total),
}


def evaluate(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Run one operator by eager PyTorch."""
    result = (_torch.prim_as_aten(op) or op)(*args, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _magnitude(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.dtype.is_floating_point else value
