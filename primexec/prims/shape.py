"""Views, and what rearranges, joins or copies elements without computing."""

from primexec.prims.base import ANY, COMPLEX, Prim

_SAME = "the argument's dtype"


def _view(op: str, meaning: str, shapes: str, dtypes: str = ANY, promotion: str = _SAME) -> Prim:
    return Prim(op, "shape", meaning, shapes, dtypes, promotion, recompute="free", view=True)


def _copy(op: str, meaning: str, shapes: str, promotion: str = _SAME) -> Prim:
    return Prim(op, "shape", meaning, shapes, ANY, promotion, recompute="cheap")


_TO_REAL = "the real dtype of the complex one"

ROWS = (
    _view(
        "prims.broadcast_in_dim.default",
        "The argument's dimension i becomes dimension broadcast_dimensions[i] (increasing); all others are "
        "repeats, and so "
        "is a dimension of size 1 that grows.",
        "a, shape, broadcast_dimensions → shape",
    ),
    _view("prims.squeeze.default", "The dimensions listed, all of size 1, are dropped.", "a, dims → a without dims"),
    _view("prims.transpose.default", "Result dimension i is the argument's dimension permutation[i].", "a → permuted"),
    _view(
        "aten.view.default",
        "The elements in row-major order under another shape; the strides must allow it without a copy.",
        "a, shape (one size may be -1) → shape of as many elements",
    ),
    _view(
        "aten.slice.Tensor",
        "Along dim the elements start, start + step, ... below end; negative bounds count from the end and all are "
        "clamped; step ≥ 1.",
        "a → a with dim shortened",
    ),
    _view(
        "aten.as_strided.default",
        "The argument's memory read at storage_offset + Σ index·stride (the argument's own offset if none is given).",
        "a, size, stride → size",
    ),
    _view("prims.view_of.default", "The argument itself, as another tensor.", "any → the same"),
    _view(
        "prims.conj.default", "Complex conjugate as a view that conjugates when it is read.", "any → the same", COMPLEX
    ),
    _view(
        "prims.view_of_dtype.default",
        "The bytes read as another dtype of the same size.",
        "any → the same",
        ANY,
        "the one asked for",
    ),
    _view("prims.real.default", "The real part.", "any → the same", COMPLEX, _TO_REAL),
    _view("prims.imag.default", "The imaginary part.", "any → the same", COMPLEX, _TO_REAL),
    _view(
        "aten.view_as_real.default",
        "Real and imaginary part along a last dimension.",
        "s → s + (2,)",
        COMPLEX,
        _TO_REAL,
    ),
    _view(
        "aten.view_as_complex.default",
        "Pairs along the last dimension read as complex numbers; that dimension has stride 1.",
        "s + (2,) → s",
        "float16 float32 float64",
        "the complex dtype of the real one",
    ),
    _copy("prims.rev.default", "The order reversed along dims.", "a, dims → a's shape"),
    _copy(
        "prims.cat.default",
        "The tensors one after the other along dim.",
        "tensors that differ in dim only → dim summed",
        "one dtype, the result's",
    ),
    _copy(
        "prims.clone.default",
        "A copy in new memory, laid out as memory_format says (None: preserve).",
        "any → the same",
    ),
    _copy(
        "aten.slice_scatter.default",
        "A copy of self in which the elements that slice would return are src's.",
        "self, src of the slice's shape → self's shape",
        "one dtype, the result's",
    ),
    _copy(
        "prims.as_strided_scatter.default",
        "A copy of self, memory gaps included, in which the elements that as_strided would return are src's.",
        "self, src of shape size → self's shape",
        "one dtype, the result's",
    ),
    _copy("prims.device_put.default", "A copy on another device.", "any → the same"),
)
