"""The table of what is tried: for each operator its arguments, its dtypes and its tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from primexec.testing import samples as s
from primexec.testing.values import ALL, COMPLEX, FLOATS, INTS, NUMBERS

_WIDE = (torch.float32, torch.float64)
_DISCRETE = (torch.bool, *INTS)
_REAL = (*FLOATS, *INTS)


@dataclass(frozen=True, slots=True)
class Row:
    """How one operator is tried.

    Attributes:
        samples: makes arguments from a `Draw`.
        tolerance: the name of a row in `tolerance.TOLERANCES`.
        dtypes: what the first tensor, or the result of an operator without tensors, may be.
        native: the result depends on the dtype itself, so that float64 is no reference for it.
        results: how many results are compared, from the first on; None for all. What lies behind is not determined.
    """

    samples: s.Samples
    tolerance: str
    dtypes: tuple[torch.dtype, ...]
    native: bool = False
    results: int | None = None


# Why an operator is in no family: executors are never offered it, or its result is not determined.
LEFT_OUT = {
    "prims._make_token.default": "an effect",
    "prims._sink_tokens.default": "an effect",
    "prims.copy_to.default": "an effect",
    "prims.resize.default": "an effect",
    "prims.item.default": "its result is a number",
    "prims.maximum_value.default": "its result is a number",
    "prims.minimum_value.default": "its result is a number",
    "prims.normal.default": "random draws run on aten",
    "prims.uniform.default": "random draws run on aten",
    "prims.empty.default": "its values are not determined",
    "prims.empty_permuted.default": "its values are not determined",
    "prims.empty_strided.default": "its values are not determined",
    "prims.device_put.default": "there is one device",
    "prims.signbit.default": "PyTorch's metadata for it has the wrong dtype",
    "prims.svd.default": "its factors are determined up to signs",
}

# Where functions have poles or branch points, the values are drawn from between them.
_DOMAIN: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("acos", "asin", "atanh", "erf_inv"), (-0.99, 0.99)),
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), (0.01, 10)),
    "acosh": (1, 10), "log1p": (-0.9, 10), "ndtri": (0.01, 0.99), "digamma": (0.5, 10), "lgamma": (0.5, 10),
}  # fmt: skip


def _unary(names: str, tolerance: str, dtypes: tuple[torch.dtype, ...], *, special: bool = True) -> dict[str, Row]:
    rows = {}
    for name in names.split():
        low, high = _DOMAIN.get(name, (-4, 4))
        rows[f"prims.{name}.default"] = Row(s.pointwise(1, low=low, high=high, special=special), tolerance, dtypes)
    return rows


def _binary(names: str, tolerance: str, dtypes: tuple[torch.dtype, ...], samples: s.Samples) -> dict[str, Row]:
    return {f"prims.{name}.default": Row(samples, tolerance, dtypes) for name in names.split()}


_ELEMENTARY = "acos acosh asin asinh atan atanh cos cosh exp expm1 log log10 log1p log2 sin sinh tan tanh"
_BESSEL = "bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 spherical_bessel_j0"

_POINTWISE: dict[str, Row] = {
    **_unary(_ELEMENTARY, "pointwise", (*FLOATS, *COMPLEX)),
    **_unary("cbrt erf erfc exp2 rsqrt sqrt", "pointwise", FLOATS),
    **_unary("reciprocal", "rounded", FLOATS),
    **_unary("erf_inv erfcx ndtri digamma lgamma", "special", FLOATS, special=False),
    **_unary(_BESSEL, "special", _WIDE, special=False),
    **_unary("abs neg sign", "exact", _REAL),
    **_unary("ceil floor round trunc", "exact", FLOATS),
    **_unary("isfinite", "exact", FLOATS),
    **_unary("bitwise_not", "exact", _DISCRETE),
    **_unary("conj conj_physical real imag", "exact", COMPLEX),
    "prims.frexp.default": Row(s.pointwise(1, special=False), "exact", FLOATS),
    **_binary("add sub mul", "rounded", NUMBERS, s.pointwise(2, number=2.5)),
    "prims.div.default": Row(s.pointwise(2, number=2.5), "rounded", FLOATS),
    **_binary("fmod remainder", "rounded", FLOATS, s.pointwise(2, nonzero=True, special=False)),
    **_binary("maximum minimum fmax fmin", "selected", _REAL, s.pointwise(2)),
    **_binary("eq ne", "exact", (torch.bool, *NUMBERS), s.pointwise(2, number=2)),
    **_binary("lt le gt ge", "exact", (torch.bool, *_REAL), s.pointwise(2, number=2)),
    **_binary("atan2 hypot pow", "pointwise", FLOATS, s.pointwise(2)),
    **_binary("igamma igammac", "special", FLOATS, s.pointwise(2, low=0.1, high=10, special=False)),
    **_binary("zeta", "special", _WIDE, s.pointwise(2, low=1.5, high=10, special=False)),
    "prims.nextafter.default": Row(s.pointwise(2), "exact", _WIDE, native=True),
    **_binary("gcd", "exact", INTS, s.pointwise(2, low=0, high=60, special=False)),
    **_binary("bitwise_and bitwise_or bitwise_xor", "exact", _DISCRETE, s.pointwise(2)),
    **_binary("shift_left shift_right_arithmetic", "exact", INTS, s.pointwise(2, low=0, high=6, special=False)),
    "prims.where.default": Row(s.selection, "exact", ALL),
    "prims.convert_element_type.default": Row(s.conversion((torch.bool, *NUMBERS)), "rounded", (torch.bool, *NUMBERS)),
    "prims.view_of_dtype.default": Row(s.reinterpretation, "exact", NUMBERS, native=True),
}

_BROADCASTS = (
    ((), ((2, 3), ())), ((3,), ((3, 3), (0,))), ((3,), ((3, 3), (1,))), ((3, 1), ((3, 5), (0, 1))),
    ((2, 4), ((2, 3, 4), (0, 2))), ((1,), ((0,), (0,))), ((513,), ((127, 513), (1,))),
)  # fmt: skip

_SHAPES: dict[str, Row] = {
    name: Row(samples, "exact", ALL)
    for name, samples in {
        "prims.broadcast_in_dim.default": s.static(*_BROADCASTS),
        "prims.as_strided.default": s.static(
            ((12,), ((3, 2), (4, 1), 0)), ((7,), ((3, 3), (1, 2), 0)), ((5,), ((2,), (2,), 1)), layouts=False
        ),
        "prims.collapse.default": s.static(((2, 3, 4), (0, 1)), ((2, 3, 4), (1, 2)), ((2, 0, 3), (0, 2))),
        "prims.collapse_view.default": s.static(((2, 3, 4), (0, 1)), ((2, 3, 4), (1, 2)), ((7,), (0, 0))),
        "prims.split_dim.default": s.static(((12,), (0, 3)), ((2, 12), (1, 4)), ((0, 6), (1, 2))),
        "prims.squeeze.default": s.static(((1, 3, 1), ([0, 2],)), ((1, 3, 1), ([2],)), ((1,), ([0],))),
        "prims.transpose.default": s.static(
            ((), ([],)), ((3, 5), ([1, 0],)), ((2, 3, 4), ([2, 0, 1],)), ((2, 0, 3), ([1, 2, 0],)),
            ((127, 513), ([1, 0],)),
        ),
        "prims.view_of.default": s.static(((), ()), ((0,), ()), ((3, 5), ())),
        "prims.reshape.default": s.static(((), ((1,),)), ((12,), ((3, 4),)), ((3, 5), ((5, 3),)), ((0, 3), ((3, 0),))),
        "prims.rev.default": s.static(((7,), ([0],)), ((3, 5), ([1],)), ((2, 3, 4), ([0, 2],)), ((0, 3), ([0],))),
        "prims.clone.default": s.static(((), ()), ((0,), ()), ((3, 5), ()), ((127, 513), ())),
        "prims.copy_strided.default": s.static(((3, 5), ((5, 1),)), ((3, 5), ((1, 3),))),
        "prims.fill.default": s.static(((), (1,)), ((3, 5), (1,)), ((0,), (1,))),
        "prims.cat.default": s.concatenation,
        "prims.as_strided_scatter.default": s.rewriting,
        "prims.full.default": s.factory(((), 1), ((0,), 1), ((3, 5), 1), ((127, 513), 1), requires_grad=False),
        "prims.full_like.default": s.like,
        "prims.scalar_tensor.default": s.factory((1,), (0,)),
        "aten.select.int": s.static(((7,), (0, -1)), ((3, 5), (1, 2))),
        "aten.slice.Tensor": s.static(
            ((7,), (0, 1, 6)), ((7,), (0, 0, 7, 3)), ((3, 5), (1, -3, -1)), ((3, 5), (0, 2, 2)),
            ((5,), (0, 0, 2**63 - 1)),
        ),
        "aten.index_select.default": s.index_selecting,
        "aten.gather.default": s.gathering,
        "aten.index.Tensor": s.indexing,
        "aten.scatter.src": s.scattering(True),
        "aten.scatter.value": s.scattering(False),
        "aten.masked_scatter.default": s.masked_writing,
        "aten.constant_pad_nd.default": s.static(
            ((3,), ([1, 2], 1)), ((2, 3), ([0, 1, 2, 0], 0)), ((2, 5), ([-1, 1], 1)), ((0,), ([2, 0], 1))
        ),
    }.items()
}  # fmt: skip

_SUMMED = (*FLOATS, *COMPLEX, torch.int64)
_REDUCTIONS: dict[str, Row] = {
    "prims.sum.default": Row(s.reduction(), "sum", _SUMMED),
    "prims.prod.default": Row(s.reduction(low=0.5, high=1.5, large=False), "product", (*FLOATS, torch.int64)),
    "prims.amax.default": Row(s.reduction(empty=False), "selected", _REAL),
    "prims.amin.default": Row(s.reduction(empty=False), "selected", _REAL),
    "prims.var.default": Row(s.reduction(empty=False, special=False, nothing=False, more=(0.0,)), "sum", FLOATS),
    "prims.xor_sum.default": Row(s.reduction(), "exact", INTS),
    "aten.argmax.default": Row(s.ordering(), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.argmin.default": Row(s.ordering(), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.max.dim": Row(s.ordering(), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.min.dim": Row(s.ordering(), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.cumsum.default": Row(s.along(), "scan", (*FLOATS, torch.int64)),
    "aten.cumprod.default": Row(s.along(low=0.5, high=1.5), "product", (*FLOATS, torch.int64)),
    "aten.sort.default": Row(s.ordering(), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.topk.default": Row(s.ordering(1), "exact", (*_WIDE, torch.int32, torch.int64)),
    "aten.scatter_add.default": Row(s.scattering(True, repeats=True), "scan", (*FLOATS, torch.int64)),
    "aten.scatter_reduce.two": Row(s.scattering(True, "amax", repeats=True), "exact", (*_WIDE, torch.int64)),
    "aten.index_put.default": Row(s.index_writing, "scan", (*_WIDE, torch.int64)),
}

_PRODUCTS: dict[str, Row] = {
    "aten.mm.default": Row(s.products(batched=False), "matmul", FLOATS),
    "aten.bmm.default": Row(s.products(batched=True), "matmul", FLOATS),
    "aten.convolution.default": Row(s.convolutions, "matmul", FLOATS),
    "aten.avg_pool2d.default": Row(s.pooling(), "scan", _WIDE),
    "aten.max_pool2d_with_indices.default": Row(s.pooling(), "exact", _WIDE),
    "prims.fft_c2c.default": Row(s.transforms("c2c"), "fft", COMPLEX),
    "prims.fft_r2c.default": Row(s.transforms("r2c"), "fft", _WIDE),
    "prims.fft_c2r.default": Row(s.transforms("c2r"), "fft", COMPLEX),
    "prims.iota.default": Row(s.iota, "exact", (torch.int32, torch.int64)),
}

ROWS: dict[str, Row] = {**_POINTWISE, **_SHAPES, **_REDUCTIONS, **_PRODUCTS}


def operator(name: str) -> object:
    """The overload of this name.

    >>> operator("aten.mm.default")
    <OpOverload(op='aten.mm', overload='default')>
    """
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
