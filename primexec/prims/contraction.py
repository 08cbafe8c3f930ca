"""Matrix products, convolution and pooling over windows."""

from primexec.prims.base import FLOATS, NUMBERS, Prim

_SAME = "one dtype, the result's; products of 16-bit floats are summed in float32"
_POOL2, _POOL3 = "(N,) C, H, W → (N,) C, H', W'", "(N,) C, D, H, W → (N,) C, D', H', W'"
_INDICES = "the argument's dtype, and int64: the position in the flattened input plane"


def _row(op: str, meaning: str, shapes: str, dtypes: str = FLOATS, promotion: str = _SAME) -> Prim:
    return Prim(op, "contraction", meaning, shapes, dtypes, promotion)


ROWS = (
    _row("aten.mm.default", "Matrix product.", "(m, k), (k, n) → (m, n)", NUMBERS),
    _row("aten.bmm.default", "Matrix products, one for each batch.", "(b, m, k), (b, k, n) → (b, m, n)", NUMBERS),
    _row(
        "aten.convolution.default",
        "Cross-correlation of each group of channels with its filters, plus bias; transposed: its adjoint.",
        "(N, C, *), (O, C/groups, *k), (O,) or None → (N, O, *)",
        f"{FLOATS} complex64 complex128",
    ),
    _row(
        "aten.convolution_backward.default",
        "The gradients of convolution with respect to input, weight and bias, those that output_mask asks for.",
        "(N, O, *), (N, C, *), (O, C/groups, *k) → the shapes of input, weight, bias",
        f"{FLOATS} complex64 complex128",
    ),
    _row(
        "aten.avg_pool2d.default",
        "The mean over windows; divided by divisor_override, or by the window's size with or without padding.",
        _POOL2,
        f"{FLOATS} int64",
    ),
    _row(
        "aten.avg_pool2d_backward.default",
        "The gradient of avg_pool2d with respect to its input.",
        "gradient, input → input's shape",
    ),
    _row("aten.avg_pool3d.default", "The mean over windows, as avg_pool2d.", _POOL3, f"{FLOATS} int64"),
    _row(
        "aten.avg_pool3d_backward.default",
        "The gradient of avg_pool3d with respect to its input.",
        "gradient, input → input's shape",
    ),
    _row(
        "aten.max_pool2d_with_indices.default",
        "The largest element of each window and where it stands; NaN counts as largest, padding as -inf.",
        _POOL2,
        f"{FLOATS} int64",
        _INDICES,
    ),
    _row(
        "aten.max_pool3d_with_indices.default",
        "The largest element of each window and where it stands, as max_pool2d_with_indices.",
        _POOL3,
        f"{FLOATS} int64",
        _INDICES,
    ),
    _row(
        "aten.adaptive_max_pool2d.default",
        "The largest element of each of H'·W' windows, from ⌊i·H/H'⌋ to ⌈(i+1)·H/H'⌉, and where it stands.",
        _POOL2,
        FLOATS,
        _INDICES,
    ),
    _row("aten.adaptive_max_pool3d.default", "As adaptive_max_pool2d, in three dimensions.", _POOL3, FLOATS, _INDICES),
    _row(
        "aten.fractional_max_pool2d.default",
        "The largest element of windows whose starts the random samples choose, and where it stands.",
        _POOL2,
        FLOATS,
        _INDICES,
    ),
    _row(
        "aten.fractional_max_pool3d.default", "As fractional_max_pool2d, in three dimensions.", _POOL3, FLOATS, _INDICES
    ),
)
