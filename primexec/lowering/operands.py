"""What eager's kernels round before they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from primexec import _torch
from primexec._torch import pytree

_aten: Any = torch.ops.aten
_HALVES = frozenset({torch.bfloat16, torch.float16})
_EXACT = frozenset({torch.bool, torch.uint8, torch.int8})  # what half precision holds
_UNTAGGED = frozenset({_aten.floor_divide.default, _aten.rsub.Tensor})  # pointwise operators that PyTorch forgets
# They take a second operand that is a single number with all its digits.
_WIDE_SECOND = frozenset(
    {_aten.mul.Tensor, _aten.div.Tensor, _aten.div.Tensor_mode, _aten.floor_divide.default, _aten.true_divide.Tensor}
)
# Arguments that are numbers by type, and that kernels take in the dtype of the tensors.
_ROUNDED = frozenset({"other", "self", "alpha", "exponent"})
_ROUNDED_OF = {_aten.hardshrink.default: "lambd", _aten.logit.default: "eps"}


def rounded(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operator, rounded to half precision where eager computes in it.

    PyTorch's rules compute with all digits of numbers and of tensors of other dtypes.
    """
    dtype = _half(args, kwargs) if op in _UNTAGGED or torch.Tag.pointwise in op.tags else None
    if dtype is None:
        return args, kwargs
    formals = op._schema.arguments
    places = {f.name: i for i, f in enumerate(formals)}
    wide = 1 if op in _WIDE_SECOND else None

    def change(place: int, value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = place == wide and not value.dim()
            return value if whole or value.dtype in _EXACT else value.to(dtype)
        formal = formals[place]
        taken = "Tensor" in str(formal.type) or formal.name in _ROUNDED or formal.name == _ROUNDED_OF.get(op)
        if type(value) not in (int, float) or not taken or place == wide:
            return value
        with _torch.modes_off():
            near = torch.tensor(value, dtype=dtype).item()
        return value if near == value else near

    return tuple(change(*given) for given in enumerate(args)), {k: change(places[k], v) for k, v in kwargs.items()}


def _half(args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype in which eager computes, if that is one of half precision.

    Tensors without dimensions count only where there are no others that are floats.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    floats: set[torch.dtype] = set()
    for ranked in ([t for t in tensors if t.dim()], [t for t in tensors if not t.dim()]):
        floats = floats or {t.dtype for t in ranked if t.dtype.is_floating_point or t.is_complex()}
    return floats.pop() if len(floats) == 1 and floats <= _HALVES else None
