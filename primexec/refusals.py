"""Which operators are left to PyTorch's kernels because these may refuse the dtypes of their operands.

PyTorch's rules for fake tensors do not always ask, and kernels made of prims convert: `mm` of float32 and float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec._torch import pytree

_PLAIN = ({torch.float32}, {torch.float64})
_HALVES = (torch.bfloat16, torch.float16)


def why(node: fx.Node) -> str:
    """Why only PyTorch may run a node; empty where its kernel is known to take such operands."""
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    if not isinstance(node.target, _torch.OpOverload) or node.target.namespace != "aten" or effects.is_view(node):
        return ""
    tensors = [t for t in operands if isinstance(t, Tensor)]
    if len(tensors) < len(operands) or {t.dtype for t in tensors} in ([], *_PLAIN) or effects.has_effect(node):
        return ""
    refused = _asked(node, tensors)
    if refused is None:
        floats = [t.dtype for t in tensors if t.is_floating_point() or t.is_complex()]
        of_norm = "norm" in node.target._schema.name and tensors[0].dtype in _HALVES
        refused = len({*floats} - ({torch.float32} if of_norm else set())) > 1
    return "PyTorch's kernel may refuse operands of these dtypes" if refused else ""


def _asked(node: fx.Node, tensors: list[Tensor]) -> bool | None:
    """Whether the kernel refuses single numbers of these dtypes and takes others; None where that tells nothing."""
    numbers = {n: i for i, n in enumerate(node.all_input_nodes)}
    leaves, tree = pytree.tree_flatten(fx.node.map_arg((node.args, node.kwargs), lambda n: _Operand(numbers[n])))
    if any(type(leaf) is int and leaf > 1 for leaf in leaves):  # sizes, that the kernel would trust
        return None
    specs = tuple((t.dtype, t.dim(), t.device) for t in tensors)
    return _refused(node.target, tree, tuple(leaves), specs)


class _Operand(int):
    """The place of a tensor among the operands."""


@lru_cache(maxsize=4096)
def _refused(op: Callable[..., Any], tree: Any, leaves: tuple[Any, ...], specs: tuple[Any, ...]) -> bool | None:
    def takes(floats: torch.dtype | None, others: torch.dtype | None) -> bool:
        kinds = [floats if d.is_floating_point or d.is_complex else others for d, _, _ in specs]
        made = [
            torch.full((1,) * dim, float(chosen.is_floating_point), dtype=chosen, device=device)
            for (dtype, dim, device), kind in zip(specs, kinds, strict=True)
            for chosen in [kind or dtype]
        ]
        args, kwargs = pytree.tree_unflatten([made[x] if isinstance(x, _Operand) else x for x in leaves], tree)
        try:
            op(*args, **kwargs)
        except Exception:  # such as one of shapes
            return False
        return True

    with _torch.quiet_modes(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if takes(None, None):
            return False
        others = ((torch.float32, torch.float32), (torch.float32, torch.int64))
        return True if any(takes(*kinds) for kinds in others) else None
