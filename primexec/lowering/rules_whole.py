"""Decompositions of our own for operators that PyTorch keeps whole: linear algebra, losses, pooling, random draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from primexec import _torch
from primexec.lowering.rules import NoExpansionError, rule, wide
from primexec.lowering.rules_resampling import RULES

__all__ = ["RULES"]

_aten = torch.ops.aten


# Matrices -----------------------------------------------------------------------------------------------


@rule("aten.addbmm.default")
def _addbmm(a: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.bmm(x, y).sum(0)
    return product * alpha if beta == 0 else a * beta + product * alpha


@rule("aten.addmm.default")
def _addmm(a: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if a.dtype in (torch.bfloat16, torch.float16):  # rounded once
        return _addmm(a.float(), x.float(), y.float(), beta=beta, alpha=alpha).to(a.dtype)
    product = torch.mm(x, y)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (a if beta == 1 else a * beta)


def _product(a: Tensor, b: Tensor, few: int) -> Tensor:
    """Of `(batch, heads, rows, n)` and `(batch * few, n, columns)`: the heads of a group share one matrix."""
    batch, heads, rows, n = a.shape
    if rows == 1 < heads // few:  # products of vectors, which are kernels: those of several rows are a library's
        vectors = a.reshape(batch * few, heads // few, n, 1)
        found = (vectors * b.unsqueeze(1)).sum(2)
    else:
        found = torch.bmm(a.reshape(batch * few, heads // few * rows, n), b)
    return found.reshape(batch, heads, rows, b.shape[2])


def _scores(q: Tensor, k: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    rows, columns = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = _product(q, k.flatten(0, 1).transpose(1, 2), k.shape[1]) * scale
    if is_causal:
        places = torch.arange(columns, device=q.device) <= torch.arange(rows, device=q.device).unsqueeze(1)
        scores = torch.where(places, scores, -math.inf)
    if attn_mask is not None:
        masked = torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype is torch.bool else attn_mask
        scores = scores + masked.to(q.dtype)
    return scores


@rule("aten._scaled_dot_product_flash_attention_for_cpu.default")
def _attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
               attn_mask: Tensor | None = None, scale: float | None = None) -> Any:  # fmt: skip
    """As the fused kernel: 16-bit inputs are computed in float32; rows that are masked out entirely give 0."""
    if dropout_p:
        return NotImplemented
    dtype = wide(q.dtype)
    scores = _scores(q.to(dtype), k.to(dtype), is_causal, attn_mask, scale)
    top = scores.amax(-1, keepdim=True)
    empty = top == -math.inf
    weights = torch.exp(scores - torch.where(empty, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(empty, 1.0, total)
    out = _product(weights, v.to(dtype).flatten(0, 1), v.shape[1])
    logsumexp = torch.where(empty, -math.inf, torch.log(total) + top).squeeze(-1)
    return out.to(q.dtype), logsumexp


@rule("aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
                        dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None,
                        scale: float | None = None) -> Any:  # fmt: skip
    """The weights are made again from the saved logarithms of their sums; rows masked out entirely have none."""
    if dropout_p:
        return NotImplemented
    dtype = wide(q.dtype)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    totals = logsumexp.to(dtype).unsqueeze(-1)
    scores = _scores(q.to(dtype), k.to(dtype), is_causal, attn_mask, scale)
    weights = torch.where(totals == -math.inf, 0.0, torch.exp(scores - totals)).flatten(0, 1)
    gradient, queries, keys, values, result = (t.to(dtype).flatten(0, 1) for t in (grad, q, k, v, out))
    inner = torch.bmm(gradient, values.transpose(1, 2)) - (gradient * result).sum(-1, keepdim=True)
    inner = weights * inner * factor
    found = (
        torch.bmm(inner, keys),
        torch.bmm(inner.transpose(1, 2), queries),
        torch.bmm(weights.transpose(1, 2), gradient),
    )
    return tuple(
        g.to(t.dtype).unflatten(0, t.shape[:2]).transpose(1, 2).contiguous().transpose(1, 2)
        for g, t in zip(found, (q, k, v), strict=True)
    )


@rule("aten.cholesky.default")
def _cholesky(a: Tensor, upper: bool = False) -> Any:
    factor, info = _aten.linalg_cholesky_ex.default(a, upper=upper, check_errors=False)
    _aten._linalg_check_errors.default(info, "cholesky", is_matrix=a.dim() == 2)
    return factor


@rule("aten.cholesky_solve.default")
def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Any:
    shape = torch.broadcast_shapes(b.shape[:-2], factor.shape[:-2])
    factor = (factor.mH if upper else factor).expand(*shape, *factor.shape[-2:])
    half = torch.linalg.solve_triangular(factor, b.expand(*shape, *b.shape[-2:]), upper=False)
    return torch.linalg.solve_triangular(factor.mH, half, upper=True)


@rule("aten.cholesky_inverse.default")
def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Any:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    return _cholesky_solve(eye, factor, upper)


@rule("aten.triangular_solve.default")
def _triangular_solve(
    b: Tensor, a: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    shape = torch.broadcast_shapes(b.shape[:-2], a.shape[:-2])
    a = a.expand(*shape, *a.shape[-2:])
    used, is_upper = (a.mT, not upper) if transpose else (a, upper)
    right = b.expand(*shape, *b.shape[-2:])
    return torch.linalg.solve_triangular(used, right, upper=is_upper, unitriangular=unitriangular), a.clone()


def _lu_sign(lu: Tensor, pivots: Tensor) -> Any:
    places = torch.arange(1, lu.shape[-1] + 1, dtype=pivots.dtype, device=lu.device)
    return 1 - 2 * ((pivots != places).sum(-1) % 2)


@rule("aten._linalg_det.default")
def _det(a: Tensor) -> Any:
    lu, pivots, _ = _aten.linalg_lu_factor_ex.default(a)
    return lu.diagonal(0, -2, -1).prod(-1) * _lu_sign(lu, pivots), lu, pivots


@rule("aten._linalg_slogdet.default")
def _slogdet(a: Tensor) -> Any:
    lu, pivots, _ = _aten.linalg_lu_factor_ex.default(a)
    diagonal = lu.diagonal(0, -2, -1)
    return diagonal.sgn().prod(-1) * _lu_sign(lu, pivots), diagonal.abs().log().sum(-1), lu, pivots


@rule("aten.linalg_lu.default")
def _lu(a: Tensor, *, pivot: bool = True) -> Any:
    lu, pivots, _ = _aten.linalg_lu_factor_ex.default(a, pivot=pivot)
    return _aten.lu_unpack.default(lu, pivots, unpack_pivots=pivot) if pivot else NotImplemented


@rule("aten.linalg_pinv.atol_rtol_tensor")
def _pinv(a: Tensor, *, atol: Tensor | None = None, rtol: Tensor | None = None, hermitian: bool = False) -> Any:
    if a.numel() == 0:
        return torch.zeros(*a.shape[:-2], a.shape[-1], a.shape[-2], dtype=a.dtype, device=a.device)
    default = torch.finfo(a.dtype).eps * max(a.shape[-2:])
    if rtol is None:
        rtol = torch.full((), default) if atol is None else torch.where(atol > 0, 0.0, default)
    if hermitian:
        values, vectors = torch.linalg.eigh(a)
        size = values.abs()
        cut = torch.maximum(atol if atol is not None else torch.zeros_like(rtol), rtol * size.amax(-1))
        inverse = torch.where(size > cut.unsqueeze(-1), values.reciprocal(), 0.0).to(values.dtype)
        return (vectors * inverse.unsqueeze(-2)) @ vectors.mH
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    cut = torch.maximum(atol if atol is not None else torch.zeros_like(rtol), rtol * s[..., 0])
    inverse = torch.where(s > cut.unsqueeze(-1), s.reciprocal(), 0.0).to(s.dtype)
    return (vh.mH * inverse.unsqueeze(-2)) @ u.mH


@rule("aten._trilinear.default")
def _trilinear(a: Tensor, b: Tensor, c: Tensor, *dims_and_unroll: Any) -> Any:
    *expanded, sumdim = dims_and_unroll[:4]
    for i, dims in enumerate(expanded):
        for d in dims:
            a, b, c = (t.unsqueeze(d) if i == j else t for j, t in enumerate((a, b, c)))
    return (a * b * c).sum(sumdim)


# Checks of values ---------------------------------------------------------------------------------------


@rule("aten._assert_async.default")
def _assert_async(a: Tensor) -> Any:
    return _aten._assert_async.msg(a, "Expected Tensor with single nonzero value, but got zero")


@rule("aten.binary_cross_entropy.default")
def _binary_cross_entropy(a: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Any:
    for name, t in (("input", a), ("target", target)):
        inside = ((t >= 0) & (t <= 1)).all()
        _aten._assert_async.msg(inside, f"all elements of {name} should be between 0 and 1")
    decomposition: Any = _torch.decomposition(_aten.binary_cross_entropy.default)
    return decomposition(a, target, weight, reduction)


# Distances ----------------------------------------------------------------------------------------------


def _norm(difference: Tensor, p: float) -> Any:
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == math.inf:
        return size.amax(-1)
    return size.sum(-1) if p == 1 else size.pow(p).sum(-1).pow(1 / p)


@rule("aten._cdist_forward.default")
def _cdist(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Any:
    if not a.shape[-1]:
        return NotImplemented
    return _norm(a.unsqueeze(-2) - b.unsqueeze(-3), p)


def pairs(a: Tensor) -> tuple[Tensor, Tensor]:
    """The rows i < j of each pair, in row-major order: the places where a triangle of ones stands."""
    n = a.shape[0]
    ends = torch.arange(n - 1, 0, -1, device=a.device).cumsum(0)
    k = torch.arange(n * (n - 1) // 2, device=a.device)
    i = torch.searchsorted(ends, k, right=True)
    return i, k - ends[i] + n


@rule("aten._pdist_forward.default")
def _pdist(a: Tensor, p: float = 2) -> Any:
    if a.shape[0] < 2:
        return torch.zeros(0, dtype=a.dtype, device=a.device)
    i, j = pairs(a)
    return _norm(a[i] - a[j], p)


# Special functions --------------------------------------------------------------------------------------


@rule("aten.polygamma.default")
def _polygamma(n: int, a: Tensor) -> Any:
    a = a if a.is_floating_point() else a.to(torch.get_default_dtype())
    if n == 0:
        return torch.digamma(a)
    if n == 1:
        return torch.special.zeta(torch.full_like(a, 2.0), a)
    return torch.special.zeta(torch.full_like(a, n + 1.0), a) * (math.factorial(n) * (-1.0) ** (n + 1))


@rule("aten.special_modified_bessel_i0.default")
def _bessel_i0(a: Tensor) -> Any:
    return torch.special.i0(a)


@rule("aten.special_modified_bessel_i1.default")
def _bessel_i1(a: Tensor) -> Any:
    return torch.special.i1(a)


# Indexing, order ----------------------------------------------------------------------------------------


@rule("aten.split.Tensor", "aten.unsafe_split.Tensor")
def _split(a: Tensor, size: int, dim: int = 0) -> Any:
    total = a.shape[dim]
    return [_aten.slice.Tensor(a, dim, i, i + size) for i in range(0, max(total, 1), max(size, 1))]


@rule("aten.split_with_sizes.default", "aten.unsafe_split_with_sizes.default")
def _split_with_sizes(a: Tensor, sizes: list[int], dim: int = 0) -> Any:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_aten.slice.Tensor(a, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@rule("aten.split_with_sizes_copy.default")
def _split_copy(a: Tensor, sizes: list[int], dim: int = 0) -> Any:
    return [part.clone() for part in _split_with_sizes(a, sizes, dim)]


@rule("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def _channel_shuffle(a: Tensor, groups: int) -> Any:
    n, channels, *rest = a.shape
    return a.reshape(n, groups, channels // groups, *rest).transpose(1, 2).reshape(a.shape)


@rule("aten.diagonal_scatter.default")
def _diagonal_scatter(a: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    moved = a.movedim((dim1, dim2), (-2, -1))
    rows, columns = moved.shape[-2:]
    start = offset if offset >= 0 else -offset * columns
    flat = moved.reshape(*moved.shape[:-2], rows * columns)
    count = source.shape[-1]
    if not count:
        return a.clone()
    end = start + (count - 1) * (columns + 1) + 1
    put = _aten.slice_scatter.default(flat, source, flat.dim() - 1, start, end, columns + 1)
    return put.reshape(moved.shape).movedim((-2, -1), (dim1, dim2))


@rule("aten.select_scatter.default")
def _select_scatter(a: Tensor, source: Tensor, dim: int, index: int) -> Any:
    index %= a.shape[dim]
    return _aten.slice_scatter.default(a, source.unsqueeze(dim), dim, index, index + 1)


@rule("aten.masked_scatter.default")
def _masked_scatter(a: Tensor, mask: Tensor, source: Tensor) -> Any:
    a, mask = torch.broadcast_tensors(a, mask)
    if not source.numel():
        _aten._assert_async.msg(~mask.any(), "Number of elements of source < number of ones in mask")
        return a.clone()
    places = (mask.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(0)  # beyond the end where there are too many
    return torch.where(mask, source.reshape(-1).gather(0, places).reshape(a.shape), a)


@rule("aten.put.default")
def _put(a: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Any:
    flat = _aten.index_put.default(a.reshape(-1), [index.reshape(-1)], source.reshape(-1), accumulate)
    return flat.reshape(a.shape)


@rule("aten.index_reduce.default")
def _index_reduce(a: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    if a.dim() == 0:
        return _index_reduce(a.reshape(1), 0, index, source.reshape(1), reduce, include_self=include_self).reshape(())
    shape = [-1 if i == dim % a.dim() else 1 for i in range(a.dim())]
    places = index.to(torch.int64).reshape(shape if index.dim() else [1] * a.dim()).expand(source.shape)
    return _aten.scatter_reduce.two(a, dim, places, source, reduce, include_self=include_self)


@rule("aten.sort.default")
def _sort(a: Tensor, dim: int = -1, descending: bool = False) -> Any:
    return _aten.sort.stable(a, stable=False, dim=dim, descending=descending)


@rule("aten.max.default")
def _max(a: Tensor) -> Any:
    return torch.amax(a, list(range(a.dim())))


@rule("aten.min.default")
def _min(a: Tensor) -> Any:
    return torch.amin(a, list(range(a.dim())))


@rule("aten.median.default")
def _median(a: Tensor) -> Any:
    return _aten.median.dim(a.reshape(-1), 0)[0] if a.numel() else NotImplemented


@rule("aten.nanmedian.default")
def _nanmedian(a: Tensor) -> Any:
    return _aten.nanmedian.dim(a.reshape(-1), 0)[0] if a.numel() else NotImplemented


@rule("aten.bucketize.Tensor")
def _bucketize(a: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Any:
    return _aten.searchsorted.Tensor(boundaries, a, out_int32=out_int32, right=right)


# Pooling ------------------------------------------------------------------------------------------------


MOST_WINDOWS = 32  # along a dimension, each of which is a mean of its own


@rule("aten._adaptive_avg_pool3d.default", "aten._adaptive_avg_pool2d.default")
def _adaptive_mean(a: Tensor, output_size: list[int]) -> Any:
    first = a.dim() - len(output_size)
    pairs = list(zip(a.shape[first:], output_size, strict=True))
    if all(count and size % count == 0 for size, count in pairs):  # windows of one size, side by side
        split = a.reshape(*a.shape[:first], *(n for size, count in pairs for n in (count, size // count)))
        return split.mean([first + 1 + 2 * i for i in range(len(pairs))])
    if max(output_size) > MOST_WINDOWS:
        raise NoExpansionError(f"more than {MOST_WINDOWS} windows of several sizes")
    for dim, (n, count) in enumerate(pairs, first):
        bounds = [(i * n // count, -((-(i + 1) * n) // count)) for i in range(count)]
        a = torch.cat([a.narrow(dim, low, high - low).mean(dim, keepdim=True) for low, high in bounds], dim)
    return a


# Random draws: the same numbers as eager's own kernels, which fill memory in the order of its layout -----


@rule("aten.rand_like.default")
def _rand_like(a: Tensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return (
        torch.rand(a.shape, dtype=dtype or a.dtype, device=device or a.device) if a.is_contiguous() else NotImplemented
    )


@rule("aten.randn_like.default")
def _randn_like(a: Tensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if not a.is_contiguous():
        return NotImplemented
    return torch.randn(a.shape, dtype=dtype or a.dtype, device=device or a.device)


@rule("aten.randint.default")
def _randint(high: int, size: list[int], *, dtype: Any = torch.int64, device: Any = None, **kwargs: Any) -> Any:
    return _aten.randint.low(0, high, size, dtype=dtype or torch.int64, device=device)


@rule("aten.randint_like.default")
def _randint_like(a: Tensor, high: int, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    return _randint_like_low(a, 0, high, dtype=dtype, device=device)


@rule("aten.randint_like.low_dtype")
def _randint_like_low(a: Tensor, low: int, high: int, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if not a.is_contiguous():
        return NotImplemented
    return _aten.randint.low(low, high, list(a.shape), dtype=dtype or a.dtype, device=device or a.device)


@rule("aten.normal.Tensor_Tensor")
def _normal(mean: Tensor, std: Tensor, generator: Any = None) -> Any:
    if generator is not None:
        return NotImplemented
    shape = torch.broadcast_shapes(mean.shape, std.shape)
    dtype = torch.result_type(mean, std)
    drawn = _aten.normal_functional.default(torch.empty(shape, dtype=dtype, device=mean.device), 0.0, 1.0)
    return drawn * std + mean


@rule("aten.normal.float_float")
def _normal_numbers(mean: float, std: float, size: list[int], *, generator: Any = None, dtype: Any = None,
                    device: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    if generator is not None:
        return NotImplemented
    return _aten.normal_functional.default(torch.empty(size, dtype=dtype, device=device), mean, std)
