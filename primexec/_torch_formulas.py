"""Formulas of PyTorch's autograd that read values. Like `_torch.py`, this file touches private names.

In a few nodes PyTorch chooses the formula of a gradient by the values of tensors. Under a trace it takes one that is
always right, whose rounding, strides and memory are others. Here both are computed, and a mask chooses as eager does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from primexec._torch_autograd import autograd_nodes

Gradients = tuple[Tensor | None, ...]


def _prod(node: Any, found: Gradients, given: Gradients) -> Gradients:
    """Division by the factor, if no factor is zero."""
    x, result, gradient, safe = node._saved_self, node._saved_result, given[0], found[0]
    if x.dim() == 0 or gradient is None or safe is None:
        return found
    zeros = (x == 0).sum()
    if hasattr(node, "_saved_dim"):
        if not node._saved_keepdim:
            dim = ctypes.c_int64(node._saved_dim).value  # it is shown without its sign
            gradient, result = gradient.unsqueeze(dim), result.unsqueeze(dim)
    else:  # a second zero makes all gradients zero, whatever the safe formula makes of infinite factors
        safe = torch.where(zeros == 1, safe, 0)
    return (torch.where(zeros == 0, gradient * (result / x).conj(), safe),)


def _masked_fill(node: Any, found: Gradients, given: Gradients) -> Gradients:
    """The gradient of the value that is filled in: a sum of the selected ones, in which the others are not zeros."""
    if found[1] is None or given[0] is None:
        return found
    return (found[0], given[0].masked_select(node._saved_mask).sum())


def _det(node: Any, found: Gradients, given: Gradients) -> Gradients:
    """The solution of equations, for a matrix that is not singular."""
    if given[0] is None or not node._saved_A.numel():
        return found
    matrix, det = node._saved_A, node._saved_result
    torch._assert_async((det != 0).all(), "a derivative of det() is differentiated at a singular matrix")
    scaled = (given[0] * det.conj())[..., None, None] * torch.eye(
        matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
    )
    return (torch.linalg.solve(matrix.mH, scaled),)


_DIFFERENTIABLE: dict[str, Callable[[Any, Gradients, Gradients], Gradients]] = {"LinalgDetBackward0": _det}
_FORMULAS: dict[str, Callable[[Any, Gradients, Gradients], Gradients]] = {
    "ProdBackward0": _prod,
    "ProdBackward1": _prod,
    "MaskedFillBackward1": _masked_fill,
}


def has_choices(outputs: Sequence[Tensor]) -> bool:
    """Whether a backward pass from these outputs chooses a formula by values."""
    return any(node.name() in _FORMULAS for node in autograd_nodes(outputs))


@contextmanager
def as_eager_chooses(outputs: Sequence[Tensor], differentiable: bool = False) -> Iterator[None]:
    """Meanwhile, a backward pass from these outputs of a trace gives the gradients that eager gives.

    Args:
        differentiable: whether the gradients are differentiated in turn; most formulas that are always right will do.
    """
    formulas = _DIFFERENTIABLE if differentiable else _FORMULAS
    named = [(node, type(node).__name__) for node in autograd_nodes(outputs)]  # custom functions may set `ctx.name`
    nodes = [(node, formulas[name]) for node, name in named if name in formulas]
    handles = [node.register_hook(partial(_replaced, formula, node)) for node, formula in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(formula: Any, node: Any, found: Gradients, given: Gradients) -> Gradients:
    try:
        return formula(node, found, given)  # type: ignore[no-any-return]
    except CheckpointError:  # inside a checkpoint a saved tensor can be read once
        return found
