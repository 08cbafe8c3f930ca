"""Reductions over dimensions. `dims` of None or all of them gives a 0-d result; reduced dimensions are dropped."""

from primexec.prims.base import COMPLEX, FLOATS, REALS, Prim

_DIMS = "a, dims → a without dims"
_ONE = "a, dim, keepdim → a without dim, or with size 1 there"
_SAME = "the argument's dtype"
_SUMMED = f"{FLOATS} {COMPLEX} int64"  # other integers and bool are converted first


def _row(op: str, meaning: str, shapes: str, dtypes: str, promotion: str) -> Prim:
    return Prim(op, "reduction", meaning, shapes, dtypes, promotion)


ROWS = (
    _row("prims.sum.default", "The sum; 0 of nothing.", _DIMS, _SUMMED, "output_dtype if given, else the argument's"),
    _row(
        "prims.prod.default", "The product; 1 of nothing.", _DIMS, _SUMMED, "output_dtype if given, else the argument's"
    ),
    _row("prims.amax.default", "The largest element; NaN if there is one.", _DIMS, f"{REALS} bool", _SAME),
    _row("prims.amin.default", "The smallest element; NaN if there is one.", _DIMS, f"{REALS} bool", _SAME),
    _row(
        "aten.argmax.default",
        "The index of the first largest element; NaN counts as largest. dim None: of the flattened tensor.",
        _ONE,
        REALS,
        "int64",
    ),
    _row(
        "aten.argmin.default",
        "The index of the first smallest element; NaN counts as smallest. dim None: of the flattened tensor.",
        _ONE,
        REALS,
        "int64",
    ),
    _row(
        "aten.max.dim",
        "The largest element along dim and the index of the first one; NaN counts as largest.",
        _ONE,
        f"{REALS} bool",
        "the argument's dtype, and int64",
    ),
    _row(
        "aten.min.dim",
        "The smallest element along dim and the index of the first one; NaN counts as smallest.",
        _ONE,
        f"{REALS} bool",
        "the argument's dtype, and int64",
    ),
    _row(
        "aten.median.dim",
        "The element of rank ⌈n/2⌉ along dim and an index of it; NaN if there is one.",
        _ONE,
        REALS,
        "the argument's dtype, and int64",
    ),
    _row(
        "aten.nanmedian.dim",
        "As median, of the elements that are not NaN.",
        _ONE,
        REALS,
        "the argument's dtype, and int64",
    ),
    _row(
        "aten.kthvalue.default",
        "The k-th smallest element along dim (k from 1) and an index of it; NaN counts as largest.",
        "a, k, dim, keepdim → a without dim, or with size 1 there",
        REALS,
        "the argument's dtype, and int64",
    ),
    _row(
        "aten.mode.default",
        "The most frequent element along dim, the smallest of equals, and an index of it.",
        _ONE,
        f"{REALS} bool",
        "the argument's dtype, and int64",
    ),
)
