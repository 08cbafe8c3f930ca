"""Executors that are wrong in one way each: what takes the place of a computation, and where it must be found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors import Region, Support, no
from primexec.prims import is_prim
from tests.torch_executor import TorchExecutor

F32, F64, BF16, F16, C64 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64


@dataclass(frozen=True)
class Planted:
    """A fault: where it shows, under which rules it is found, and what takes the place of the computation."""

    name: str
    rules: set[str]
    fault: Callable[..., Any]
    dtype: torch.dtype = F32


def wrong_polynomial(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x) * (1 + 8 * torch.finfo(F32).eps)


def sums_in_bfloat16(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    total = torch.zeros_like(x.sum(dims))
    for part in x.movedim(dims, list(range(len(dims)))).reshape(-1, *total.shape):
        total = total + part
    return total


def forgets_the_tail(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """Vectors of four, and nothing for what is left."""
    out = compute(x)
    out.view(-1)[out.numel() // 4 * 4 :] = 0
    return out


def reads_uninitialised(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    """What nobody wrote holds NaN here; in reality it may hold the right numbers for long."""
    out = torch.full_like(compute(x, dims), float("nan"))
    out.flatten()[: out.numel() // 2 + 1].copy_(compute(x, dims).flatten()[: out.numel() // 2 + 1])
    return out


def mutates_its_input(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    out = compute(x, y)
    if isinstance(y, Tensor) and y.is_contiguous() and x.numel() == 15:
        y.add_(1)
    return out


def returns_its_input(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return x


def returns_one_buffer(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """The same memory at every call."""
    out = compute(x)
    kept = BUFFERS.setdefault(out.shape, torch.empty_like(out, memory_format=torch.contiguous_format))
    return kept.zero_().copy_(out * 1.0)


BUFFERS: dict[Any, Tensor] = {}


def wrong_dtype(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x.to(F32))


def wrong_shape(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x, dims).reshape(-1)


def swallows_nan(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > y, x, y)


def reduction_swallows_nan(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x.nan_to_num(-math.inf, math.inf, -math.inf), dims)


def loses_negative_zero(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return 0 - x


def saturates(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    info = torch.iinfo(x.dtype)
    exact = x.to(F64) + (y.to(F64) if isinstance(y, Tensor) else y)
    return torch.where((exact < info.min) | (exact > info.max), exact.sign() * info.max, exact).to(x.dtype)


def nondeterministic(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    out = compute(x, dims)
    return out + out.abs() * torch.finfo(F32).eps * torch.randint(0, 2, out.shape)


SCRATCH = torch.empty(4096)


def shares_scratch(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    if x.numel() > 4096:
        return compute(x)
    scratch = SCRATCH[: x.numel()].view(x.shape).copy_(x)
    time.sleep(0.002)
    return compute(scratch)


def ignores_strides(compute: Any, node: fx.Node, x: Tensor, y: Any) -> Tensor:
    return compute(x.as_strided(x.shape, torch.empty(x.shape).stride()) if x.stride(-1) == 2 else x, y)


def ignores_overlap(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """Takes a stride of zero for a dense row."""
    return compute(x.contiguous() if 0 not in x.stride() else x.clone().zero_())


def ignores_offset(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x.as_strided(x.shape, x.stride(), 0))


def wrong_on_empty(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x, dims) if x.numel() else torch.zeros_like(compute(x, dims))


def wrong_on_scalars(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x) if x.dim() else torch.zeros_like(x)


def wrong_broadcast(compute: Any, node: fx.Node, x: Tensor, shape: Any, dims: Any) -> Tensor:
    out = compute(x, shape, dims)
    return out.mT.contiguous() if out.dim() == 2 and out.shape[0] == out.shape[1] else out


def claims_too_much(compute: Any, node: fx.Node, *args: Any) -> Tensor:
    raise NotImplementedError("no such kernel")


def flushes_denormals(compute: Any, node: fx.Node, x: Tensor, y: Any) -> Tensor:
    out = compute(x, y)
    return torch.where(out.abs() < torch.finfo(F32).tiny, torch.zeros_like(out).copysign(out), out)


def rounds_half_up(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return (x + 0.5).floor()


def loses_a_result(compute: Any, node: fx.Node, x: Tensor, dim: int) -> Any:
    values, indices = compute(x, dim)
    return values, indices.zero_()


def off_by_one(compute: Any, node: fx.Node, x: Tensor, dim: int, start: int, end: int, step: int = 1) -> Tensor:
    out = compute(x, dim, start, end, step)
    return out if step == 1 else out.roll(1, dim)


def truncates(compute: Any, node: fx.Node, x: Tensor, dtype: torch.dtype) -> Tensor:
    """To bfloat16 by dropping bits."""
    if x.dtype != F32 or dtype != BF16:
        return compute(x, dtype)
    return (x.contiguous().view(torch.int32) & -65536).view(F32).to(BF16)


def product_in_half(compute: Any, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(a.shape[1]):
        out = out + a[:, k, None] * b[None, k]
    return out


# Operators on whole arrays -------------------------------------------------------------------------------


def unstable(compute: Any, node: fx.Node, x: Tensor, **options: Any) -> Any:
    """Equal elements in the reverse order."""
    values, order = compute(x.flip(options["dim"]), **options)
    return values, x.shape[options["dim"]] - 1 - order if x.dim() else order


def places_in_the_sorted(compute: Any, node: fx.Node, x: Tensor, k: int, dim: int, largest: bool) -> Any:
    values, indices = compute(x, k, dim, largest)
    return values, torch.arange(k).expand_as(indices.movedim(dim, -1)).movedim(-1, dim).contiguous()


def first_of_equals(compute: Any, node: fx.Node, x: Tensor, dim: int) -> Any:
    """The index of the first largest element up to each place, not of the last one."""
    values, indices = compute(x, dim)
    first = indices.clone()
    for i in range(1, x.shape[dim] if x.dim() else 1):
        now, before = (t.select(dim, i) for t in (values, values.roll(1, dim)))
        first.select(dim, i).copy_(torch.where(now == before, first.select(dim, i - 1), i))
    return values, first


def counts_nan(compute: Any, node: fx.Node, x: Tensor, dim: int) -> Any:
    return torch.ops.aten.median.dim(x, dim)


def largest_of_equals(compute: Any, node: fx.Node, x: Tensor, dim: int) -> Any:
    values, indices = compute(-x, dim)
    return -values, indices


def left_only(compute: Any, node: fx.Node, sequence: Tensor, values: Tensor, **options: Any) -> Tensor:
    return compute(sequence, values, **{k: v for k, v in options.items() if k != "right"})


def last_write_wins(compute: Any, node: fx.Node, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Instead of the sum of what falls on one place."""
    return x.scatter(dim, index, x.gather(dim, index) + src[tuple(slice(n) for n in index.shape)])


