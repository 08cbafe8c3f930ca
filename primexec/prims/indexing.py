"""Reading and writing at computed places. Indices are int64 (index and index_put: int32, bool and uint8 too)."""

from primexec.prims.base import ANY, NUMBERS, Prim

_PLACE = "self; index and src of self's rank, each size of index ≤ src's, and ≤ self's but in dim → self's shape"
_SAME = "self's dtype"


def _row(
    op: str, meaning: str, shapes: str, dtypes: str = ANY, promotion: str = _SAME, deterministic: bool = True
) -> Prim:
    return Prim(op, "indexing", meaning, shapes, dtypes, promotion, deterministic=deterministic)


ROWS = (
    _row(
        "aten.gather.default",
        "result[i, j] = self[index[i, j], j] for dim 0, and alike for the others; indices out of range raise.",
        "self, index of self's rank → index's shape",
    ),
    _row(
        "aten.index.Tensor",
        "NumPy's indexing by arrays: indices (None: the whole dimension) broadcast to one shape b, which "
        "stands where they stood, or first if they stood apart; negative ones count from the end; a bool index is its "
        "nonzero coordinates.",
        "self, indices → b in place of the indexed dimensions",
    ),
    _row(
        "aten.index_put.default",
        "A copy of self in which the elements that index would return are values', or have them "
        "added (accumulate); repeated places without accumulate keep any one of them.",
        "self, indices, values that broadcast to the indexed shape → self's shape",
        deterministic=False,
    ),
    _row(
        "aten.scatter.src",
        "A copy of self with result[index[i, j], j] = src[i, j] for dim 0, and alike for the others; "
        "repeated places keep any one.",
        _PLACE,
        deterministic=False,
    ),
    _row(
        "aten.scatter.value",
        "A copy of self with result[index[i, j], j] = value for dim 0, and alike for the others.",
        "self, index of self's rank → self's shape",
    ),
    _row(
        "aten.scatter_add.default",
        "A copy of self with src[i, j] added to result[index[i, j], j] for dim 0, and alike for the others.",
        _PLACE,
        deterministic=False,
    ),
    _row(
        "aten.scatter_reduce.two",
        "As scatter_add with sum, prod, mean, amax or amin of what falls on one place; without "
        "include_self self's element there is left out.",
        _PLACE,
        NUMBERS,
        deterministic=False,
    ),
    _row(
        "aten.nonzero.default",
        "The coordinates of the elements that are not zero, in row-major order.",
        "a of rank r → (count, r)",
        ANY,
        "int64",
    ),
)
