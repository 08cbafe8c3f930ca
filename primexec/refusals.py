"""Which operators are left to PyTorch's kernels because these may refuse their numbers or the dtypes of operands.

PyTorch's rules for fake tensors do not always ask, and kernels made of prims convert: `mm` of float32 and float64,
numbers beyond the range of a dtype.
"""

from __future__ import annotations

import math
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
_SMALL = 2**22  # so many elements, operands and results together, cost a trace no more than a call
# They read a number out of a tensor, and refuse what their dtype cannot hold.
_READING = frozenset({torch.ops.aten.masked_fill.Tensor, torch.ops.aten.index_fill.int_Tensor})


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
    refused = _may_not_hold(node, given, tensors) or _asked(node, given, tensors)
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
    """The arguments by name, with numbers marked and sizes of what they fill small; and whether there are numbers.

    A bool in place of a tensor is one as well: kernels refuse some.
    """
    formals = {f.name: str(f.type) for f in node.target._schema.arguments}  # type: ignore[union-attr]
    given: dict[str, Any] = {**dict(zip(formals, node.args, strict=False)), **node.kwargs}
    numbers = {
        name: _Number(float if isinstance(v, float) else int, v)
        for name, v in given.items()
        if (formals[name] in _NUMBERS and type(v) in (bool, int, float, complex))
        or (formals[name] == "Tensor" and type(v) is bool)
    }
    sizes = {name: [_Small(2)] * len(given[name]) for name in ("size", "pad") if numbers and name in given}
    return given | numbers | sizes, bool(numbers)


def _may_not_hold(node: fx.Node, given: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether a dtype may not hold a number: one of the arguments, or one that the kernel reads off a tensor."""
    widest = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    numbers = [x.value for x in given.values() if isinstance(x, _Number)]
    imaginary = any(isinstance(x, complex) for x in numbers) and not any(t.is_complex() for t in tensors)
    reads = node.target in _READING and tensors[0].dtype != tensors[-1].dtype
    return reads or imaginary or any(torch.finfo(widest).max < abs(x) < math.inf for x in numbers)


def _asked(node: fx.Node, given: dict[str, Any], tensors: list[Tensor]) -> bool | None:
    """Whether the kernel refuses these dtypes and numbers and takes others; None where that tells nothing."""
    places = {n: i for i, n in enumerate(node.all_input_nodes)}
    leaves, tree = pytree.tree_flatten(fx.node.map_arg(given, lambda n: _Operand(places[n])))
    refused = None
    if not any(type(leaf) is int and leaf > 1 for leaf in leaves):  # sizes, that the kernel would trust
        size = 1 + any(isinstance(x, _Number) for x in leaves)  # a tensor of one number is filled without checks
        specs = tuple((t.dtype, (size,) * t.dim(), _dense(size, t.dim()), t.device) for t in tensors)
        refused = _refused(node.target, tree, tuple(leaves), specs, repr(leaves))
    sized = [*tensors, *(r for r in pytree.tree_leaves(node.meta.get("val")) if isinstance(r, Tensor))]
    known = all(type(n) is int for t in sized for n in t.shape)
    if refused is None and known and sum(t.numel() for t in sized) <= _SMALL:
        specs = tuple((t.dtype, tuple(t.shape), t.stride(), t.device) for t in tensors)
        refused = _refused(node.target, tree, tuple(leaves), specs, repr(leaves))
    elif refused is None and known:  # one image will do
        few = [(1, 1, *t.shape[2:]) for t in tensors if t.dim() > 2]
        if len(few) == len(tensors) and sum(map(math.prod, few)) <= _SMALL:
            specs = tuple(
                (t.dtype, s, (0, 0, *effects.row_major(s[2:])), t.device) for t, s in zip(tensors, few, strict=True)
            )
            refused = _refused(node.target, tree, tuple(leaves), specs, repr(leaves))
    return refused


class _Operand(int):
    """The place of a tensor among the operands."""


class _Small(int):
    """A size of what a number fills."""


def _dense(size: int, dim: int) -> tuple[int, ...]:
    return tuple(size**i for i in reversed(range(dim)))


@lru_cache(maxsize=4096)
def _refused(
    op: Callable[..., Any], tree: Any, leaves: tuple[Any, ...], specs: tuple[Any, ...], text: str
) -> bool | None:
    """The answer for such operands; the text tells 1, 1.0 and True apart."""

    def takes(floats: torch.dtype | None, others: torch.dtype | None, whole: bool = False) -> bool:
        kinds = [floats if d.is_floating_point or d.is_complex else others for d, *_ in specs]
        made = [_filled(kind or dtype, *rest) for (dtype, *rest), kind in zip(specs, kinds, strict=True)]
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


def _filled(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device) -> Tensor:
    """Ones of a float dtype, or zeros, which are valid indices."""
    size = effects.storage_bytes(shape, stride, dtype) // dtype.itemsize
    return torch.full((size,), float(dtype.is_floating_point), dtype=dtype, device=device).as_strided(shape, stride)
