"""What rounding explains: how far one operator's result may lie from the exact result of the same inputs.

Each operator belongs to a class with a bound for each element (u: half the dtype's eps; v: u of the arithmetic
inside the operator, which is float32's for 16-bit dtypes; x: inputs; y: the exact result):

    exact        half a unit in the last place (ulp) of y: moves, selections, casts
    rounded      1 ulp: one arithmetic operation; 2 where a Python number is rounded first
    accurate     6 ulp; 1.5 ulp in 16-bit dtypes, which compute in float32: exp, tanh, sigmoid, ...
    conditioned  4 ulp, and 4 times what a relative change u of each input does to y: every other pointwise operator
    first        8 ulp, and 8 u |x0|: cancels inside, as x (1 + erf x) does
    softmax      u y (16 + 4 max |x|), without the factor y for its logarithm, and 1 ulp
    terms        2 ulp, and v g(n) op(|x|) for n terms in each sum, g(n) = min(n, 8 + 4 sqrt n): sums, matrix products
    stable       16 times u max |y| and what a relative change u of the inputs does to max |y|: everything else

The bound for sums is the usual one for their backward error with sqrt n in place of n (Higham, Accuracy and Stability
of Numerical Algorithms, 2nd ed., chapters 3 and 4). Each class adds the smallest normal number, for underflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, exact
from primexec.ulp import difference, finfo, is_floating, spacing

_CLASSES = {
    "exact": """
        _reshape_alias _to_copy _unsafe_view abs alias amax amin as_strided bitwise_and broadcast_in_dim cat
        ceil clamp clamp_max clamp_min clone collapse_view constant_pad_nd convert_element_type copy
        copysign detach diagonal embedding expand fill flip floor full full_like gather hardtanh
        hardtanh_backward index index_put index_select leaky_relu lift_fresh_copy masked_fill masked_scatter
        max max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices maximum min
        minimum nan_to_num neg new_full new_ones new_zeros ones ones_like permute pixel_shuffle
        reflection_pad1d reflection_pad2d relu repeat replication_pad1d replication_pad2d reshape roll round
        scalar_tensor scatter select select_backward select_scatter sign slice slice_backward slice_scatter
        sort split split_with_sizes squeeze stack t threshold threshold_backward topk transpose tril triu
        trunc unbind unfold unsafe_split unsqueeze upsample_nearest1d upsample_nearest2d view
        view_as_complex view_as_real where zero zeros zeros_like
    """,
    "rounded": """
        arange div hypot linspace mul reciprocal sqrt square true_divide
    """,
    "accurate": """
        acos acosh asin asinh atan atan2 atanh cos cosh erf erfc exp exp2 expm1 log log10 log1p log2 pow
        rsqrt sigmoid silu sin sinh tanh
    """,
    "first": """
        celu elu gelu gelu_backward log_sigmoid_backward log_sigmoid_forward mish selu softplus
        softplus_backward
    """,
    "softmax": """
        _log_softmax _softmax log_softmax logsumexp softmax
    """,
    "terms": """
        _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d addbmm addmm addmv
        avg_pool2d avg_pool2d_backward avg_pool3d baddbmm bmm convolution convolution_backward cumprod
        cumsum dot linalg_vector_norm linear mean mm mv nansum norm prod sum trace upsample_bicubic2d
        upsample_bilinear2d upsample_linear1d vdot
    """,
    "accumulated": """
        _embedding_bag embedding_dense_backward index_add scatter_add scatter_reduce
    """,
}
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
_SINGLE = ("add", "sub", "rsub")  # correctly rounded where alpha is one
_CONTRACTED = frozenset(["mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot", "linear"])
_BIAS = {"addmm": 0, "baddbmm": 0, "addbmm": 0, "addmv": 0, "convolution": 2}
_REDUCED = frozenset(["sum", "mean", "prod", "nansum", "norm", "linalg_vector_norm"])


def kind_of(node: fx.Node) -> str:
    """The class of a node's operator."""
    op: Any = node.target
    if not isinstance(op, _torch.OpOverload):
        return "exact" if callable(op) and not isinstance(op, _torch.HigherOrderOperator) else "stable"
    name = _name(op)
    if name in _SINGLE:
        return "rounded" if len(node.args) < 3 and node.kwargs.get("alpha", 1) == 1 else "conditioned"
    if name == "index_put" and (node.kwargs.get("accumulate") or True in node.args[3:]):
        return "accumulated"
    if name == "pow" and not isinstance(node.args[0], fx.Node):
        return "conditioned"
    if name in _CLASS_OF:
        return _CLASS_OF[name]
    return "conditioned" if torch.Tag.pointwise in op.tags else "stable"


def _name(op: Any) -> str:
    """`add` for aten::add_ too."""
    name: str = op._schema.name.partition("::")[2]
    return name if name in _CLASS_OF else name.removesuffix("_")


