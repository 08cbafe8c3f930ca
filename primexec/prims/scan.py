"""Scans, sorting and searching along one dimension."""

from primexec.prims.base import ANY, FLOATS, REALS, Prim

_DIM = "a, dim → a's shape"
_TYPED = "dtype if given; else the argument's, int64 for integers and bool"
_INDICES = "the argument's dtype, and int64"


def _row(op: str, meaning: str, dtypes: str, promotion: str, shapes: str = _DIM) -> Prim:
    return Prim(op, "scan", meaning, shapes, dtypes, promotion)


ROWS = (
    _row("aten.cumsum.default", "Sums of the elements up to each place.", ANY, _TYPED),
    _row("aten.cumprod.default", "Products of the elements up to each place.", ANY, _TYPED),
    _row(
        "aten.cummax.default",
        "The largest element up to each place and the index of the last one; NaN stays.",
        f"{REALS} bool",
        _INDICES,
    ),
    _row(
        "aten.cummin.default",
        "The smallest element up to each place and the index of the last one; NaN stays.",
        f"{REALS} bool",
        _INDICES,
    ),
    _row(
        "aten.logcumsumexp.default",
        "The logarithm of the sums of exp of the elements up to each place, without overflow.",
        f"{FLOATS} complex64 complex128",
        "the argument's dtype",
    ),
    _row(
        "aten.sort.stable",
        "The elements in order and where they stood; NaN counts as largest; equal ones keep their order if stable.",
        f"{REALS} bool",
        _INDICES,
    ),
    _row(
        "aten.topk.default",
        "The k largest (or smallest) elements, sorted if asked for, and where they stand; NaN counts as "
        "largest; which of equal ones is not said.",
        REALS,
        _INDICES,
        "a, k, dim → a with k in dim",
    ),
    _row(
        "aten.searchsorted.Tensor",
        "For each value the place in the sorted sequence where it would go: before equal elements, or "
        "after them (right).",
        REALS,
        "int64, or int32 if out_int32",
        "sorted (*, n) or (n,), values (*, m) → values' shape",
    ),
)
