"""Decompositions of our own: where PyTorch has none, or one that reads memory by strides, writes, or loses precision.

Each takes the operator's arguments and calls ordinary PyTorch, which is taken apart in its turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RULES: dict[str, Callable[..., Any]] = {}


class NoExpansionError(Exception):
    """An operator that cannot be taken apart; the text is the reason."""


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function under qualified names of operators."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which terms of this one are added up."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _aten(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _prim(name: str) -> Any:
    return getattr(torch.ops.prims, name).default


# Pointwise ----------------------------------------------------------------------------------------------


@rule("aten.__lshift__.Scalar", "aten.__lshift__.Tensor")
def _lshift(a: Tensor, b: Tensor | int) -> Any:
    return torch.bitwise_left_shift(a, b)


@rule("aten.__rshift__.Scalar", "aten.__rshift__.Tensor")
def _rshift(a: Tensor, b: Tensor | int) -> Any:
    return torch.bitwise_right_shift(a, b)


# Views --------------------------------------------------------------------------------------------------


@rule("aten.reshape.default", "aten._unsafe_view.default", "prims.reshape.default", "aten._reshape_copy.default")
def _reshape(a: Tensor, shape: list[int]) -> Any:
    try:
        return _aten("view")(a, shape)
    except (RuntimeError, ValueError):
        return _aten("view")(a.clone(memory_format=torch.contiguous_format), shape)


@rule("prims.collapse_view.default", "prims.collapse.default")
def _collapse(a: Tensor, start: int, end: int) -> Any:
    return _reshape(a, [*a.shape[:start], math.prod(a.shape[start : end + 1]), *a.shape[end + 1 :]])


@rule("prims.split_dim.default")
def _split_dim(a: Tensor, dim: int, outer: int) -> Any:
    return _reshape(a, [*a.shape[:dim], outer, a.shape[dim] // max(outer, 1), *a.shape[dim + 1 :]])


@rule("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default", "aten.lift.default")
def _alias(a: Tensor) -> Any:
    return _prim("view_of")(a)


@rule("aten.lift_fresh_copy.default")
def _lift(a: Tensor) -> Any:
    return a.clone()


@rule("aten.select.int")
def _select(a: Tensor, dim: int, index: int) -> Any:
    dim, size = dim % a.dim(), a.shape[dim]
    index = index % size
    return _prim("squeeze")(_aten("slice.Tensor")(a, dim, index, index + 1), [dim])


@rule("aten.unsqueeze.default")
def _unsqueeze(a: Tensor, dim: int) -> Any:
    dim %= a.dim() + 1
    shape = [*a.shape[:dim], 1, *a.shape[dim:]]
    return _prim("broadcast_in_dim")(a, shape, [i for i in range(len(shape)) if i != dim])


@rule("aten.diagonal.default")
def _diagonal(a: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    dim1, dim2 = dim1 % a.dim(), dim2 % a.dim()
    if (dim1, dim2) != (a.dim() - 2, a.dim() - 1):
        a = a.movedim((dim1, dim2), (-2, -1))
    rows, columns = a.shape[-2:]
    start = offset if offset >= 0 else -offset * columns
    count = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))
    flat = a.reshape(*a.shape[:-2], rows * columns)
    return _aten("slice.Tensor")(flat, -1, start, start + max(0, (count - 1) * (columns + 1) + 1) if count else start,
                                 columns + 1)  # fmt: skip


@rule("aten.unfold.default")
def _unfold(a: Tensor, dimension: int, size: int, step: int) -> Any:
    if a.dim() == 0:
        return a.reshape(1)[:size]
    dim = dimension % a.dim()
    starts = torch.arange(0, a.shape[dim] - size + 1, step, device=a.device)
    places = starts.unsqueeze(1) + torch.arange(size, device=a.device)
    return _aten("index.Tensor")(a, [None] * dim + [places]).movedim(dim + 1, -1)


@rule("aten._conj.default")
def _conj(a: Tensor) -> Any:
    return _prim("conj")(a)


@rule("aten._conj_physical.default")
def _conj_physical(a: Tensor) -> Any:
    return _prim("conj_physical")(a) if a.is_complex() else a.clone()


@rule("prims.as_strided.default")
def _as_strided(a: Tensor, size: list[int], stride: list[int], offset: int) -> Any:
    return _aten("as_strided")(a, size, stride, offset)


@rule("aten.complex.default")
def _complex(real: Tensor, imag: Tensor) -> Any:
    real, imag = torch.broadcast_tensors(real, imag)
    return torch.view_as_complex(torch.stack([real, imag], -1))


# Creation -----------------------------------------------------------------------------------------------


@rule("aten.full_like.default")
def _full_like(a: Tensor, value: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return _full(a.shape, value, dtype or a.dtype, device or a.device)


def _full(shape: Any, value: Any, dtype: torch.dtype, device: Any) -> Any:
    return _prim("full")(list(shape), value, dtype=dtype, device=torch.device(device), requires_grad=False)


@rule("aten.full.default")
def _full_aten(
    size: Any, value: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Any:
    kinds = {bool: torch.bool, int: torch.int64, float: torch.get_default_dtype()}
    complexes = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    dtype = dtype or kinds.get(type(value)) or complexes[torch.get_default_dtype()]
    return _full(size, value, dtype, device or "cpu")


@rule("aten.zeros.default")
def _zeros(size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return _full(size, 0, dtype or torch.get_default_dtype(), device or "cpu")


@rule("aten.ones.default")
def _ones(size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return _full(size, 1, dtype or torch.get_default_dtype(), device or "cpu")


@rule("aten.scalar_tensor.default", "prims.scalar_tensor.default")
def _scalar_tensor(
    value: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Any:
    return _full_aten(
        [], value, dtype or (torch.get_default_dtype() if isinstance(value, int) else None), device=device
    )


@rule("aten.fill.Scalar", "prims.fill.default")
def _fill(a: Tensor, value: Any) -> Any:
    return _full(a.shape, value, a.dtype, a.device)


@rule("aten.zero.default")
def _zero(a: Tensor) -> Any:
    return _full(a.shape, 0, a.dtype, a.device)


@rule("aten.fill.Tensor")
def _fill_tensor(a: Tensor, value: Tensor) -> Any:
    return value.to(a.dtype).expand(a.shape).clone()


@rule("aten.empty.memory_format", "aten.empty_permuted.default")
def _empty(size: Any, *rest: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    stride = [math.prod(max(n, 1) for n in size[i + 1 :]) for i in range(len(size))]
    dtype, device = dtype or torch.get_default_dtype(), torch.device(device or "cpu")
    return _prim("empty_strided")(list(size), stride, dtype=dtype, device=device, requires_grad=False)


@rule("aten.constant_pad_nd.default")
def _pad(a: Tensor, pad: list[int], value: Any = 0) -> Any:
    for i in range(len(pad) // 2):
        dim = a.dim() - 1 - i
        before, after = pad[2 * i : 2 * i + 2]
        a = a.narrow(dim, max(0, -before), a.shape[dim] + min(before, 0) + min(after, 0))
        sizes = [[*a.shape[:dim], max(n, 0), *a.shape[dim + 1 :]] for n in (before, after)]
        sides = [_full(size, value, a.dtype, a.device) if size[dim] else None for size in sizes]
        parts = [t for t in (sides[0], a, sides[1]) if t is not None]
        a = torch.cat(parts, dim) if len(parts) > 1 else a
    return a.clone()


# Writing: a decomposition that writes to its own result ------------------------------------------------


@rule("aten.copy.default")
def _copy(a: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    return source.to(device=a.device, dtype=a.dtype).expand(a.shape).clone()


# Precision ----------------------------------------------------------------------------------------------


@rule("prims.var.default")
def _var(a: Tensor, dims: Any, correction: Any = 1, *, output_dtype: Any = None) -> Any:
    """Two passes: the squares are of differences, so nothing cancels."""
    dims = list(range(a.dim())) if dims is None else list(dims)
    count = math.prod(a.shape[d] for d in dims)
    mean = _prim("div")(_prim("sum")(a, dims), float(count)) if count else _prim("sum")(a, dims)
    for d in sorted(dims):
        mean = mean.unsqueeze(d)
    centered = a - mean
    squares = centered * centered.conj() if a.is_complex() else centered * centered
    total = _prim("sum")(torch.real(squares) if a.is_complex() else squares, dims)
    divisor = max(0.0, float(count) - float(1 if correction is None else correction))
    return _prim("div")(total, divisor)


def _spread(a: Tensor, dims: Any, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The variance and the mean, not rounded to half precision, of differences from the first element.

    Those from a mean hold its error. `torch.var` and `torch.std` add up in float64 on CPUs, which holds the squares of
    float32: one pass will do. Of what its sums cancel, at worst one part in as many as are added is left. layer_norm
    and batch_norm add up in float32, and are left with two passes.
    """
    dims = [d % a.dim() for d in dims] if dims and a.dim() else list(range(a.dim()))
    correction = 1 if correction is None else correction
    narrow = a.dtype.is_floating_point and a.dtype is not torch.float64 and a.device.type == "cpu"
    value = a.to(torch.float64 if narrow else wide(a.dtype))
    first = value
    if a.numel() and not a.is_complex():
        for d in dims:
            first = first.narrow(d, 0, 1)
        value = value - first
    if not narrow or not a.numel():
        variance = _prim("var")(value, dims, correction)
        for d in sorted(dims) if keepdim else ():
            variance = variance.unsqueeze(d)
        return variance, a.mean(dims, keepdim)
    count = math.prod(a.shape[d] for d in dims)
    total, squares = value.sum(dims, keepdim), (value * value).sum(dims, keepdim)
    variance = (squares - total * total / count) / max(0.0, count - float(correction))
    return variance, (first if keepdim else first.squeeze(dims)) + total / count