def forgets_itself(compute: Any, node: fx.Node, *args: Any, include_self: bool = True) -> Tensor:
    return compute(*args, include_self=False)


def column_major(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return x.t().nonzero().flip(1) if x.dim() == 2 else compute(x)


def wraps_indices(compute: Any, node: fx.Node, x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Negative ones count from one place too far."""
    return compute(x, [i if i is None else torch.where(i < 0, (i - 1).clamp(min=-4), i) for i in indices])


def not_normalised(compute: Any, node: fx.Node, x: Tensor, dims: list[int], norm: int, forward: bool) -> Tensor:
    return compute(x, dims, 0 if norm == 2 else norm, forward)


def other_triangle(compute: Any, node: fx.Node, a: Tensor, uplo: str = "L", vectors: bool = True) -> Any:
    return compute(a, "U" if uplo == "L" else "L", vectors)


def wrong_sign(compute: Any, node: fx.Node, a: Tensor, mode: str = "reduced") -> Any:
    """A positive diagonal of R, and the columns of Q as they were."""
    q, r = compute(a, mode)
    return q, r * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-1) if r.shape[-2] <= r.shape[-1] else -r


def not_in_order(compute: Any, node: fx.Node, a: Tensor, *more: Any) -> Any:
    u, s, vh = compute(a, *more)
    return u.flip(-1), s.flip(-1), vh.flip(-2)


def transposed_permutation(compute: Any, node: fx.Node, *args: Any) -> Any:
    p, low, up = compute(*args)
    return p.mT.contiguous() if p.dim() > 1 else p, low, up


def zero_padding(compute: Any, node: fx.Node, x: Tensor, kernel: Any, stride: Any, padding: Any) -> Any:
    below = x - 1000
    _, indices = compute(below, kernel, stride, padding)
    padded = torch.nn.functional.pad(below, [p for n in padding for p in (n, n)])
    return compute(padded, kernel, stride, [0, 0])[0] + 1000, indices


def one_image(compute: Any, node: fx.Node, grad: Tensor, *args: Any) -> Any:
    """The bias gets the gradient of the first image only."""
    x, w, bias = compute(grad, *args)
    return x, w, bias if bias is None else grad[0].flatten(1).sum(1)


def draws_with_its_own_generator(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
    return torch.rand(args[0], generator=torch.Generator().manual_seed(1), **kwargs)


def leaves_the_generator(compute: Any, node: fx.Node, *args: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return compute(*args)


PLANTED = {
    planted.fault.__name__: planted
    for planted in (
        Planted("prims.exp.default", {"values"}, wrong_polynomial),
        Planted("prims.sum.default", {"values"}, sums_in_bfloat16, BF16),
        Planted("prims.tanh.default", {"values"}, forgets_the_tail),
        Planted("prims.sum.default", {"values"}, reads_uninitialised),
        Planted("prims.add.default", {"mutation"}, mutates_its_input),
        Planted("prims.clone.default", {"alias"}, returns_its_input),
        Planted("prims.neg.default", {"alias"}, returns_one_buffer),
        Planted("prims.sin.default", {"dtype"}, wrong_dtype, F64),
        Planted("prims.amax.default", {"shape"}, wrong_shape),
        Planted("prims.maximum.default", {"values"}, swallows_nan),
        Planted("prims.amax.default", {"values"}, reduction_swallows_nan),
        Planted("prims.neg.default", {"values"}, loses_negative_zero),
        Planted("prims.add.default", {"values"}, saturates, torch.int8),
        Planted("prims.sum.default", {"determinism"}, nondeterministic),
        Planted("prims.exp.default", {"threads"}, shares_scratch),
        Planted("prims.mul.default", {"values"}, ignores_strides),
        Planted("prims.exp.default", {"values"}, ignores_overlap),
        Planted("prims.cos.default", {"values"}, ignores_offset),
        Planted("prims.prod.default", {"values"}, wrong_on_empty),
        Planted("prims.exp.default", {"values"}, wrong_on_scalars),
        Planted("prims.broadcast_in_dim.default", {"values"}, wrong_broadcast),
        Planted("prims.cosh.default", {"claim"}, claims_too_much),
        Planted("prims.mul.default", {"values"}, flushes_denormals),
        Planted("prims.round.default", {"values"}, rounds_half_up),
        Planted("aten.max.dim", {"values"}, loses_a_result),
        Planted("aten.slice.Tensor", {"values"}, off_by_one),
        Planted("prims.convert_element_type.default", {"values"}, truncates),
        Planted("aten.mm.default", {"values"}, product_in_half, F16),
        Planted("aten.sort.stable", {"values"}, unstable),
        Planted("aten.topk.default", {"values"}, places_in_the_sorted),
        Planted("aten.cummax.default", {"values"}, first_of_equals, torch.bool),
        Planted("aten.nanmedian.dim", {"values"}, counts_nan),
        Planted("aten.mode.default", {"values"}, largest_of_equals),
        Planted("aten.searchsorted.Tensor", {"values"}, left_only, torch.int64),
        Planted("aten.scatter_add.default", {"values"}, last_write_wins),
        Planted("aten.scatter_reduce.two", {"values"}, forgets_itself),
        Planted("aten.nonzero.default", {"values"}, column_major),
        Planted("aten.index.Tensor", {"values"}, wraps_indices),
        Planted("aten._fft_c2c.default", {"values"}, not_normalised, C64),
        Planted("aten._linalg_eigh.default", {"values"}, other_triangle),
        Planted("aten.linalg_qr.default", {"values"}, wrong_sign),
        Planted("aten._linalg_svd.default", {"values"}, not_in_order),
        Planted("aten.lu_unpack.default", {"values"}, transposed_permutation),
        Planted("aten.max_pool2d_with_indices.default", {"values"}, zero_padding),
        Planted("aten.convolution_backward.default", {"values"}, one_image),
        Planted("aten.rand.default", {"values", "generator"}, draws_with_its_own_generator),
        Planted("aten.uniform.default", {"generator"}, leaves_the_generator),
    )
}


# Regions: right for every operator alone, and wrong together ----------------------------------------------

VIEWS = ("prims.transpose.default", "prims.broadcast_in_dim.default", "prims.squeeze.default")


def _made(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function"


def fuses_wrongly(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """An operator on the result of a view."""
    out = compute(*args, **kwargs)
    on_view = any(_made(a) and str(a.target) in VIEWS for a in node.all_input_nodes)
    return out + 1 if on_view and isinstance(out, Tensor) and out.dtype.is_floating_point else out


def squares_with_a_sign(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """x · |x| for x · x, as a derivative of tanh may have it."""
    out = compute(*args, **kwargs)
    square = str(node.target) == "prims.mul.default" and node.args[0] is node.args[1]
    return out * args[0].sign() if square and out.dtype.is_floating_point else out


def mean_for_sum(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Where a product is added up over the first dimension, as for the gradient of what was broadcast."""
    out = compute(*args, **kwargs)
    added = str(node.target) == "prims.sum.default" and _made(node.args[0]) and list(args[1]) == [0]
    return out / args[0].shape[0] if added and out.dtype.is_floating_point else out


def adds_in_place(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Into a tensor of the region that others still read."""
    first = node.args[0] if node.args else None
    if str(node.target) != "prims.add.default" or not _made(first) or str(first.target) in VIEWS:
        return compute(*args, **kwargs)
    out = compute(*args, **kwargs)
    return args[0].copy_(out) if args[0].is_contiguous() else out


def refuses_autograd(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """As NumPy does with tensors that require grad."""
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    return compute(*args, **kwargs)


class OnPrims(TorchExecutor):
    """Takes prims only, so that programs are expanded for it."""

    def supports(self, node: fx.Node) -> Support:
        return super().supports(node) if is_prim(node.target) else no("it is no prim")


class ReusesMemory(OnPrims):
    """Several results live in memory that the next call uses again."""

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        run = super().compile(region, options)
        kept: dict[int, Tensor] = {}

        def again(*inputs: Tensor) -> list[Tensor]:
            made = run(*inputs)
            return [kept.setdefault(i, torch.empty_like(t)).copy_(t) for i, t in enumerate(made)] if made[2:] else made

        return again


REGIONS: dict[str, tuple[Callable[[], TorchExecutor], set[str]]] = {
    f.__name__: (lambda f=f: OnPrims(f), rules)
    for f, rules in (
        (fuses_wrongly, {"values"}), (squares_with_a_sign, {"values", "gradients"}), (mean_for_sum, {"gradients"}),
        (adds_in_place, {"gradients"}), (refuses_autograd, {"claim"}),
    )
} | {"reuses_memory": (ReusesMemory, {"gradients"})}  # fmt: skip
