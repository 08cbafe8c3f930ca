"""What acts on the world outside of the program: its inputs, errors, other processes."""

from primexec.prims.base import ANY, NUMBERS, Effects, Prim

_SAME = "the argument's dtype"
_RANKS = "n: the number of processes in the group"


def _row(
    op: str, meaning: str, shapes: str, dtypes: str, promotion: str = _SAME, effects: Effects = "collective"
) -> Prim:
    return Prim(op, "effects", meaning, shapes, dtypes, promotion, effects=effects)


ROWS = (
    _row(
        "aten.copy_.default",
        "src's elements are written to self, which is an input of the program or memory seen outside.",
        "self, src that broadcasts to self's shape → self",
        ANY,
        "self's dtype; src is converted",
        "writes",
    ),
    _row(
        "aten._linalg_check_errors.default",
        "Raises LinAlgError where info is not zero, as the function api_name does.",
        "info → nothing",
        "int32",
        "no result",
        "raises",
    ),
    _row(
        "aten._assert_async.msg",
        "Raises RuntimeError with the text assert_msg where the one element of self is zero.",
        "one element → nothing",
        ANY,
        "no result",
        "raises",
    ),
    _row(
        "_c10d_functional.all_reduce.default",
        "The sum (or product, min, max, ...) over all processes.",
        "any → the same",
        NUMBERS,
    ),
    _row(
        "_c10d_functional.all_gather_into_tensor.default",
        "All processes' tensors one after the other in dimension 0.",
        f"(d, *) → (n·d, *), {_RANKS}",
        ANY,
    ),
    _row(
        "_c10d_functional.reduce_scatter_tensor.default",
        "This process's part of the sum over all processes.",
        f"(n·d, *) → (d, *), {_RANKS}",
        NUMBERS,
    ),
    _row(
        "_c10d_functional.all_to_all_single.default",
        "Part i of dimension 0 goes to process i; the parts received are joined.",
        "sum of input_split_sizes → sum of output_split_sizes",
        ANY,
    ),
    _row("_c10d_functional.broadcast.default", "The tensor of process src, everywhere.", "any → the same", ANY),
    _row("_c10d_functional.wait_tensor.default", "The result of a collective, complete.", "any → the same", ANY),
)