@rule("aten.var.correction")
def _variance(a: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _spread(a, dim, correction, keepdim)[0].to(a.real.dtype)


@rule("aten.std.correction")
def _deviation(a: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _spread(a, dim, correction, keepdim)[0].sqrt().to(a.real.dtype)


@rule("aten.var_mean.correction")
def _variance_and_mean(a: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    variance, mean = _spread(a, dim, correction, keepdim)
    return variance.to(a.real.dtype), mean.to(a.dtype)


@rule("aten.std_mean.correction")
def _deviation_and_mean(a: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    variance, mean = _spread(a, dim, correction, keepdim)
    return variance.sqrt().to(a.real.dtype), mean.to(a.dtype)


@rule("aten.native_layer_norm.default")
def _layer_norm(a: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """PyTorch's, whose statistics are not those of the kernel beside parameters of another dtype."""
    if all(t is None or t.dtype == a.dtype for t in (weight, bias)):
        return NotImplemented
    made, *statistics = torch.ops.aten.native_layer_norm.default(a.to(wide(a.dtype)), shape, weight, bias, eps)
    return made.to(a.dtype), *statistics


@rule("aten.native_batch_norm.default")
def _batch_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, variance: Any, training: bool,
                momentum: float, eps: float) -> Any:  # fmt: skip
    """PyTorch's in training. In evaluation of prims alone, as a model has one for each of its convolutions."""
    if training:
        return NotImplemented
    dtype = wide(a.dtype)

    def beside(t: Tensor) -> Tensor:
        return _prim("broadcast_in_dim")(t.to(dtype), a.shape, [1])  # type: ignore[no-any-return]

    deviation = _prim("sqrt")(_prim("add")(variance.to(dtype), eps))
    made = _prim("mul")(_prim("sub")(a.to(dtype), beside(mean)), beside(_prim("reciprocal")(deviation)))
    made = made if weight is None else _prim("mul")(made, beside(weight))
    made = made if bias is None else _prim("add")(made, beside(bias))
    return made.to(a.dtype), a.new_zeros(0), a.new_zeros(0)


@rule("aten.native_group_norm.default")
def _group_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int,
                eps: float) -> Any:  # fmt: skip
    """PyTorch's, but in one shape, so that the elements of a group are read once."""
    if not a.numel() or not a.is_contiguous():
        return NotImplemented
    x = a.to(wide(a.dtype)).reshape(n, groups, c // groups, *a.shape[2:])
    inner = list(range(2, x.dim()))
    mean = x.mean(inner, keepdim=True)
    centered = x - mean
    inverse = ((centered * centered).mean(inner, keepdim=True) + eps).rsqrt()
    made = centered * inverse
    if weight is not None:
        made = made * weight.to(x.dtype).reshape(groups, c // groups, *[1] * (a.dim() - 2))
    if bias is not None:
        made = made + bias.to(x.dtype).reshape(groups, c // groups, *[1] * (a.dim() - 2))
    dtype = a.dtype if weight is None else weight.dtype
    return made.to(a.dtype).reshape(a.shape), *(t.reshape(n, groups).to(dtype) for t in (mean, inverse))


@rule("aten.angle.default")
def _angle(a: Tensor) -> Any:
    """PyTorch's rule gives pi in the default dtype."""
    if a.is_complex():
        return torch.atan2(torch.imag(a), torch.real(a))
    if not a.dtype.is_floating_point:
        a = a.to(torch.get_default_dtype())
    angles = torch.where(a < 0, _full([], math.pi, a.dtype, a.device), _full([], 0.0, a.dtype, a.device))
    return torch.where(torch.isnan(a), a, angles)


@rule("aten._softmax_backward_data.default")
def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Any:
    """As the kernel: the difference first, so that less cancels."""
    g, y = grad.to(wide(grad.dtype)), output.to(wide(grad.dtype))
    return ((g - (g * y).sum(dim, keepdim=True)) * y).to(input_dtype)


@rule("aten.soft_margin_loss_backward.default")
def _soft_margin_backward(grad: Tensor, a: Tensor, target: Tensor, reduction: int) -> Any:
    """As the kernel: PyTorch's rule takes one from a sigmoid that is close to it."""
    z = torch.exp(-target * a)
    scale = 1 / a.numel() if reduction == 1 and a.numel() else 1
    return target * z * -scale / (z + 1) * grad


@rule("aten.relu.default")
def _relu(a: Tensor) -> Any:
    """As the kernel: -0.0 stays."""
    return torch.where(a < 0, _full([], 0, a.dtype, a.device), a)


@rule("aten.softshrink.default")
def _softshrink(a: Tensor, lambd: float = 0.5) -> Any:
    """As the kernel, which takes the bound with all its digits."""
    x = a.to(wide(a.dtype))
    return torch.where(x > lambd, x - lambd, torch.where(x < -lambd, x + lambd, x * 0)).to(a.dtype)


@rule("aten.ldexp.Tensor")
def _ldexp(a: Tensor, exponent: Tensor) -> Any:
    """As the kernel of whole exponents, which it takes as int32.

    In steps, for the power of two may be infinite where the result is not.
    """
    if not a.is_floating_point() or exponent.is_floating_point():
        return NotImplemented
    whole = exponent.to(torch.int32).to(torch.float64).clamp(-2200, 2200)
    step = torch.trunc(whole / 3)
    scale = torch.exp2(step)
    return (a.to(torch.float64) * scale * scale * torch.exp2(whole - step - step)).to(a.dtype)


@rule("aten.hardsigmoid_backward.default")
def _hardsigmoid_backward(grad: Tensor, a: Tensor) -> Any:
    """As the kernel, whose sixth is a float32 in every dtype."""
    wide = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    slope = grad.to(wide) * 0.1666666716337204
    return torch.where((a > -3) & (a < 3), slope, _full([], 0.0, wide, a.device)).to(grad.dtype)


_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    3.0: lambda a: a * a * a,
    -1.0: torch.reciprocal,
    -2.0: lambda a: torch.reciprocal(a * a),
    -0.5: torch.rsqrt,
}


@rule("aten.pow.Tensor_Scalar")
def _power(a: Tensor, exponent: Any) -> Any:
    """As the kernel, which takes a few exponents apart; PyTorch's rule does so with 2 and a half alone."""
    way = _POWERS.get(exponent) if type(exponent) in (int, float) and a.dtype.is_floating_point else None
    return NotImplemented if way is None else way(a.to(wide(a.dtype))).to(a.dtype)