def results_of(value: Any) -> list[Any]:
    """The results of a node as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def allowances(node: fx.Node, value_of: Callable[[fx.Node], Any], exact_result: Any) -> list[Tensor | None]:
    """For each result of a node how far each element may lie from the exact one; None for what is not rounded.

    Args:
        node: an operator that changes nothing in place, or whose arguments are copies.
        value_of: the wide values of its arguments.
        exact_result: its wide result.
    """
    dtypes = exact.dtypes_of(node)
    outs = results_of(exact_result)
    rounded = [d is not None and is_floating(d) and isinstance(y, Tensor) for d, y in zip(dtypes, outs, strict=True)]
    if not any(rounded):
        return [None] * len(outs)
    bound = _BOUNDS[kind_of(node)](_Case(node, value_of, outs))
    found: list[Tensor | None] = []
    for i, (dtype, y) in enumerate(zip(dtypes, outs, strict=True)):
        found.append(bound(i, y, dtype) + finfo(dtype).tiny if rounded[i] and dtype else None)
    return found


class _Case:
    """One node with the values of its arguments."""

    def __init__(self, node: fx.Node, value_of: Callable[[fx.Node], Any], outs: list[Any]) -> None:
        self.node, self.value_of, self.outs = node, value_of, outs
        self.floating = [
            n
            for n in node.all_input_nodes
            if isinstance(t := value_of(n), Tensor) and is_floating(t.dtype) and t.numel()
        ]

    def again(self, change: Callable[[fx.Node, Tensor], Tensor]) -> list[Any]:
        """The results with the floating arguments changed."""
        values: dict[fx.Node, Any] = {}
        for n in self.node.all_input_nodes:
            value = self.value_of(n)
            values[n] = (
                change(n, value) if n in self.floating else value.clone() if isinstance(value, Tensor) else value
            )
        return results_of(exact.evaluate(self.node, values.__getitem__))

    def first(self) -> Tensor:
        value: Tensor = self.value_of(self.floating[0])
        return value.abs()

    def input_unit(self, n: fx.Node) -> float:
        return unit(n.meta["val"].dtype)


Bound = Callable[[int, Tensor, torch.dtype], Tensor]


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance of one to the next number."""
    return finfo(dtype).eps / 2 if is_floating(dtype) else 0.0


def _inner(dtype: torch.dtype) -> float:
    return min(unit(dtype), unit(torch.float32))


def _ulps(count: float, count16: float | None = None) -> Callable[[_Case], Bound]:
    def bound(case: _Case) -> Bound:
        def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
            return (count16 if count16 and finfo(dtype).bits == 16 else count) * spacing(y, dtype)

        return of

    return bound


def _conditioned(case: _Case) -> Bound:
    changes = []
    for changed in case.floating:
        u = case.input_unit(changed)
        changes.append(case.again(lambda n, x, changed=changed, u=u: x * (1 + u) if n is changed else x.clone()))  # type: ignore[misc]

    def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
        total = 4 * spacing(y, dtype)
        for change in changes:
            total = total + 4 * _finite(difference(change[i], y, exact.wide(dtype)))
        return total

    return of


def _first(case: _Case) -> Bound:
    def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
        scale = case.first() if case.floating and case.first().shape == y.shape else y.abs()
        return 8 * _inner(dtype) * _finite(scale) + _ulps(8, 1.5)(case)(i, y, dtype)

    return of


def _softmax(case: _Case) -> Bound:
    largest = _finite(case.first()).max().item() if case.floating else 0.0
    logarithm = "log" in str(case.node.target)

    def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
        size = y.abs().nan_to_num(0.0, 0.0, 0.0)
        relative = _inner(dtype) * (16 + 4 * largest)
        return relative * (1 + size if logarithm else size) + spacing(size, dtype)

    return of


def _terms(inner: Callable[[torch.dtype], float]) -> Callable[[_Case], Bound]:
    def bound(case: _Case) -> Bound:
        sizes = case.again(lambda n, x: x.abs())
        added = (
            case.first() if case.floating and len(case.floating) > 2 else None
        )  # the bias is added to a rounded product

        def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
            n = _term_count(case.node, case.value_of, y)
            total = 2 * spacing(y, dtype)
            if added is not None:
                total = total + 2 * unit(dtype) * _finite(added).max()
            return total + inner(dtype) * min(n, 8 + 4 * math.sqrt(n)) * _finite(sizes[i].abs())

        return of

    return bound


def _term_count(node: fx.Node, value_of: Callable[[fx.Node], Any], y: Tensor) -> int:
    name = _name(node.target)
    tensors = [t for n in node.all_input_nodes if isinstance(t := value_of(n), Tensor)]
    if name in _CONTRACTED:
        last = tensors[-1]
        return int(last.shape[-1 if last.dim() == 1 else -2]) + 1
    if name == "convolution" and tensors[1].shape[0]:
        return tensors[1][0].numel() + 1
    largest = max((t.numel() for t in tensors), default=1)
    return max(1, largest // max(1, y.numel())) if name in _REDUCED else largest


def _stable(case: _Case) -> Bound:
    generator = torch.Generator().manual_seed(0)

    def nudge(n: fx.Node, x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        return x * (1 + case.input_unit(n) * sign)

    changed = [case.again(nudge) for _ in range(2)]

    def of(i: int, y: Tensor, dtype: torch.dtype) -> Tensor:
        if y.numel() == 0:
            return y.abs().double()
        moved = max(_finite(difference(c[i], y, exact.wide(dtype))).max().item() for c in changed)
        return torch.full_like(y.abs().double(), 16 * (unit(dtype) * _finite(y.abs()).max().item() + moved))

    return of


def _finite(t: Tensor) -> Tensor:
    return t.double().nan_to_num(0.0, 0.0, 0.0)


_BOUNDS: dict[str, Callable[[_Case], Bound]] = {
    "exact": _ulps(0.5),
    "rounded": lambda case: _ulps(2 if any(isinstance(a, float) for a in case.node.args) else 1)(case),
    "accurate": _ulps(6, 1.5),
    "conditioned": _conditioned,
    "first": _first,
    "softmax": _softmax,
    "terms": _terms(_inner),
    "accumulated": _terms(unit),
    "stable": _stable,
}


def excess(got: Tensor, expected: Tensor, allowed: Tensor | None, dtype: torch.dtype) -> float:
    """The largest ratio of an element's error to what it is allowed; at most one where rounding explains all."""
    if not got.numel():
        return 0.0
    if allowed is None:
        return 0.0 if torch.equal(got.detach(), expected.detach()) else math.inf
    return (difference(got, expected, dtype) / allowed).max().item()
