"""Which operators are left to PyTorch's kernels because these may refuse their numbers or the dtypes of operands.

PyTorch's rules for fake tensors do not always ask, and kernels made of prims convert: `mm` of float32 and float64,
numbers beyond the range of a dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec._torch import pytree

_PLAIN = ({torch.float32}, {torch.float64})
_NUMBERS = frozenset({"number", "Optional[number]", "float", "Optional[float]"})  # by type of the argument
_HALVES = (torch.bfloat16, torch.float16)


def why(node: fx.Node) -> str:
    """Why only PyTorch may run a node; empty where its kernel is known to take such operands."""
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    if not isinstance(node.target, _torch.OpOverload) or node.target.namespace != "aten" or effects.is_view(node):
        return ""
    tensors = [t for t in operands if isinstance(t, Tensor)]
    given, numbered = _marked(node)
    plain = {t.dtype for t in tensors} in _PLAIN and not numbered
    if len(tensors) < len(operands) or plain or effects.has_effect(node):
        return ""
    refused = _asked(node, given, tensors)
    if refused is None:
        floats = [t.dtype for t in tensors if t.is_floating_point() or t.is_complex()]
        of_norm = "norm" in node.target._schema.name and tensors[0].dtype in _HALVES
        refused = len({*floats} - ({torch.float32} if of_norm else set())) > 1
    return "PyTorch's kernel may refuse such dtypes or numbers" if refused else ""


@dataclass(frozen=True, slots=True)
class _Number:
    """A number that an operator takes as one."""

    kind: type
    value: Any


def _marked(node: fx.Node) -> tuple[dict[str, Any], bool]:
    """The arguments by name, with numbers marked and sizes of what they fill small; and whether there are numbers."""
    formals = {f.name: str(f.type) for f in node.target._schema.arguments}  # type: ignore[union-attr]
    given: dict[str, Any] = {**dict(zip(formals, node.args, strict=False)), **node.kwargs}
    numbers = {
        name: _Number(float if isinstance(v, float) else int, v)
        for name, v in given.items()
        if formals[name] in _NUMBERS and type(v) in (bool, int, float)
    }
    sizes = {name: [_Small(2)] * len(given[name]) for name in ("size", "pad") if numbers and name in given}
    return given | numbers | sizes, bool(numbers)


def _asked(node: fx.Node, given: dict[str, Any], tensors: list[Tensor]) -> bool | None:
    """Whether the kernel refuses these dtypes and numbers and takes others; None where that tells nothing."""
    places = {n: i for i, n in enumerate(node.all_input_nodes)}
    leaves, tree = pytree.tree_flatten(fx.node.map_arg(given, lambda n: _Operand(places[n])))
    if any(type(leaf) is int and leaf > 1 for leaf in leaves):  # sizes, that the kernel would trust
        return None
    specs = tuple((t.dtype, t.dim(), t.device) for t in tensors)
    return _refused(node.target, tree, tuple(leaves), specs)


class _Operand(int):
    """The place of a tensor among the operands."""


class _Small(int):
    """A size of what a number fills."""


@lru_cache(maxsize=4096)
def _refused(op: Callable[..., Any], tree: Any, leaves: tuple[Any, ...], specs: tuple[Any, ...]) -> bool | None:
    size = 1 + any(isinstance(x, _Number) for x in leaves)  # a tensor of one number is filled without checks

    def takes(floats: torch.dtype | None, others: torch.dtype | None, whole: bool = False) -> bool:
        kinds = [floats if d.is_floating_point or d.is_complex else others for d, _, _ in specs]
        made = [
            torch.full((size,) * dim, float(chosen.is_floating_point), dtype=chosen, device=device)
            for (dtype, dim, device), kind in zip(specs, kinds, strict=True)
            for chosen in [kind or dtype]
        ]
        values = [
            made[x] if isinstance(x, _Operand) else x if not isinstance(x, _Number) else x.value if whole else x.kind(1)
            for x in leaves
        ]
        try:
            op(**pytree.tree_unflatten(values, tree))
        except Exception:  # such as one of shapes
            return False
        return True

    with _torch.quiet_modes(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if takes(None, None, True):
            return False
        others = ((None, None), (torch.float32, torch.float32), (torch.float32, torch.int64))
        return True if any(takes(*kinds) for kinds in others) else None
